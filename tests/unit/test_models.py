"""The models' states and names, and who makes room for whom."""

import pytest

from keepwarm.core.errors import (
    ConfigError,
    InvariantBroken,
    ModelTooLarge,
    NoRoomForModel,
    UnknownModel,
)
from keepwarm.service.model_registry import (
    MOVES,
    Model,
    ModelFacts,
    ModelRegistry,
    ModelSettings,
    ModelState,
    choose_to_unload,
)


def model(name: str = "a", *, size: int = 0, used: float = 0.0, **settings: object) -> Model:
    made = Model(name, ModelSettings(**settings), last_used_s=used)  # type: ignore[arg-type]
    if size:
        made.state = ModelState.READY
        made.facts = ModelFacts("print", 100, size, "a fake")
    return made


class TestStates:
    @pytest.mark.parametrize("target", list(ModelState))
    @pytest.mark.parametrize("state", list(ModelState))
    def test_every_move_there_is_and_no_other(self, state: ModelState, target: ModelState) -> None:
        moved = model()
        moved.state = state
        if target in MOVES[state]:
            moved.move(target)
            assert moved.state is target
        else:
            with pytest.raises(InvariantBroken, match=f"{state}.*{target}"):
                moved.move(target)
            assert moved.state is state

    def test_every_state_can_be_reached_and_left(self) -> None:
        assert set(MOVES) == set(ModelState)
        assert set.union(*map(set, MOVES.values())) == set(ModelState)
        assert all(MOVES.values())


class TestNames:
    def registry(self, *, may_add: bool = False) -> ModelRegistry:
        models = [model("org/Qwen3-4B"), model("small", aliases=("gpt-*", "claude"))]
        return ModelRegistry("small", models, may_add=may_add)

    @pytest.mark.parametrize(
        ("name", "found"),
        [
            ("small", "small"),
            ("gpt-4o", "small"),
            ("claude", "small"),
            ("org/Qwen3-4B", "org/Qwen3-4B"),
            ("Qwen3-4B", "org/Qwen3-4B"),
        ],
    )
    def test_of_a_model(self, name: str, found: str) -> None:
        assert self.registry().resolve(name).name == found

    @pytest.mark.parametrize("name", ["", "claude-3", "qwen3-4b", "org/", "\ud800", "GPT-4o"])
    def test_of_none(self, name: str) -> None:
        with pytest.raises(UnknownModel, match="org/Qwen3-4B"):
            self.registry().resolve(name)

    def test_a_new_one_is_added_where_that_is_allowed(self) -> None:
        registry = self.registry(may_add=True)
        with pytest.raises(UnknownModel):
            registry.resolve("org/new", may_add=False)
        added = registry.resolve("org/new")
        assert added.source == "org/new"
        assert registry.resolve("new") is added
        registry.forget_strangers(["org/new"], until_s=0.0)
        assert registry.resolve("new") is added
        registry.forget_strangers([], until_s=0.0)
        with pytest.raises(UnknownModel):
            registry.resolve("org/new", may_add=False)

    def test_those_that_failed_are_forgotten_later_and_those_of_the_settings_never(self) -> None:
        registry = self.registry(may_add=True)
        added = registry.resolve("org/new")
        added.state, added.failed_s = ModelState.FAILED, 50.0
        registry.forget_strangers([], until_s=49.0)
        assert registry.resolve("new") is added
        registry.forget_strangers([], until_s=50.0)
        assert [model.name for model in registry] == ["org/Qwen3-4B", "small"]

    def test_the_longest_pattern_counts(self) -> None:
        models = [model("a", aliases=("*",)), model("b", aliases=("gpt-*",))]
        registry = ModelRegistry("a", models)
        assert registry.resolve("gpt-4o").name == "b"
        assert registry.resolve("anything").name == "a"

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("context_tokens", -1),
            ("idle_unload_s", -1.0),
            ("dtype", "int3"),
            ("temperature", 101.0),
        ],
    )
    def test_wrong_settings_name_the_key(self, key: str, value: object) -> None:
        with pytest.raises(ConfigError, match=key):
            ModelSettings(**{key: value})  # type: ignore[arg-type]


class TestRoom:
    def names(self, needed: int, limit: int, *models: Model) -> list[str]:
        return [one.name for one in choose_to_unload(model("new"), needed, limit, models)]

    def test_where_it_fits_no_model_goes(self) -> None:
        assert self.names(40, 100, model("a", size=60)) == []

    def test_who_was_used_longest_ago_goes_first_and_no_more_than_needed(self) -> None:
        models = [model(n, size=30, used=t) for n, t in (("a", 3.0), ("b", 1.0), ("c", 2.0))]
        assert self.names(30, 100, *models) == ["b"]
        assert self.names(60, 100, *models) == ["b", "c"]
        assert self.names(100, 100, *models) == ["b", "c", "a"]

    def test_pinned_models_stay(self) -> None:
        models = [model("a", size=60, pinned=True), model("b", size=30, used=9.0)]
        assert self.names(40, 100, *models) == ["b"]
        with pytest.raises(NoRoomForModel) as refused:
            self.names(41, 100, *models)
        assert (refused.value.needed_bytes, refused.value.free_bytes) == (41, 40)

    def test_what_can_never_fit_is_refused_with_the_numbers(self) -> None:
        with pytest.raises(ModelTooLarge, match="2,000.*1,000") as refused:
            self.names(2000, 1000, model("a", size=60))
        assert type(refused.value) is ModelTooLarge

    def test_only_those_in_memory_count(self) -> None:
        away = model("away", size=90)
        away.state = ModelState.KNOWN
        assert self.names(80, 100, away) == []

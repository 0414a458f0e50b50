"""The models that a server knows: their states, their names, and which make room for others."""

import fnmatch
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from keepwarm.core.errors import (
    ConfigError,
    InvariantBroken,
    ModelTooLarge,
    NoRoomForModel,
    UnknownModel,
)

MAX_TEMPERATURE = 100.0
DTYPES = ("", "float32", "float16", "bfloat16")
KV_DTYPES = ("", "float16", "float32")


class ModelState(StrEnum):
    """Where a model is on its way into memory and out of it.

    Known: it can be loaded. Draining: it finishes the requests that it has and takes no new ones.
    Failed: the last attempt to load it went wrong.
    """

    KNOWN = "known"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    UNLOADING = "unloading"
    FAILED = "failed"


MOVES: dict[ModelState, frozenset[ModelState]] = {
    ModelState.KNOWN: frozenset({ModelState.LOADING}),
    ModelState.LOADING: frozenset({ModelState.READY, ModelState.FAILED, ModelState.KNOWN}),
    ModelState.READY: frozenset({ModelState.DRAINING}),
    ModelState.DRAINING: frozenset({ModelState.UNLOADING}),
    ModelState.UNLOADING: frozenset({ModelState.KNOWN, ModelState.READY}),
    ModelState.FAILED: frozenset({ModelState.LOADING}),
}
"""Which states may follow a state. Loading goes back to known where there was no memory for it;
unloading goes back to ready where it failed."""


AWAY = frozenset({ModelState.KNOWN, ModelState.FAILED})
"""States in which a model is neither in memory nor on its way there or back."""


class AutoLoad(StrEnum):
    """Which models a request may have loaded by naming them: any, those of the settings, none."""

    ANY = "any"
    KNOWN = "known"
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The settings of one model, under `[models.NAME]`.

    source: smollm2, a folder, or a hub id; the name itself where it is empty. aliases: other names
    that requests may use; `*` stands for anything. dtype: float32, float16 or bfloat16; the
    device's own where it is empty. kv_dtype: float16 or float32, for the KV of the native step;
    float16 where it is empty. native: whether the native step may compute it. context_tokens: the
    longest context; 0 is what the model was trained on. temperature: where a request gives none;
    the server's own where it is negative. idle_unload_s: seconds without a request after which it
    is unloaded; 0 is never. pinned: never unloaded to make room.
    """

    source: str = ""
    aliases: tuple[str, ...] = ()
    dtype: str = ""
    kv_dtype: str = ""
    native: bool = True
    context_tokens: int = 0
    temperature: float = -1.0
    idle_unload_s: float = 0.0
    pinned: bool = False

    def __post_init__(self) -> None:
        require_dtypes(self.dtype, self.kv_dtype)
        if self.temperature > MAX_TEMPERATURE:
            raise ConfigError("temperature", f"must be at most {MAX_TEMPERATURE:g}")
        if self.context_tokens < 0:
            raise ConfigError("context_tokens", "must not be negative")
        if self.idle_unload_s < 0.0:
            raise ConfigError("idle_unload_s", "must not be negative")


def require_dtypes(dtype: str, kv_dtype: str) -> None:
    """Refuse what is no dtype of a setting. Raises ConfigError."""
    for key, value, known in (("dtype", dtype, DTYPES), ("kv_dtype", kv_dtype, KV_DTYPES)):
        if value not in known:
            names = ", ".join(filter(None, known))
            raise ConfigError(key, f"must be empty or one of {names}, not {value!r}")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model once it has been loaded; `weight_bytes` is an estimate.

    `computed_by`: which way the model is computed here, and why in that way; for people.
    """

    fingerprint: str
    max_context_tokens: int
    weight_bytes: int
    computed_by: str


@dataclass(slots=True, eq=False)
class Model:
    """A model and its state. `num_requests` are being answered, or wait for it inside the engine.

    `is_added`: a request named it, and no settings do.
    """

    name: str
    settings: ModelSettings
    state: ModelState = ModelState.KNOWN
    facts: ModelFacts | None = None
    problem: Exception | None = None
    failed_s: float = -math.inf
    last_used_s: float = 0.0
    num_requests: int = 0
    num_loads: int = 0
    is_added: bool = False

    @property
    def source(self) -> str:
        """Where its weights come from: smollm2, a folder, or a hub id."""
        return self.settings.source or self.name

    @property
    def names(self) -> tuple[str, ...]:
        """The names and patterns by which requests may mean it; a hub id's last part is one."""
        return (self.name, self.name.rpartition("/")[2], *self.settings.aliases)

    def move(self, state: ModelState) -> None:
        """Change its state. Raises InvariantBroken where `MOVES` has no such change."""
        if state not in MOVES[self.state]:
            raise InvariantBroken(f"{self.name} was {self.state} and cannot be {state}")
        self.state = state


class ModelRegistry:
    """Owns the models. Belongs to the event loop's thread.

    With `may_add`, resolving an unknown name adds a model of that name.
    """

    def __init__(self, default: str, models: Iterable[Model], *, may_add: bool = False) -> None:
        self._models = {model.name: model for model in models}
        self._default = default
        self._may_add = may_add
        self._remembered: set[str] = set()
        if default not in self._models:
            raise InvariantBroken(f"{default!r} is none of {list(self._models)}")

    def __repr__(self) -> str:
        states = ", ".join(f"{model.name} {model.state}" for model in self)
        return f"ModelRegistry({states})"

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    @property
    def default(self) -> Model:
        """The model that answers agents that are new, and requests that name none."""
        return self._models[self._default]

    def remember(self, names: Iterable[str]) -> None:
        """Note the models that the agents of an earlier run talked to last."""
        self._remembered.update(names)

    @property
    def only_used(self) -> str:
        """The name of the only model that any agent has talked to; empty if there are several."""
        used = self._remembered.union(model.name for model in self if model.num_loads)
        return next(iter(used)) if len(used) == 1 else ""

    def get(self, name: str) -> Model:
        """Find the model of this very name. Raises UnknownModel."""
        if name not in self._models:
            raise UnknownModel(name, tuple(self._models))
        return self._models[name]

    def resolve(self, name: str, *, may_add: bool = True) -> Model:
        """Find the model that is meant by any of its names. Raises UnknownModel."""
        if name in self._models:
            return self._models[name]
        if name.isprintable():  # half a surrogate pair is not
            if (model := self._of_alias(name)) is not None:
                return model
            if may_add and self._may_add and name.strip():
                return self._models.setdefault(name, Model(name, ModelSettings(), is_added=True))
        raise UnknownModel(name, tuple(self._models))

    def _of_alias(self, name: str) -> Model | None:
        """Find a model by the longest pattern that matches: `*` loses to every other."""
        matching = [
            (len(alias), model)
            for model in self
            for alias in model.names
            if fnmatch.fnmatchcase(name, alias)
        ]
        return max(matching, key=lambda pair: pair[0])[1] if matching else None

    def forget_strangers(self, but: Collection[str], until_s: float) -> None:
        """Forget models that only a request named and that were never loaded.

        Models named in `but` stay, as do those that failed after `until_s`, whose error is still
        to be told.
        """
        for model in list(self):
            is_stranger = model.is_added and not model.num_loads and model.name not in but
            if is_stranger and model.state in AWAY and model.failed_s <= until_s:
                del self._models[model.name]

    def check(self) -> None:
        """Raise InvariantBroken where the books contradict themselves."""
        for model in self:
            if model.num_requests < 0:
                raise InvariantBroken(f"{model.name} answers {model.num_requests} requests")
            if model.state is ModelState.READY and model.facts is None:
                raise InvariantBroken(f"{model.name} is ready and nothing is known of it")


def choose_to_unload(
    wanted: Model, needed_bytes: int, limit_bytes: int, models: Collection[Model]
) -> Sequence[Model]:
    """Choose the models that make room: as few as it takes, least recently used first.

    Pinned models are never chosen. Raises ModelTooLarge where even an empty memory would not do,
    and NoRoomForModel where pinned models stand in the way; both have the numbers.
    """
    ready = [model for model in models if model.state is ModelState.READY and model is not wanted]
    free_bytes = limit_bytes - sum(map(_weight_bytes, ready))
    chosen: list[Model] = []
    for model in sorted(ready, key=lambda model: model.last_used_s):
        if free_bytes >= needed_bytes:
            break
        if not model.settings.pinned:
            free_bytes += _weight_bytes(model)
            chosen.append(model)
    if free_bytes < needed_bytes:
        refusal = NoRoomForModel if needed_bytes <= limit_bytes else ModelTooLarge
        raise refusal(
            wanted.name,
            needed_bytes=needed_bytes,
            free_bytes=max(free_bytes, 0),
            limit_bytes=limit_bytes,
        )
    return chosen


def _weight_bytes(model: Model) -> int:
    return model.facts.weight_bytes if model.facts is not None else 0

"""Whatever an agent may carry goes through a bundle: agents are made from the types themselves.

A field that is added to one of them is generated here, and fails until bundles have it.
"""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines import fake_engine, run, user
from keepwarm import AgentCacheStore
from keepwarm.core.events import FinishReason
from keepwarm.core.stored import AgentSettings, AgentState, LineState
from keepwarm.core.transcript import MAX_KEY_CHARS, Receipt, Span, Transcript, Turn
from keepwarm.engine.requests import ReceiptKey, valid_settings
from keepwarm.store.bundle.agent_json import decode_agent, encode_agent

LEFT_OUT: dict[type, dict[str, Any]] = {
    AgentState: {"model": "", "has_fixed_main": False},
    LineState: {"block_hashes": (), "last_used": 0},
}
"""What means something in one home only, and what an imported agent has in its place."""

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
counts = st.integers(0, 2**32 - 1)
keys = st.text(min_size=1, max_size=MAX_KEY_CHARS).filter(str.isprintable)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False).filter(lambda number: abs(number) < float("inf"))
    | text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
    max_leaves=5,
)


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    """Draw messages of any role, some with tool calls and with fields that clients add."""
    message: dict[str, Any] = {
        "role": draw(st.sampled_from(["system", "developer", "user", "assistant", "tool"])),
        "content": draw(text),
    }
    if draw(st.booleans()):
        function = {"name": draw(text), "arguments": draw(values)}
        message["tool_calls"] = [{"id": draw(text), "type": "function", "function": function}]
    return {**draw(st.dictionaries(text, values, max_size=2)), **message}


conversations = st.none() | st.lists(messages(), max_size=3).map(tuple)


def made(cls: type, **known: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw a value of a class: each field by its type, unless `known` has a strategy for it."""
    hints = get_type_hints(cls)
    return st.builds(
        cls,
        **{f.name: known.get(f.name, st.from_type(hints[f.name])) for f in fields(cls)},
    )


receipts = made(
    Receipt,
    key=keys,
    digest=text,
    finish_reason=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
    prompt_tokens=counts,
    cached_tokens=counts,
    completion_tokens=counts,
)
agent_settings = made(
    AgentSettings,
    priority=st.integers(-100, 100),
    quota_bytes=st.none() | st.integers(0, 2**62),
    policy=st.just("exact"),
)
token_ids = st.lists(counts, max_size=4).map(tuple)


@st.composite
def transcripts(draw: st.DrawFn) -> Transcript:
    texts = made(Span, text=st.none() | text, token_ids=token_ids, is_special=st.just(False))
    specials = made(Span, text=text, token_ids=st.tuples(counts), is_special=st.just(True))
    spans: list[Span] = [draw(texts)]
    for _ in range(draw(st.integers(0, 2))):
        spans += [draw(specials), draw(texts)]
    return Transcript(tuple(spans))


@st.composite
def lines(draw: st.DrawFn, number: int, tokenizer: str) -> LineState:
    transcript = draw(transcripts())
    ends = sorted(draw(st.lists(st.integers(0, transcript.num_tokens), max_size=3)))
    turns = [
        draw(
            made(
                Turn, num_tokens=st.just(end), messages=conversations, receipt=st.none() | receipts
            )
        )
        for end in ends
    ]
    return draw(
        made(
            LineState,
            number=st.just(number),
            tokenizer=st.just(tokenizer),
            transcript=st.just(transcript),
            messages=conversations,
            turns=st.just(tuple(turns)),
            block_hashes=st.just((b"x" * 32,)),
            last_used=counts,
            namespace=st.sampled_from(["", "team", "import:0123abcd"]),
        )
    )


@st.composite
def agents(draw: st.DrawFn) -> AgentState:
    """A main line in one or two tokenizers' ids, and side lines."""
    numbers = [
        (0, "words"),
        *draw(st.lists(st.sampled_from([(0, "bytes"), (1, "words"), (3, "bytes")]))),
    ]
    own = tuple(draw(lines(*key)) for key in sorted(set(numbers)))
    return draw(
        made(
            AgentState,
            agent_id=st.just("ada"),
            settings=agent_settings,
            lines=st.just(own),
            model=text,
        )
    )


def carried(value: Any) -> Any:
    """The value as an imported agent has it, by the list of what is left out."""
    if isinstance(value, tuple):
        return tuple(map(carried, value))
    if not is_dataclass(value) or isinstance(value, type):
        return value
    known = LEFT_OUT.get(type(value), {})
    inner = {f.name: carried(getattr(value, f.name)) for f in fields(value)}
    return replace(value, **{**inner, **known})


@pytest.mark.slow
@given(agents())
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_every_field_goes_through_a_bundle(state: AgentState) -> None:
    assert decode_agent(encode_agent(state)) == carried(state)


@given(agent_settings)
def test_settings_that_agents_may_have_are_those_that_bundles_take(chosen: AgentSettings) -> None:
    assert valid_settings(chosen) == chosen


def other_than_default() -> AgentSettings:
    """Each setting another than its default, as far as there is another."""
    known = {"priority": 7, "quota_bytes": 1 << 20, "policy": "exact"}
    chosen: dict[str, Any] = {}
    for field in fields(AgentSettings):
        if field.name in known:
            chosen[field.name] = known[field.name]
        elif isinstance(field.default, bool):
            chosen[field.name] = not field.default
        else:  # an enumeration
            others = [value for value in type(field.default) if value != field.default]
            chosen[field.name] = others[0]
    return AgentSettings(**chosen)


class TestForks:
    @pytest.mark.parametrize("at_turn", [None, 1])
    def test_a_fork_keeps_every_setting_but_the_pin(self, at_turn: int | None) -> None:
        engine = fake_engine()
        chosen = other_than_default()
        engine.create("ada", settings=chosen)
        for text in ("One", "Two"):
            run(engine, agent_id="ada", append=[user(text)], max_tokens=3)
        engine.fork("ada", "eve", at_turn=at_turn)
        kept = engine.settings("eve")
        for field in fields(AgentSettings):
            is_kept = getattr(kept, field.name) == getattr(chosen, field.name)
            assert is_kept == (field.name != "pinned"), field.name
        assert not engine.agent("eve").pinned

    def test_a_key_is_of_the_agent_that_was_asked(self) -> None:
        engine = fake_engine()
        engine.create("ada")
        key = ReceiptKey("key-1", "digest")
        run(engine, agent_id="ada", append=[user("One")], max_tokens=3, receipt_key=key)
        engine.fork("ada", "eve")
        assert engine.receipt("ada", "key-1") is not None
        assert engine.receipt("eve", "key-1") is None
        said = [turn.messages for turn in engine.turns("ada")]
        assert [turn.messages for turn in engine.turns("eve")] == said


class TestReceipts:
    """A moved agent answers a request that is sent again; one of another name was never asked."""

    @pytest.mark.parametrize(("name", "is_kept"), [(None, True), ("ada", True), ("eve", False)])
    def test_after_an_import(self, tmp_path: Path, name: str | None, is_kept: bool) -> None:
        path, key = tmp_path / "ada.keepwarm", ReceiptKey("key-1", "digest")
        with AgentCacheStore(tmp_path / "one") as store:
            engine = fake_engine(store=store)
            engine.create("ada")
            run(engine, agent_id="ada", append=[user("One")], max_tokens=3, receipt_key=key)
            turn = engine.receipt("ada", "key-1")
            engine.export("ada", path)
        with AgentCacheStore(tmp_path / "two") as store:
            engine = fake_engine(store=store)
            imported = engine.import_agent(path, name)
            found = engine.receipt(imported.agent_id, "key-1")
            assert found == (turn if is_kept else None)

    def test_a_fork_of_such_an_agent_is_exported(self, tmp_path: Path) -> None:
        with AgentCacheStore(tmp_path / "one") as store:
            engine = fake_engine(store=store)
            engine.create("ada")
            key = ReceiptKey("key-1", "digest")
            run(engine, agent_id="ada", append=[user("One")], max_tokens=3, receipt_key=key)
            engine.fork("ada", "eve")
            engine.export("eve", tmp_path / "eve.keepwarm")
            assert engine.import_agent(tmp_path / "eve.keepwarm", "bob").num_turns == 1

"""What is lost of an agent when the disk never takes its last changes, and that the log says it."""

import logging
from pathlib import Path
from typing import NoReturn

import pytest

from engines import ids
from keepwarm.core.stored import DEFAULT_SETTINGS, AgentState, LineState
from keepwarm.core.transcript import Span, Transcript, Turn
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.catalog.errors import CatalogUnavailable
from keepwarm.store.changes import Change
from keepwarm.store.losses import loss_of
from stores import opened


def state_of(num_tokens: int, *turn_ends: int, tokenizer: str = "words") -> AgentState:
    transcript = Transcript((Span(None, tuple(range(num_tokens))),))
    turns = tuple(Turn(end, None) for end in turn_ends)
    line = LineState(0, tokenizer, transcript, None, turns, (), last_used=1)
    return AgentState("ada", DEFAULT_SETTINGS, (line,))


@pytest.mark.parametrize(
    ("state", "committed", "said"),
    [
        (state_of(30, 10, 30), None, "all of it, 2 turns and 30 tokens"),
        (state_of(30, 10, 30), state_of(10, 10), "1 turn and 20 tokens"),
        (state_of(30, 10, 30), state_of(30, 10, 30), "its last change"),
        (state_of(10, 10), state_of(30, 10, 30), "its last change"),
        (state_of(30, 30), state_of(30, 30, tokenizer="other"), "0 turns and 30 tokens"),
    ],
)
def test_what_is_lost(state: AgentState, committed: AgentState | None, said: str) -> None:
    assert said in str(loss_of(Change("ada", state), committed))


def test_a_store_that_closes_says_what_it_could_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Catalog, *_: object) -> NoReturn:
        raise CatalogUnavailable(self.path, operation="commit", message="full", errorname="FULL")

    with opened(tmp_path) as setup:
        first = setup.run(agent_id="ada", token_ids=ids(30), max_tokens=2)
        assert first.durable
        with monkeypatch.context() as patched:
            patched.setattr(Catalog, "commit", refuse)
            setup.run(agent_id="ada", token_ids=[*ids(30), *first.token_ids, 5], max_tokens=2)
            setup.engine.create("eve")
            setup.engine.flush()
            setup.store.close()
    lost = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert any("agent 'ada': 1 turn and 3 tokens" in text for text in lost)
    assert any("agent 'eve': all of it" in text for text in lost)


def test_one_that_could_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path) as setup:
        setup.run(agent_id="ada", token_ids=ids(30), max_tokens=2)
        setup.store.close()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]

"""Twenty kills in all phases over two homes; `python -m benchmarks chaos` is the long version."""

import json
import threading

import pytest

from benchmarks.chaos import traps
from benchmarks.chaos.benchmark import run_chaos
from benchmarks.chaos.home import Home
from benchmarks.chaos.plan import QUICK, ChaosPlan, Kill, kills_of
from benchmarks.chaos.tally import HALF, LOST, PROBLEMS, TRACES, WRONG, Tally
from benchmarks.chaos.traps import Phase
from benchmarks.chaos.verification import Verification
from benchmarks.chaos.world import FAKE, load_world
from keepwarm.bench.report import as_json

SEED = 7


@pytest.mark.slow
def test_twenty_kills_lose_nothing_and_break_nothing() -> None:
    result = run_chaos(QUICK(seed=SEED))
    shown = "\n".join([*(f"{f.name}: {f.measured}" for f in result.figures), *result.notes])
    assert result.passed, shown
    kills = result.figures[0]
    assert kills.measured >= 20
    assert set(kills.facts) == {phase.value for phase in Phase}
    assert all(kills.facts.values()), shown
    json.dumps(as_json(result))


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.RANDOM])
def test_what_a_trap_is_made_of_exists(phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traps know functions by name only, which no type checker compares."""
    set_up: list[str] = []

    def note(owner: object, name: str, _value: object) -> None:
        assert hasattr(owner, name)
        set_up.append(name)

    monkeypatch.setattr(traps, "_replace", note)
    monkeypatch.setattr(threading.Thread, "start", lambda _thread: None)
    traps.set_trap(traps.Trap(phase, 1, 0, lambda _fact: None), load_world(FAKE))
    assert set_up


def test_a_campaign_follows_from_its_seed() -> None:
    plan = ChaosPlan(num_kills=200, num_model_kills=10, seed=3)
    kills = list(kills_of(plan))
    assert kills == list(kills_of(plan))
    assert len(kills) == 200
    assert sum(kill.world == FAKE for kill in kills) == 190
    assert {kill.phase for kill in kills if kill.world == FAKE} == set(Phase)
    part = ChaosPlan(num_kills=7, num_model_kills=0, seed=3, first_kill=40)
    assert list(kills_of(part)) == kills[40:47]
    assert len({kill.seed for kill in kills}) == 200


class TestVerificationNotices:
    """What a kill must not do is done by hand, and seen."""

    @pytest.fixture
    def kill(self) -> Kill:
        return next(kills_of(ChaosPlan(num_kills=1, num_model_kills=0, seed=SEED)))

    @pytest.fixture
    def home(self, kill: Kill) -> Home:
        home = Home.begin(ChaosPlan(seed=SEED), kill, Tally())
        assert not home.tally.notes
        return home

    def found(self, home: Home, kill: Kill) -> set[str]:
        home.verify(kill)
        home.leave()
        return {problem for problem in PROBLEMS if home.tally.counts[problem]}

    def test_nothing_where_nothing_was_done(self, home: Home, kill: Kill) -> None:
        assert self.found(home, kill) == set()

    def test_a_lost_agent(self, home: Home, kill: Kill) -> None:
        home.ledger.truth["ids-nobody"] = {"ids": [1], "messages": None, "turns": [[1, None]]}
        assert self.found(home, kill) == {LOST}

    def test_a_lost_turn(self, home: Home, kill: Kill) -> None:
        next(iter(home.ledger.truth.values()))["turns"].append([9999, None])
        assert self.found(home, kill) == {LOST}

    def test_another_text(self, home: Home, kill: Kill) -> None:
        state = next(state for state in home.ledger.truth.values() if state["ids"])
        state["ids"][0] += 1
        assert HALF in self.found(home, kill)

    def test_a_deleted_agent_that_is_still_there(self, home: Home, kill: Kill) -> None:
        name = next(name for name, state in home.ledger.truth.items() if len(state["ids"]) > 512)
        home.ledger.related.clear()
        home.ledger.deleted[name] = home.ledger.truth[name]["ids"]
        assert self.found(home, kill) == {TRACES}

    def test_a_wrong_answer(self, home: Home, kill: Kill, monkeypatch: pytest.MonkeyPatch) -> None:
        cold = Verification._cold_reply

        def colder(self: Verification, prompt_ids: list[int], num_reply: int) -> object:
            return cold(self, [*prompt_ids, 1], num_reply)

        monkeypatch.setattr(Verification, "_cold_reply", colder)
        assert self.found(home, kill) == {WRONG}

    def test_a_damaged_record(self, home: Home, kill: Kill) -> None:
        path = next((home.path / "store" / "blocks").glob("*/*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
        assert "records damaged" in self.found(home, kill)

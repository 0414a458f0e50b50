"""What a campaign of kills found, as counts, notes and figures."""

from collections import Counter
from dataclasses import dataclass, field

from benchmarks.chaos.plan import ChaosPlan, kills_of
from benchmarks.chaos.traps import Phase
from keepwarm.bench.report import Figure
from keepwarm.core.layout import BLOCK_TOKENS

LOST = "acknowledged turns and changes lost"
HALF = "agents half changed"
WRONG = "wrong answers"
UNREADABLE = "homes that do not open"
DAMAGED = "records damaged"
BROKEN = "invariants broken"
TRACES = "traces of deleted agents"
FAILED = "requests that failed"
MISSES = "kills that missed their phase"
PROBLEMS = (LOST, HALF, WRONG, UNREADABLE, DAMAGED, BROKEN, TRACES, FAILED)


@dataclass(slots=True)
class Tally:
    """Counts what was found; each note says what was wrong and what reproduces it."""

    hits: Counter[Phase] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    most_recomputed: int = 0
    fullest: float = 0.0
    num_torn_commits: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def num_problems(self) -> int:
        return sum(self.counts[problem] for problem in PROBLEMS)

    def count(self, what: str, note: str) -> None:
        self.counts[what] += 1
        self.notes.append(note)


def figures_of(plan: ChaosPlan, tally: Tally) -> tuple[Figure, ...]:
    """Return what was found as figures: everything that went wrong must be 0."""
    planned = {kill.phase for kill in kills_of(plan)}
    num_hits = sum(tally.hits.values())
    per_phase = {phase.value: float(tally.hits[phase]) for phase in Phase if phase in planned}
    facts = {"inside a commit's log": float(tally.num_torn_commits)}
    return (
        Figure("kills", num_hits, plan.num_kills, "", at_least=True, facts=per_phase),
        Figure(
            "phases that were never hit",
            sum(not tally.hits[phase] for phase in planned),
            0,
            "",
            facts={MISSES: float(tally.counts[MISSES])} | facts,
        ),
        *(Figure(problem, tally.counts[problem], 0, "") for problem in PROBLEMS),
        Figure(
            "most tokens that an agent had to compute again once all was written",
            tally.most_recomputed,
            BLOCK_TOKENS - 1,
            "tokens",
        ),
        Figure("most of a disk budget that was used", tally.fullest, 1.0),
    )

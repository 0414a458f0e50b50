"""SIGKILL in every phase: no committed turn lost, nothing wrong, no unreadable home.

A process with agents on a folder (`child.py`) is killed in a chosen place (`traps.py`),
again and again over the same folder, so that damage would add up. After every kill the folder is
opened here and compared with what the process had said it could count on, and every agent's next
reply with that of an engine that has nothing cached. One seed decides everything but the threads'
timing.
"""

from benchmarks.chaos.home import Home
from benchmarks.chaos.plan import ChaosPlan, kills_of
from benchmarks.chaos.tally import Tally, figures_of
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.report import Report


def run_chaos(plan: ChaosPlan, on_progress: OnProgress = no_progress) -> Report:
    """Kill, open and verify. A home in which something was wrong is kept, and the notes name it."""
    tally = Tally()
    kills = list(kills_of(plan))
    home: Home | None = None
    for done, kill in enumerate(kills):
        on_progress(f"{kill.world}: {kill.phase.value}", done, len(kills))
        if home is None or (home.world, home.number) != (kill.world, kill.home_number):
            if home is not None:
                home.leave()
            home = Home.begin(plan, kill, tally)
        home.survive(kill)
    if home is not None:
        home.leave()
    return Report(figures_of(plan, tally), tuple(tally.notes))

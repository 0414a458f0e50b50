"""A folder that outlives many kills of the process that works on it."""

import json
import shutil
import tempfile
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.chaos.child import ChildSpec
from benchmarks.chaos.ledger import Ledger
from benchmarks.chaos.plan import KILLS_PER_HOME, LARGE_RAM_BLOCKS, ChaosPlan, Kill
from benchmarks.chaos.tally import BROKEN, FAILED, MISSES, WRONG, Tally
from benchmarks.chaos.traps import Phase
from benchmarks.chaos.verification import Verification
from benchmarks.chaos.world import FAKE
from keepwarm.bench.child_process import ChildProcess

SMALL_DISK_BYTES = 8 << 20
LARGE_DISK_BYTES = 4 << 30
NUM_OPERATIONS = 500
MAX_COMPLAINT = 1500
"""How many characters of a process's last words a note shows."""


@dataclass(slots=True)
class Home:
    """Owns the folder. `is_roomy`: memory held all blocks until they were written."""

    path: Path
    world: str
    number: int
    seed: int
    tally: Tally
    disk_budget_bytes: int
    ledger: Ledger
    is_roomy: bool = True
    is_sound: bool = True

    @classmethod
    def begin(cls, plan: ChaosPlan, kill: Kill, tally: Tally) -> "Home":
        """Make a new folder, with agents whose process ended as it should."""
        is_small = kill.world == FAKE and kill.home_number % 2 == 1
        home = cls(
            path=Path(tempfile.mkdtemp(prefix="keepwarm-chaos-")),
            world=kill.world,
            number=kill.home_number,
            seed=plan.seed,
            tally=tally,
            disk_budget_bytes=SMALL_DISK_BYTES if is_small else LARGE_DISK_BYTES,
            ledger=Ledger(keeps_all=not is_small),
        )
        num_operations = 60 if kill.world == FAKE else 4
        spec = replace(
            home._spec(kill, phase=None, visit=0, num_operations=num_operations),
            ram_blocks=LARGE_RAM_BLOCKS,
        )
        ending = home._run_child(spec)
        if ending.code != 0:
            where = home._where(kill)
            tally.count(BROKEN, f"{where}: the first process failed: {ending.complaint}")
        return home

    def survive(self, kill: Kill) -> None:
        """Kill once where it was planned, or somewhere else first if that place was missed."""
        for visit in (kill.visit, 1, 1):
            hit = self._kill(kill, visit)
            problems_before = self.tally.num_problems
            try:
                self.verify(kill)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what was looked for
                told = "".join(traceback.format_exception(error)[-3:])
                self.tally.count(BROKEN, f"{self._where(kill)}: it cannot be verified: {told}")
            self.is_sound = self.is_sound and self.tally.num_problems == problems_before
            if hit is kill.phase:
                return
            self.tally.counts[MISSES] += 1

    def verify(self, kill: Kill) -> None:
        """Open the folder and count what is not as it must be."""
        Verification(
            self.path / "store",
            world=self.world,
            disk_budget_bytes=self.disk_budget_bytes,
            ledger=self.ledger,
            tally=self.tally,
            seed=kill.seed + 1,
            where=self._where(kill),
        ).run()

    def leave(self) -> None:
        """Remove the folder, unless something was wrong in it."""
        if self.is_sound:
            shutil.rmtree(self.path)

    def _kill(self, kill: Kill, visit: int) -> Phase | None:
        """Return where it was hit; None where it missed its phase and was killed at its end."""
        spec = self._spec(kill, phase=kill.phase, visit=visit, num_operations=NUM_OPERATIONS)
        # Where memory is short, blocks may leave it before they are written.
        self.is_roomy = kill.ram_blocks == LARGE_RAM_BLOCKS
        delay_s = kill.delay_s if kill.phase is Phase.RANDOM else None
        ending = self._run_child(spec, kill_after_s=delay_s)
        if ending.code != -9:
            where = self._where(kill)
            self.tally.count(BROKEN, f"{where}: it ended with {ending.code}: {ending.complaint}")
            return kill.phase
        phase = kill.phase if kill.phase is Phase.RANDOM else ending.hit
        if phase is not None:
            self.tally.hits[phase] += 1
        return phase

    def _run_child(self, spec: ChildSpec, *, kill_after_s: float | None = None) -> "_Ending":
        """Run the process to its end: its own, or SIGKILL `kill_after_s` after it has opened the
        home.
        """
        hit: Phase | None = None
        with ChildProcess("-m", "benchmarks.chaos.child") as child:
            child.kill_after(300.0 if spec.world == FAKE else 900.0)
            child.tell(spec.to_json())
            for said in map(json.loads, child.lines()):
                if said.get("did") == "open" and kill_after_s is not None:
                    child.kill_after(kill_after_s)
                hit = Phase(said["hit"]) if "hit" in said else hit
                self._hear(said)
            code = child.wait()
            return _Ending(code, hit, child.complaints()[-MAX_COMPLAINT:] or "nothing was said")

    def _hear(self, said: dict[str, Any]) -> None:
        """Take what the process to be killed says about its agents."""
        match said:
            case {"doing": _}:
                self.ledger.intend(said)
            case {"did": "turn" | "change", "agent": agent, "state": state}:
                self.ledger.acknowledge(agent, state)
            case {"did": "quota", "agent": agent}:
                self.ledger.limit(agent)
            case {"did": "settle", "tokens": tokens} if self.is_roomy:
                self.ledger.settle(tokens)
            case {"wrong": wrong}:
                self.tally.count(WRONG, f"home {self.path}: {wrong}")
            case {"failed": failed}:
                self.tally.count(FAILED, f"home {self.path}: {failed}")

    def _spec(
        self, kill: Kill, *, phase: Phase | None, visit: int, num_operations: int
    ) -> ChildSpec:
        return ChildSpec(
            home=str(self.path / "store"),
            world=kill.world,
            seed=kill.seed,
            phase=phase,
            visit=visit,
            ram_blocks=kill.ram_blocks,
            disk_budget_bytes=self.disk_budget_bytes,
            num_operations=num_operations,
        )

    def _where(self, kill: Kill) -> str:
        """Name the kill, its home, and the plan that repeats it."""
        first = kill.number - kill.number % KILLS_PER_HOME
        again = f"seed={self.seed}, first_kill={first}, num_kills={kill.number - first + 1}"
        return (
            f"kill {kill.number} of {kill.world} (its seed: {kill.seed}; ChaosPlan({again})), "
            f"phase {kill.phase.value!r}, home {self.path}"
        )


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a process ended: its exit code, the phase in which it was hit, and its last words."""

    code: int
    hit: Phase | None
    complaint: str

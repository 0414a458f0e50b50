"""The process that chaos kills: agents that talk, move and vanish at random, and a trap somewhere.

It says on its output, in a line of JSON each, what it is about to do to an agent (`doing`) and what
it may count on from now on (`did`), and where it is when it dies (`hit`).
"""

import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.chaos.player import Player
from benchmarks.chaos.speaker import Speaker, sizes_of
from benchmarks.chaos.traps import Phase, Trap, set_trap
from benchmarks.chaos.world import load_world, new_engine, open_store


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What the process to be killed is told. `phase` None: it plays, closes properly and ends."""

    home: str
    world: str
    seed: int
    phase: Phase | None
    visit: int
    ram_blocks: int
    disk_budget_bytes: int
    num_operations: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ChildSpec":
        fields = json.loads(text)
        phase = fields.pop("phase")
        return cls(phase=None if phase is None else Phase(phase), **fields)


class Teller:
    """Writes whole lines to a pipe, from any thread, without a buffer that a kill would lose."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def __call__(self, said: dict[str, Any]) -> None:
        line = (json.dumps(said) + "\n").encode()
        with self._lock:
            while line:
                line = line[os.write(self._descriptor, line) :]


def main() -> None:
    """Play the part that the standard input describes."""
    spec = ChildSpec.from_json(sys.stdin.read())
    tell = Teller(sys.stdout.fileno())
    loaded = load_world(spec.world)
    if spec.phase is not None:
        set_trap(Trap(spec.phase, spec.visit, spec.seed, tell), loaded)
    store = open_store(spec.home, spec.disk_budget_bytes)
    engine = new_engine(loaded, store, spec.ram_blocks)
    tell({"did": "open"})
    speaker = Speaker(spec.seed, sizes_of(spec.world), loaded.vocab_size)
    player = Player(
        engine, speaker, tell, tokenizer=loaded.tokenizer, world=spec.world, phase=spec.phase
    )
    player.play(spec.num_operations)
    if spec.phase is None:
        player.settle()
        engine.close()
        store.close()
        return
    tell({"missed": spec.phase})
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()

"""The paths of EXP-005 that lead over a disk: parked, after a restart, after SIGKILL."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath
from tempfile import TemporaryDirectory

from keepwarm.bench.child_process import ChildProcess
from keepwarm.bench.lab import Case, Lab, Setting
from keepwarm.bench.recording import Recording
from keepwarm.bench.requiring import require
from keepwarm.core.agent import Tier
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.store.agent_cache_store import AgentCacheStore

CHILD_TIMEOUT_S = 300.0
READY = "the first turn is on disk"


@dataclass(frozen=True, slots=True)
class FirstTurn:
    """What is said to the agent, and what it replies, before it is put away."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]

    @property
    def num_held(self) -> int:
        """Return how many tokens have KV after the turn: the reply's last one was never fed."""
        return len(self.prompt) + len(self.reply) - 1


def parked(setting: Setting, first: FirstTurn, case: Case) -> Recording:
    """Bring back an agent that had left memory altogether, in one process."""
    with _folder() as folder, AgentCacheStore(folder) as store:
        lab = setting.lab(store=store)
        lab.say("ada", first.prompt, first.reply)
        lab.engine.park("ada")
        lab.settle()
        require(not lab.engine.agent("ada").slab_bytes, "the agent is still in memory")
        return _resumed(lab, first.num_held, case)


def restarted(setting: Setting, first: FirstTurn, case: Case) -> Recording:
    """Bring back an agent with a new engine and a new store on the folder, after a clean stop."""
    with _folder() as folder:
        with AgentCacheStore(folder) as store:
            lab = setting.lab(store=store)
            lab.say("ada", first.prompt, first.reply)
            require(lab.engine.close(), "the engine did not save everything")
        with AgentCacheStore(folder) as store:
            return _resumed(setting.lab(store=store), first.num_held, case)


def killed(setting: Setting, first: FirstTurn, case: Case) -> Recording:
    """Bring back an agent after SIGKILL to a process in the middle of the agent's second turn."""
    with _folder() as folder:
        _run_and_kill(setting, first, folder)
        with AgentCacheStore(folder) as store:
            num_stored = first.num_held - first.num_held % BLOCK_TOKENS
            return _resumed(setting.lab(store=store), num_stored, case)


def _resumed(lab: Lab, num_held: int, case: Case) -> Recording:
    turn = lab.run_case("ada", case)
    lab.require_reuse(turn, Tier.COLD, num_held)
    return lab.recording(turn)


def _run_and_kill(setting: Setting, first: FirstTurn, folder: FilePath) -> None:
    loaded = setting.loaded
    order = {
        "model": loaded.name,
        "native": loaded.is_reproducible,
        "kv_dtype": loaded.layout.dtype if loaded.is_reproducible else None,
        "deterministic": setting.deterministic,
        "folder": str(folder),
        "prompt": first.prompt,
        "reply": first.reply,
    }
    with ChildProcess("-m", "keepwarm.bench.durable_paths") as child:
        child.tell(json.dumps(order))
        said = child.read_line()
        child.kill()
        code = child.wait(CHILD_TIMEOUT_S)
        complaints = child.complaints()
    require(said == READY, f"the process to be killed said {said!r}; {complaints}")
    require(code == -signal.SIGKILL, f"it ended with {code}")


def play_victim() -> None:
    """Be the process that is killed: say the first turn, and go on with the second until then."""
    from keepwarm import load_model

    order = json.load(sys.stdin)
    loaded = load_model(order["model"], native=order["native"], kv_dtype=order["kv_dtype"])
    setting = Setting(loaded, deterministic=order["deterministic"])
    lab = setting.lab(store=AgentCacheStore(order["folder"]))
    turn = lab.say("ada", order["prompt"], order["reply"])
    require(lab.completed(turn).durable, "the turn is not durable")
    lab.settle()
    going_on = lab.start("ada", [*order["prompt"], *order["reply"], *order["prompt"][:9]], 10_000)
    while not lab.num_draws(going_on):
        lab.step()
    print(READY, flush=True)  # noqa: T201 - the signal to the parent
    lab.finish(going_on)


@contextmanager
def temporary_store() -> Iterator[AgentCacheStore]:
    """Open a store on a folder that is removed when the block ends."""
    with _folder() as folder, AgentCacheStore(folder) as store:
        yield store


@contextmanager
def _folder() -> Iterator[FilePath]:
    with TemporaryDirectory(prefix="keepwarm-exp005-") as name:
        yield FilePath(name)


if __name__ == "__main__":
    play_victim()

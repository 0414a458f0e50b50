"""SIGKILL in every phase: no committed turn lost, nothing wrong, no unreadable home.

A process with agents on a folder (`chaos_child.py`) is killed in a chosen place (`chaos_traps.py`),
again and again over the same folder, so that damage would add up. After every kill the folder is
opened here and compared with what the process had said it could count on, and every agent's next
reply with that of an engine that has nothing cached. One seed decides everything but the threads'
timing.
"""

import hashlib
import json
import random
import shutil
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.chaos.child import (
    FAKE,
    ChildSpec,
    Sizes,
    Speaker,
    State,
    kept_ids,
    load_world,
    new_engine,
    open_store,
    plain_state,
)
from benchmarks.chaos.traps import VISITS, Phase, num_unfinished_frames
from keepwarm.bench.child_process import ChildProcess
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.report import Figure, Report
from keepwarm.core.block import chain_hashes
from keepwarm.core.errors import KeepwarmError
from keepwarm.core.events import Completed, Failed
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.ports import LoadedModel
from keepwarm.core.stored import KVFamily
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.engine.parts import CANONICAL_LINEAGE
from keepwarm.store.agent_cache_store import AgentCacheStore
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.disk.disk_store import CATALOG_NAME
from keepwarm.store.disk.record import decode
from keepwarm.store.errors import BadRecord

KILLS_PER_HOME = 10
SMALL_DISK_BYTES = 8 << 20
LARGE_DISK_BYTES = 4 << 30
SMALL_RAM_BLOCKS = 24
LARGE_RAM_BLOCKS = 400
NUM_OPERATIONS = 500
MAX_COMPLAINT = 1500
"""How many characters of a process's last words a note shows."""
SETTLE_TIMEOUT_S = 120.0
NEXT_TURN = Sizes(short=20, long=30, reply=12, agent=0, num_agents=0)
MODEL_PHASES = (
    *(Phase.DECODE, Phase.COMMIT, Phase.RESTORE, Phase.WRITE, Phase.AFTER_RENAME),
    *(Phase.PREFILL, Phase.COMMITTED, Phase.DEMOTION, Phase.RANDOM, Phase.QUEUED),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosPlan:
    """`num_model_kills` of the kills are on the model, the others on the fake generator.

    Kills have numbers from `first_kill` on; a home's first number is a multiple of ten.
    """

    num_kills: int = 200
    num_model_kills: int = 10
    seed: int = 0
    first_kill: int = 0
    model: str = "smollm2"


QUICK = partial(ChaosPlan, num_kills=20, num_model_kills=0)
"""Small sizes, to see that it works."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill of a campaign: everything about it follows from the campaign's seed and its number.

    `seed` is what the child draws from.
    """

    number: int
    world: str
    phase: Phase
    seed: int
    visit: int
    ram_blocks: int
    delay_s: float

    @property
    def home_number(self) -> int:
        return self.number // KILLS_PER_HOME


def kills_of(plan: ChaosPlan) -> Iterator[Kill]:
    num_fake = plan.num_kills - plan.num_model_kills
    for number in range(plan.first_kill, plan.first_kill + num_fake):
        yield _kill(plan.seed, FAKE, number)
    for number in range(plan.num_model_kills):
        yield _kill(plan.seed, plan.model, number)


def _kill(campaign_seed: int, world: str, number: int) -> Kill:
    phases = list(Phase) if world == FAKE else list(MODEL_PHASES)
    turn, place = divmod(number, len(phases))
    _random(campaign_seed, world, "phases", turn).shuffle(phases)
    phase = phases[place]
    draw = _random(campaign_seed, world, "kill", number)
    visits = VISITS[phase].fake if world == FAKE else VISITS[phase].model
    return Kill(
        number,
        world,
        phase,
        seed=draw.getrandbits(32),
        visit=draw.randint(1, visits),
        ram_blocks=draw.choice((SMALL_RAM_BLOCKS, LARGE_RAM_BLOCKS)),
        delay_s=draw.random() * (0.6 if world == FAKE else 6.0),
    )


def _random(*key: object) -> random.Random:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return random.Random(digest)  # noqa: S311 - a seeded campaign, not a secret


@dataclass(slots=True)
class Tally:
    """What was found, and in words what was wrong, with what reproduces it."""

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


def run_chaos(plan: ChaosPlan, on_progress: OnProgress = no_progress) -> Report:
    """Kill, open, verify; a home in which something was wrong is kept, and the notes name it."""
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
    return Report(_figures(plan, tally), tuple(tally.notes))


def _figures(plan: ChaosPlan, tally: Tally) -> tuple[Figure, ...]:
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


@dataclass(slots=True)
class Home:
    """A folder over many kills, and what must be true of it."""

    path: Path
    world: str
    number: int
    seed: int
    tally: Tally
    disk_budget_bytes: int
    truth: dict[str, State] = field(default_factory=dict)
    pending: defaultdict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    settled: dict[str, int] = field(default_factory=dict)
    deleted: dict[str, list[int]] = field(default_factory=dict)
    limited: set[str] = field(default_factory=set)
    related: set[str] = field(default_factory=set)
    origins: dict[str, str] = field(default_factory=dict)
    is_roomy: bool = True
    is_sound: bool = True

    @classmethod
    def begin(cls, plan: ChaosPlan, kill: Kill, tally: Tally) -> "Home":
        """A new folder, with agents whose process ended as it should."""
        is_small = kill.world == FAKE and kill.home_number % 2 == 1
        home = cls(
            path=Path(tempfile.mkdtemp(prefix="keepwarm-chaos-")),
            world=kill.world,
            number=kill.home_number,
            seed=plan.seed,
            tally=tally,
            disk_budget_bytes=SMALL_DISK_BYTES if is_small else LARGE_DISK_BYTES,
        )
        num_operations = 60 if kill.world == FAKE else 4
        spec = replace(
            home._spec(kill, phase=None, visit=0, num_operations=num_operations),
            ram_blocks=LARGE_RAM_BLOCKS,
        )
        code, _, complaint = _run_child(spec, home.hear)
        if code != 0:
            tally.count(BROKEN, f"{home._where(kill)}: the first process failed: {complaint}")
        return home

    def survive(self, kill: Kill) -> None:
        """Kill once where it was planned, or somewhere else first if that place was missed."""
        for visit in (kill.visit, 1, 1):
            hit = self._kill(kill, visit)
            problems_before = self.tally.num_problems
            try:
                Verification(self, kill, self._where(kill)).run()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what was looked for
                told = "".join(traceback.format_exception(error)[-3:])
                self.tally.count(BROKEN, f"{self._where(kill)}: it cannot be verified: {told}")
            self.is_sound = self.is_sound and self.tally.num_problems == problems_before
            if hit is kill.phase:
                return
            self.tally.counts[MISSES] += 1

    def leave(self) -> None:
        if self.is_sound:
            shutil.rmtree(self.path)

    def hear(self, said: dict[str, Any]) -> None:
        """What the process to be killed says about its agents."""
        match said:
            case {"doing": _}:
                self._intend(said)
            case {"did": "turn" | "change", "agent": agent, "state": state}:
                self._put(agent, state)
                self.pending.pop(agent, None)
            case {"did": "quota", "agent": agent}:
                self.limited.add(self._origin(agent))
                self.settled = {
                    name: tokens for name, tokens in self.settled.items() if self._is_kept(name)
                }
            case {"did": "settle", "tokens": tokens} if self.is_roomy:
                self.settle(tokens)
            case {"wrong": wrong}:
                self.tally.count(WRONG, f"home {self.path}: {wrong}")
            case {"failed": failed}:
                self.tally.count(FAILED, f"home {self.path}: {failed}")

    def _intend(self, doing: dict[str, Any]) -> None:
        """Something that may have happened or not, until it is acknowledged."""
        agent = doing["agent"]
        self.pending[agent].append(doing)
        if doing["doing"] == "change" and agent in self.settled:
            num_tokens = len(doing["state"]["ids"]) if doing["state"] else 0
            self.settled[agent] = min(self.settled[agent], num_tokens)
        if "parent" in doing:
            self.related |= {agent, doing["parent"]}
            self.origins[agent] = self._origin(doing["parent"])

    def settle(self, tokens: dict[str, int]) -> None:
        """All that these agents have is written; it stays where nothing is evicted."""
        self.settled |= {name: count for name, count in tokens.items() if self._is_kept(name)}

    def _is_kept(self, agent: str) -> bool:
        """Forks have blocks that count against their parent's quota."""
        is_roomy = self.disk_budget_bytes == LARGE_DISK_BYTES
        return is_roomy and self._origin(agent) not in self.limited

    def _origin(self, agent: str) -> str:
        """The agent that this one, or the one it was forked from, began as."""
        return self.origins.get(agent, agent)

    def _put(self, agent: str, state: State | None) -> None:
        if state is not None:
            self.truth[agent] = state
            return
        before = self.truth.pop(agent, None)
        self.settled.pop(agent, None)
        self.deleted[agent] = before["ids"] if before else []

    def _kill(self, kill: Kill, visit: int) -> Phase | None:
        """Where it was hit; None where it missed its phase and was killed at its end."""
        spec = self._spec(kill, phase=kill.phase, visit=visit, num_operations=NUM_OPERATIONS)
        # Where memory is short, blocks may leave it before they are written.
        self.is_roomy = kill.ram_blocks == LARGE_RAM_BLOCKS
        delay_s = kill.delay_s if kill.phase is Phase.RANDOM else None
        code, hit, complaint = _run_child(spec, self.hear, kill_after_s=delay_s)
        if code != -9:
            self.tally.count(BROKEN, f"{self._where(kill)}: it ended with {code}: {complaint}")
            return kill.phase
        phase = kill.phase if kill.phase is Phase.RANDOM else hit
        if phase is not None:
            self.tally.hits[phase] += 1
        return phase

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
        first = kill.number - kill.number % KILLS_PER_HOME
        again = f"seed={self.seed}, first_kill={first}, num_kills={kill.number - first + 1}"
        return (
            f"kill {kill.number} of {kill.world} (its seed: {kill.seed}; ChaosPlan({again})), "
            f"phase {kill.phase.value!r}, home {self.path}"
        )


def _run_child(
    spec: ChildSpec, hear: Any, *, kill_after_s: float | None = None
) -> tuple[int, Phase | None, str]:
    """Return the exit code, the phase in which it was hit, and the end of its complaints."""
    hit: Phase | None = None
    with ChildProcess("-m", "benchmarks.chaos.child") as child:
        child.kill_after(300.0 if spec.world == FAKE else 900.0)
        child.tell(spec.to_json())
        for said in map(json.loads, child.lines()):
            if said.get("did") == "open" and kill_after_s is not None:
                child.kill_after(kill_after_s)
            hit = Phase(said["hit"]) if "hit" in said else hit
            hear(said)
        return child.wait(), hit, child.complaints()[-MAX_COMPLAINT:] or "nothing was said"


@cache
def _loaded(world: str) -> LoadedModel:
    return load_world(world)


class Verification:
    """Opens a home after a kill and compares it with what must be true."""

    def __init__(self, home: Home, kill: Kill, where: str) -> None:
        self._home = home
        self._tally = home.tally
        self._where = where
        self._loaded = _loaded(home.world)
        self._folder = home.path / "store"
        self._family = KVFamily(self._loaded.fingerprint, self._loaded.layout, CANONICAL_LINEAGE)
        self._speaker = Speaker(kill.seed + 1, NEXT_TURN, self._loaded.vocab_size)

    def run(self) -> None:
        self._look_at_files()
        store = self._open()
        try:
            engine = new_engine(self._loaded, store, LARGE_RAM_BLOCKS)
            self._compare_agents(engine)
            self._compare_replies(engine)
            self._wait_for_quiet(engine, store)
            self._look_at_health(engine, store)
        finally:
            store.close()
        self._look_at_what_is_left()

    def _count(self, what: str, note: str) -> None:
        self._tally.count(what, f"{self._where}: {what}: {note}")

    # -- as it was left --------------------------------------------------------------------------

    def _look_at_files(self) -> None:
        self._measure()
        for path in _record_files(self._folder):
            try:
                decoded = decode(memoryview(path.read_bytes()), self._family)
                if decoded.record.hash.hex() != path.stem:
                    self._count(DAMAGED, f"{path} is another record")
            except BadRecord as error:
                self._count(DAMAGED, f"{path}: {error}")
        files = [self._folder / f"{CATALOG_NAME}{suffix}" for suffix in ("", "-wal")]
        self._tally.num_torn_commits += bool(num_unfinished_frames(files[1]))
        data = b"".join(path.read_bytes() for path in files if path.exists())
        for name in self._home.deleted:
            if name.encode() in data:
                self._count(TRACES, f"the catalogue still names {name}")

    def _measure(self) -> None:
        used_bytes = sum(p.stat().st_size for p in self._folder.rglob("*") if p.is_file())
        self._tally.fullest = max(self._tally.fullest, used_bytes / self._home.disk_budget_bytes)

    # -- opened ----------------------------------------------------------------------------------

    def _open(self) -> AgentCacheStore:
        try:
            return open_store(str(self._folder), self._home.disk_budget_bytes)
        except (KeepwarmError, OSError) as error:
            self._count(UNREADABLE, repr(error))
            raise

    def _compare_agents(self, engine: BlockPoolBatchEngine) -> None:
        home = self._home
        there = {view.agent_id for view in engine.agents()}
        for name in sorted(there | home.truth.keys() | home.pending.keys()):
            actual = _state(engine, name) if name in there else None
            self._compare(name, actual)
            if actual is None:
                home.truth.pop(name, None)
                home.settled.pop(name, None)
            else:
                home.truth[name] = actual
        home.pending.clear()

    def _compare(self, name: str, actual: State | None) -> None:
        expected = self._home.truth.get(name)
        if actual == expected or any(
            self._has_happened(doing, actual) for doing in self._home.pending.get(name, ())
        ):
            return
        lost = expected is not None and (
            actual is None or len(actual["turns"]) < len(expected["turns"])
        )
        self._count(LOST if lost else HALF, f"{name}: {_brief(actual)}, not {_brief(expected)}")

    def _has_happened(self, doing: dict[str, Any], actual: State | None) -> bool:
        """Whether the agent is as it would be if what was not acknowledged was done."""
        if doing["doing"] == "change":
            return bool(doing["state"] == actual)
        prompt = doing["prompt"]
        if actual is None or len(actual["turns"]) != doing["num_turns"] + 1:
            return False
        cold = self._cold_reply(prompt, doing["max_tokens"])
        messages = doing["messages"]
        detokenizer = self._loaded.tokenizer.detokenizer()
        kept = kept_ids(cold, detokenizer, is_of_ids=messages is None)
        if actual["ids"] != [*prompt, *kept]:
            return False
        reply = {"role": "assistant", "content": cold.text}
        return messages is None or bool(actual["messages"] == [*messages, reply])

    def _compare_replies(self, engine: BlockPoolBatchEngine) -> None:
        """Every agent speaks, all at once, and says what it would say with nothing cached."""
        prompts: dict[str, tuple[str, list[int], int]] = {}
        for name, state in self._home.truth.items():
            num_reply = self._speaker.random.randint(1, NEXT_TURN.reply)
            request = self._speaker.request(name, state)
            request_id = engine.submit(agent_id=name, max_tokens=num_reply, **request)
            sequence = engine._active[request_id].sequence
            prompt_ids = list(sequence.prompt_ids)
            prompts[request_id] = (name, prompt_ids, num_reply)
        for completed in self._drain(engine):
            name, prompt_ids, num_reply = prompts[completed.request_id]
            self._compare_reply(name, completed, prompt_ids, num_reply)
            self._home.truth[name] = _state(engine, name)

    def _drain(self, engine: BlockPoolBatchEngine) -> Iterator[Completed]:
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, Failed):
                    self._count(FAILED, f"{event.agent_id}: {event.error!r}")
                if isinstance(event, Completed):
                    yield event

    def _compare_reply(
        self, name: str, completed: Completed, prompt_ids: Sequence[int], num_reply: int
    ) -> None:
        cold = self._cold_reply(prompt_ids, num_reply)
        if (completed.token_ids, completed.text) != (cold.token_ids, cold.text):
            self._count(WRONG, f"{name} says {completed.text!r}, not {cold.text!r}")
        settled = self._home.settled.get(name)
        if settled:
            recomputed = settled - 1 - completed.cache.cached_tokens
            if recomputed >= BLOCK_TOKENS:
                self._tally.notes.append(
                    f"{self._where}: {name} computed {recomputed} of {settled} tokens again: "
                    f"{completed.cache}"
                )
            self._tally.most_recomputed = max(self._tally.most_recomputed, recomputed)

    def _cold_reply(self, prompt_ids: Sequence[int], num_reply: int) -> Completed:
        """Of an engine that has nothing and keeps nothing."""
        engine = new_engine(self._loaded, None, LARGE_RAM_BLOCKS)
        engine.submit(token_ids=prompt_ids, max_tokens=num_reply)
        return next(self._drain(engine))

    # -- at rest ---------------------------------------------------------------------------------

    def _wait_for_quiet(self, engine: BlockPoolBatchEngine, store: AgentCacheStore) -> None:
        """Until all is written and catalogue and files are known to name the same records."""
        until = time.monotonic() + SETTLE_TIMEOUT_S
        while time.monotonic() < until:
            engine.step()
            health = store.health()
            num_files = sum(1 for _ in _record_files(self._folder))
            if not len(engine.tiers.saves) and health.num_records == num_files:
                return
        self._count(BROKEN, f"{num_files} files for {store.health().num_records} records")

    def _look_at_health(self, engine: BlockPoolBatchEngine, store: AgentCacheStore) -> None:
        try:
            engine.check()
        except KeepwarmError as error:
            self._count(BROKEN, repr(error))
        health = store.health()
        for _ in range(health.num_damaged):
            self._count(DAMAGED, "a record was not used")
        if health.fault is not None:
            self._count(BROKEN, f"the disk refused: {health.fault}")
        self._look_for_deleted_blocks()
        if not engine.close():
            self._count(BROKEN, f"the engine did not save everything: {store.health()}")
        self._home.settle({name: len(state["ids"]) for name, state in self._home.truth.items()})

    def _look_for_deleted_blocks(self) -> None:
        """Of agents that shared nothing, nothing is left."""
        names = {path.stem for path in _record_files(self._folder)}
        for agent, token_ids in self._home.deleted.items():
            if agent not in self._home.related:
                hashes = chain_hashes(self._family.root, token_ids)
                left = sum(block_hash.hex() in names for block_hash in hashes)
                if left:
                    self._count(TRACES, f"{left} blocks of {agent} are left")
        self._home.deleted.clear()

    def _look_at_what_is_left(self) -> None:
        self._measure()
        left = [p for part in ("tmp", "set-aside") for p in (self._folder / part).iterdir()]
        if left:
            self._count(BROKEN, f"{len(left)} files are left: {left[0]}")
        try:
            with Catalog.open(self._folder / CATALOG_NAME) as catalog:
                catalog.check()
                known = {row.hash.hex() for row in catalog.load_records()}
        except KeepwarmError as error:
            self._count(BROKEN, repr(error))
            return
        names = {path.stem for path in _record_files(self._folder)}
        if known != names:
            self._count(BROKEN, f"{len(known ^ names)} records in the catalogue or on disk only")


def _record_files(folder: Path) -> Iterator[Path]:
    return (folder / "blocks").glob("*/*.safetensors")


def _state(engine: BlockPoolBatchEngine, name: str) -> State:
    return plain_state(engine._states.state_of(engine._book.get(name)))


def _brief(state: State | None) -> str:
    if state is None:
        return "no agent"
    return f"{len(state['turns'])} turns, {len(state['ids'])} tokens"

"""A home is opened after a kill and compared with what must be true."""

import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.chaos.ledger import Ledger
from benchmarks.chaos.plan import LARGE_RAM_BLOCKS
from benchmarks.chaos.speaker import Sizes, Speaker
from benchmarks.chaos.state import State, kept_ids, state_of, submitted
from benchmarks.chaos.tally import (
    BROKEN,
    DAMAGED,
    FAILED,
    HALF,
    LOST,
    TRACES,
    UNREADABLE,
    WRONG,
    Tally,
)
from benchmarks.chaos.traps import num_unfinished_frames
from benchmarks.chaos.world import load_world, new_engine, open_store
from keepwarm.core.block import chain_hashes
from keepwarm.core.errors import KeepwarmError
from keepwarm.core.events import Completed, Failed
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.engine.parts import family_of
from keepwarm.store.agent_cache_store import AgentCacheStore
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.disk.disk_store import CATALOG_NAME
from keepwarm.store.disk.record import decode
from keepwarm.store.errors import BadRecord

SETTLE_TIMEOUT_S = 120.0
NEXT_TURN = Sizes(short=20, long=30, reply=12, agent=0, num_agents=0)

_load_once = cache(load_world)


class Verification:
    """Opens a home once, and counts in `tally` what is not as `ledger` says."""

    def __init__(
        self,
        folder: Path,
        *,
        world: str,
        disk_budget_bytes: int,
        ledger: Ledger,
        tally: Tally,
        seed: int,
        where: str,
    ) -> None:
        self._folder = folder
        self._disk_budget_bytes = disk_budget_bytes
        self._ledger = ledger
        self._tally = tally
        self._where = where
        self._loaded = _load_once(world)
        self._family = family_of(self._loaded, deterministic=True)
        self._speaker = Speaker(seed, NEXT_TURN, self._loaded.vocab_size)

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
        for name in self._ledger.deleted:
            if name.encode() in data:
                self._count(TRACES, f"the catalogue still names {name}")

    def _measure(self) -> None:
        used_bytes = sum(p.stat().st_size for p in self._folder.rglob("*") if p.is_file())
        self._tally.fullest = max(self._tally.fullest, used_bytes / self._disk_budget_bytes)

    # -- opened ----------------------------------------------------------------------------------

    def _open(self) -> AgentCacheStore:
        try:
            return open_store(str(self._folder), self._disk_budget_bytes)
        except (KeepwarmError, OSError) as error:
            self._count(UNREADABLE, repr(error))
            raise

    def _compare_agents(self, engine: BlockPoolBatchEngine) -> None:
        ledger = self._ledger
        there = {view.agent_id for view in engine.agents()}
        for name in sorted(there | ledger.truth.keys() | ledger.pending.keys()):
            actual = state_of(engine, name) if name in there else None
            self._compare(name, actual)
            ledger.find(name, actual)
        ledger.pending.clear()

    def _compare(self, name: str, actual: State | None) -> None:
        expected = self._ledger.truth.get(name)
        if actual == expected or any(
            self._has_happened(doing, actual) for doing in self._ledger.pending.get(name, ())
        ):
            return
        lost = expected is not None and (
            actual is None or len(actual["turns"]) < len(expected["turns"])
        )
        self._count(LOST if lost else HALF, f"{name}: {_brief(actual)}, not {_brief(expected)}")

    def _has_happened(self, doing: dict[str, Any], actual: State | None) -> bool:
        """Whether the agent is as an unacknowledged intention would have made it."""
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
        """Have every agent speak, all at once: each says what it would say with nothing cached."""
        prompts: dict[str, tuple[str, list[int], int]] = {}
        for name, state in self._ledger.truth.items():
            num_reply = self._speaker.random.randint(1, NEXT_TURN.reply)
            request = self._speaker.request(name, state)
            request_id = engine.submit(agent_id=name, max_tokens=num_reply, **request)
            prompt_ids, _ = submitted(engine, request_id)
            prompts[request_id] = (name, prompt_ids, num_reply)
        for completed in self._drain(engine):
            name, prompt_ids, num_reply = prompts[completed.request_id]
            self._compare_reply(name, completed, prompt_ids, num_reply)
            self._ledger.truth[name] = state_of(engine, name)

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
        settled = self._ledger.settled.get(name)
        if settled:
            recomputed = settled - 1 - completed.cache.cached_tokens
            if recomputed >= BLOCK_TOKENS:
                self._tally.notes.append(
                    f"{self._where}: {name} computed {recomputed} of {settled} tokens again: "
                    f"{completed.cache}"
                )
            self._tally.most_recomputed = max(self._tally.most_recomputed, recomputed)

    def _cold_reply(self, prompt_ids: Sequence[int], num_reply: int) -> Completed:
        """Return the reply of an engine that has nothing cached and keeps nothing."""
        engine = new_engine(self._loaded, None, LARGE_RAM_BLOCKS)
        engine.submit(token_ids=prompt_ids, max_tokens=num_reply)
        return next(self._drain(engine))

    # -- at rest ---------------------------------------------------------------------------------

    def _wait_for_quiet(self, engine: BlockPoolBatchEngine, store: AgentCacheStore) -> None:
        """Step until all is written and the catalogue and the files name the same records."""
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
        self._ledger.settle({name: len(state["ids"]) for name, state in self._ledger.truth.items()})

    def _look_for_deleted_blocks(self) -> None:
        """Check that no block is left of deleted agents that shared none."""
        names = {path.stem for path in _record_files(self._folder)}
        for agent, token_ids in self._ledger.deleted.items():
            if agent not in self._ledger.related:
                hashes = chain_hashes(self._family.root, token_ids)
                left = sum(block_hash.hex() in names for block_hash in hashes)
                if left:
                    self._count(TRACES, f"{left} blocks of {agent} are left")
        self._ledger.deleted.clear()

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


def _brief(state: State | None) -> str:
    if state is None:
        return "no agent"
    return f"{len(state['turns'])} turns, {len(state['ids'])} tokens"

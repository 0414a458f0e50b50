"""How fast an agent comes back from disk: into its slab, and to its first token."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.store.chat import temporary_home
from keepwarm.bench.lab import Lab, Turn
from keepwarm.bench.prompts import prompt_ids
from keepwarm.bench.report import Figure
from keepwarm.bench.requiring import require
from keepwarm.bench.timing import median, timed
from keepwarm.core.agent import Tier
from keepwarm.core.ports import LoadedModel
from keepwarm.store.agent_cache_store import AgentCacheStore

NEW_TOKENS = 16
MIN_RESTORE_SPEED = 0.7
MIN_SPEED_UP = 50.0


@dataclass(frozen=True, slots=True)
class _FirstTokens:
    """Seconds to the first token; `cached_s` with the records in the system's page cache."""

    prefill_s: float
    cold_s: list[float]
    cached_s: list[float]
    cached_tokens: int


def restore_figures(
    loaded: LoadedModel, *, num_tokens: int, num_repeats: int, seed: int
) -> tuple[Figure, Figure]:
    """Measure the restore and the first token after it; one prefill serves both."""
    with temporary_home() as home, AgentCacheStore(home) as store:
        lab = Lab(loaded, checked=False, store=store)
        prompt = prompt_ids(loaded.tokenizer, num_tokens, seed=seed)
        first = lab.start("ada", prompt, 1)
        lab.finish(first)
        _park(lab)
        files = sorted(home.glob("blocks/*/*.safetensors"))
        speed = _restore_speed(lab, files, num_tokens=num_tokens, num_repeats=num_repeats)
        new = prompt_ids(loaded.tokenizer, NEW_TOKENS, seed=seed + 1)
        ids = (*prompt, *lab.completed(first).token_ids, *new)
        return speed, _speed_up(_first_tokens(lab, first, files, ids, num_repeats=num_repeats))


def _restore_speed(lab: Lab, files: Sequence[Path], *, num_tokens: int, num_repeats: int) -> Figure:
    """Time the steps from the one in which the fetch begins to the one that completes the slab."""
    kv_bytes = num_tokens * lab.loaded.layout.token_bytes
    reader = PlainReader(files)
    restoring: list[float] = []
    plain: list[float] = []
    for _ in range(num_repeats + 1):
        plain.append(timed(reader.read))
        restoring.append(timed(lambda: _prefetch(lab)))
        require(lab.engine.agent("ada").slab_bytes > 0, "the agent is not hot")
        _park(lab)
    restoring_s, plain_s = median(restoring[1:]), median(plain[1:])
    restored_per_s, read_per_s = kv_bytes / restoring_s, reader.num_bytes / plain_s
    return Figure(
        f"restore of {num_tokens:,} tokens from disk, over reading the files (page cache warm)",
        restored_per_s / read_per_s,
        MIN_RESTORE_SPEED,
        at_least=True,
        facts={
            "restored_mb_per_s": restored_per_s / 1e6,
            "read_mb_per_s": read_per_s / 1e6,
            "restored_ms": 1e3 * restoring_s,
            "read_ms": 1e3 * plain_s,
            "kv_mb": kv_bytes / 1e6,
        },
    )


def _first_tokens(
    lab: Lab, first: Turn, files: Sequence[Path], ids: Sequence[int], *, num_repeats: int
) -> _FirstTokens:
    cold: list[float] = []
    cached: list[float] = []
    turn = first
    for _ in range(num_repeats):
        for times in (cold, cached):
            if times is cold:
                drop_from_page_cache(files)
            turn = lab.start("ada", ids, 1)
            lab.finish(turn)
            lab.require_reuse(turn, Tier.COLD, first.num_prompt_tokens)
            times.append(lab.completed(turn).timing.first_token_s or 0.0)
            lab.engine.rollback("ada", turn=1)
            _park(lab)
    prefill_s = lab.completed(first).timing.first_token_s or 0.0
    return _FirstTokens(prefill_s, cold, cached, lab.completed(turn).cache.cached_tokens)


def _speed_up(times: _FirstTokens) -> Figure:
    return Figure(
        f"TTFT of its prefill over that from cold disk ({NEW_TOKENS} new tokens)",
        times.prefill_s / median(times.cold_s),
        MIN_SPEED_UP,
        at_least=True,
        facts={
            "prefill_ms": 1e3 * times.prefill_s,
            "cold_ms": 1e3 * median(times.cold_s),
            "page_cache_warm_ms": 1e3 * median(times.cached_s),
            "cached_tokens": times.cached_tokens,
        },
    )


def _park(lab: Lab) -> None:
    """Put the agent out of memory altogether."""
    lab.engine.park("ada")
    lab.settle()
    require(lab.engine.agent("ada").tier is Tier.COLD, "the agent is still in memory")


def _prefetch(lab: Lab) -> None:
    lab.engine.prefetch("ada")
    while lab.engine.has_work:
        lab.step()


class PlainReader:
    """Reads files into memory of their total size that was touched before."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self.num_bytes = sum(file.stat().st_size for file in files)
        self._memory = memoryview(bytearray(b"\1") * self.num_bytes)

    def read(self) -> None:
        position = 0
        for file in self._files:
            for part in _parts(file, self._memory[position:]):
                position += part
        require(position == self.num_bytes, f"{position:,} of {self.num_bytes:,} bytes were read")


def _parts(file: Path, memory: memoryview) -> Iterator[int]:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        position = 0
        while num_read := os.readv(descriptor, [memory[position:]]):
            position += num_read
            yield num_read
    finally:
        os.close(descriptor)


def drop_from_page_cache(files: Sequence[Path]) -> bool:
    """Have the system forget what it keeps of these files. Whether it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True

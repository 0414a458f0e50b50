"""KV that is brought into slabs before anybody asks for it: from the disk, or computed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from keepwarm.core.sequence import TokenSequence, prefetch_sequence
from keepwarm.engine.agents.agent import Line
from keepwarm.kv.batch import Batch
from keepwarm.kv.outcomes import Broken, Outcome, Restored
from keepwarm.kv.tiers import Tiers


@dataclass(frozen=True, slots=True)
class _Prefetch:
    line: Line
    sequence: TokenSequence
    last_used: int


class Prefetcher:
    """Owns the lines that are in the batch though no request runs on them.

    Called off, or when it fails, a prefetch has cost nothing but time: what is there by then stays.
    Belongs to the engine's thread.
    """

    def __init__(self, batch: Batch, tiers: Tiers, ids: Iterator[int]) -> None:
        self._batch = batch
        self._tiers = tiers
        self._ids = ids
        self._running: dict[str, _Prefetch] = {}

    def __repr__(self) -> str:
        return f"Prefetcher({list(self._running)})"

    def __bool__(self) -> bool:
        return bool(self._running)

    @property
    def is_computing(self) -> bool:
        return any(prefetch.sequence.may_compute for prefetch in self._running.values())

    def begin(self, line: Line, token_ids: Sequence[int], *, may_compute: bool = False) -> bool:
        """Begin to bring in KV of all these ids but the last. False when there is nothing to do."""
        sequence = prefetch_sequence(
            next(self._ids),
            line.blocks,
            token_ids,
            known_ids=line.transcript.token_ids,
            may_compute=may_compute,
        )
        if sequence is None:
            return False
        self._running[sequence.request_id] = _Prefetch(line, sequence, line.blocks.last_used)
        self._batch.enqueue(sequence)
        return True

    def cancel(self, reason: str, agent_id: str | None = None) -> bool:
        """End all of them, or this agent's. Returns whether there was one."""
        running = list(self._running.values())
        return self._cancel([p for p in running if agent_id in (None, p.sequence.agent_id)])

    def cancel_computing(self) -> None:
        """End those that compute; what is only restored goes on."""
        self._cancel([p for p in self._running.values() if p.sequence.may_compute])

    def _cancel(self, prefetches: list[_Prefetch]) -> bool:
        for prefetch in prefetches:
            self._batch.leave(prefetch.sequence)
            self._end(prefetch)
        return bool(prefetches)

    def take(self, outcome: Outcome) -> None:
        """Take what a step did for a prefetch: brought it on, completed or broke it."""
        prefetch = self._running.get(outcome.sequence.request_id)
        if prefetch is not None and isinstance(outcome, Restored | Broken):
            self._end(prefetch)

    def _end(self, prefetch: _Prefetch) -> None:
        del self._running[prefetch.sequence.request_id]
        if prefetch.sequence.may_compute:
            # No request asked for it: where memory is short it goes as early as without it.
            self._tiers.touch(prefetch.line.blocks, as_of=prefetch.last_used)

"""Keepwarm's ways of computing as sides of the benchmark: a generator, called without an engine."""

from collections.abc import Sequence

from keepwarm.bench.timing import timed
from keepwarm.core.ports import GREEDY, BatchGenerator, Draw, RowId, RowInput, Slab

CHUNK_TOKENS = 512
BLOCK_TOKENS = 256
ROOM_TOKENS = 128
"""What a slab holds beyond its prompt, for decode steps."""


class OwnSide:
    """A generator, and the slabs of the prompts that it has computed."""

    def __init__(self, name: str, generator: BatchGenerator) -> None:
        self.name = name
        self._generator = generator
        self._slabs: dict[tuple[int, ...], list[Slab]] = {}

    def prefill_s(self, prompt: Sequence[int]) -> float:
        """Return the seconds from nothing to the first token."""
        slab = self._generator.new_slab(_capacity(len(prompt)))
        row = RowId(0)
        self._generator.open_row(row, slab)  # touches its memory

        def first_token() -> None:
            self._feed(row, prompt[:-1])
            self._generator.step([_decoding(row, prompt[-1])])

        seconds = timed(first_token)
        self._generator.close_row(row)
        return seconds

    def decode_s(self, prompts: Sequence[Sequence[int]], num_steps: int) -> float:
        """Return the seconds of a step in which each prompt gets its next token."""
        rows = [RowId(number) for number in range(len(prompts))]
        slabs = self._ready_slabs(prompts)
        for row, slab in zip(rows, slabs, strict=True):
            self._generator.open_row(row, slab)
        inputs = [_decoding(row, prompt[-1]) for row, prompt in zip(rows, prompts, strict=True)]

        def steps() -> None:
            for _ in range(num_steps):
                self._generator.step(inputs)

        seconds = timed(steps) / num_steps
        for row, prompt in zip(rows, prompts, strict=True):
            self._generator.trim(self._generator.close_row(row), len(prompt) - 1)
        return seconds

    def forget(self) -> None:
        """Free the slabs."""
        self._slabs.clear()

    def _ready_slabs(self, prompts: Sequence[Sequence[int]]) -> list[Slab]:
        """Return the prompts' slabs, computed but for the last token; each slab is used once."""
        seen: dict[tuple[int, ...], int] = {}
        slabs: list[Slab] = []
        for prompt in map(tuple, prompts):
            number = seen[prompt] = seen.get(prompt, -1) + 1
            ready = self._slabs.setdefault(prompt, [])
            if number == len(ready):
                ready.append(self._computed(prompt))
            slabs.append(ready[number])
        return slabs

    def _computed(self, prompt: Sequence[int]) -> Slab:
        slab = self._generator.new_slab(_capacity(len(prompt) + ROOM_TOKENS))
        row = RowId(0)
        self._generator.open_row(row, slab)
        self._feed(row, prompt[:-1])
        return self._generator.close_row(row)

    def _feed(self, row: RowId, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), CHUNK_TOKENS):
            self._generator.step([RowInput(row, ids[start : start + CHUNK_TOKENS])])


def _decoding(row: RowId, token_id: int) -> RowInput:
    return RowInput(row, (token_id,), (Draw(GREEDY, 0),))


def _capacity(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS

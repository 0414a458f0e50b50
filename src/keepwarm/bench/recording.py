"""A generator that records logits and KV, and whose replies can be given by a script."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from keepwarm.core.layout import CacheLayout
from keepwarm.core.ports import Draw, Payload, RowId, RowInput, Slab
from keepwarm.mlx_backend.compute.payload import KVPayload, RawArray
from keepwarm.mlx_backend.compute.row_batch import RowBatchGenerator
from keepwarm.mlx_backend.compute.slab import RowSlab

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """One reply: its tokens, the logits that each was chosen from, and the KV at its end.

    `logits` is (tokens, vocabulary). `kv` holds raw bits, (heads, positions, dim) for the keys and
    the values of each layer; the last token has been chosen and not fed.
    """

    num_prompt_tokens: int
    tokens: tuple[int, ...]
    logits: Logits
    kv: tuple[RawArray, ...]
    text: str = ""


def choose_token(logits: Logits, forbidden: Collection[int]) -> int:
    """Return the best token that is not forbidden: ends of text are, so that replies have one
    length.
    """
    allowed = logits.copy()
    allowed[list(forbidden)] = -np.inf
    return int(allowed.argmax())


def raw_kv(payload: Payload) -> tuple[RawArray, ...]:
    return cast("KVPayload", payload).arrays


class Recorder:
    """Chooses tokens, by script or greedily, and keeps what the requests' rows went through.

    A request is known by the seed of its sampling settings.
    """

    def __init__(self, forbidden: Collection[int]) -> None:
        self.forbidden = forbidden
        self.widest_batch = 0
        self.num_draws: dict[int, int] = {}
        self.slabs: dict[int, RowSlab] = {}
        self._scripts: dict[int, Sequence[int]] = {}
        self._kept: dict[int, list[Logits]] = {}
        self._kv: dict[int, tuple[RawArray, ...]] = {}
        self._mask: mx.array | None = None
        self._seeds = itertools.count(1)

    def register(self, *, script: Sequence[int] | None, keep: bool) -> int:
        """Return a seed for a request; `script` fixes its reply, `keep` records it."""
        seed = next(self._seeds)
        self.num_draws[seed] = 0
        if script is not None:
            self._scripts[seed] = script
        if keep:
            self._kept[seed] = []
        return seed

    def __call__(self, logits: mx.array, draws: Sequence[Draw]) -> mx.array:
        self.widest_batch = max(self.widest_batch, len(draws))
        if not any(self._is_watched(draw.sampling.seed) for draw in draws):
            return self._choose_unwatched(logits, draws)
        rows: Logits = np.array(logits.astype(mx.float32))
        return mx.array([self._choose(draw, row) for draw, row in zip(draws, rows, strict=True)])

    def close_row(self, seed: int, generator: RowBatchGenerator, slab: RowSlab) -> None:
        """Note that the request's row left the batch with this slab."""
        self.slabs[seed] = slab
        if seed in self._kept:
            self._kv[seed] = raw_kv(generator.extract(slab, 0, slab.num_tokens))

    def recording(
        self, seed: int, *, num_prompt_tokens: int, tokens: tuple[int, ...], text: str
    ) -> Recording:
        """Return what was kept of the request, and forget it."""
        return Recording(
            num_prompt_tokens=num_prompt_tokens,
            tokens=tokens,
            logits=np.stack(self._kept.pop(seed)),
            kv=self._kv.pop(seed),
            text=text,
        )

    def _is_watched(self, seed: int) -> bool:
        return seed in self._kept or seed in self._scripts

    def _choose_unwatched(self, logits: mx.array, draws: Sequence[Draw]) -> mx.array:
        """Choose lazily, as the engine's own sampler does, so that speed can be measured."""
        for draw in draws:
            self.num_draws[draw.sampling.seed] += 1
        if self._mask is None:
            allowed = np.zeros(logits.shape[-1], np.float32)
            allowed[list(self.forbidden)] = -np.inf
            self._mask = mx.array(allowed)
        return mx.argmax(logits + self._mask, axis=-1)

    def _choose(self, draw: Draw, row: Logits) -> int:
        seed = draw.sampling.seed
        self.num_draws[seed] += 1
        if seed in self._kept:
            self._kept[seed].append(row.copy())
        script = self._scripts.get(seed)
        return choose_token(row, self.forbidden) if script is None else script[draw.index]


class RecordingGenerator(RowBatchGenerator):
    """The real generator with a recorder in place of its sampler."""

    def __init__(
        self, model: nn.Module, layout: CacheLayout, *, deterministic: bool, recorder: Recorder
    ) -> None:
        super().__init__(model, layout, deterministic=deterministic, sampler=recorder)
        self._recorder = recorder
        self._seeds: dict[RowId, int] = {}

    def step(self, inputs: Sequence[RowInput]) -> list[list[int]]:
        self._seeds.update((item.row, draw.sampling.seed) for item in inputs for draw in item.draws)
        return super().step(inputs)

    def close_row(self, row: RowId) -> Slab:
        slab = super().close_row(row)
        seed = self._seeds.pop(row, None)
        if seed is not None and isinstance(slab, RowSlab):
            self._recorder.close_row(seed, self, slab)
        return slab

"""A generator that records logits and KV, and whose replies can be given by a script."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from keepwarm.core.ports import BatchGenerator, Draw, LoadedModel, Payload, RowId, RowInput, Slab
from keepwarm.mlx_backend.compute.payload import KVPayload, RawArray

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
        self.slabs: dict[int, Slab] = {}
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

    def __call__(self, logits: Any, draws: Sequence[Draw]) -> Any:
        """Choose from logits (draws, vocabulary) of MLX or of the native step, in their form."""
        self.widest_batch = max(self.widest_batch, len(draws))
        is_native = isinstance(logits, np.ndarray)
        if not is_native and not any(self._is_watched(draw.sampling.seed) for draw in draws):
            return self._choose_unwatched(logits, draws)
        rows: Logits = logits if is_native else np.array(logits.astype(mx.float32))
        tokens = [self._choose(draw, row) for draw, row in zip(draws, rows, strict=True)]
        return tokens if is_native else mx.array(tokens)

    def close_row(self, seed: int, generator: BatchGenerator, slab: Slab) -> None:
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


class RecordingGenerator:
    """The model's own generator with a recorder in place of its sampler."""

    def __init__(self, generator: BatchGenerator, recorder: Recorder) -> None:
        self._generator = generator
        self._recorder = recorder
        self._seeds: dict[RowId, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def step(self, inputs: Sequence[RowInput]) -> list[list[int]]:
        self._seeds.update((item.row, draw.sampling.seed) for item in inputs for draw in item.draws)
        return self._generator.step(inputs)

    def close_row(self, row: RowId) -> Slab:
        slab = self._generator.close_row(row)
        seed = self._seeds.pop(row, None)
        if seed is not None:
            self._recorder.close_row(seed, self._generator, slab)
        return slab


def recording_generator(
    loaded: LoadedModel, recorder: Recorder, *, deterministic: bool
) -> BatchGenerator:
    """Make a generator by the model's own factory; MLX's and the native one take a sampler."""
    factory = cast("Any", loaded.batch_gen_factory)
    generator = factory(deterministic=deterministic, sampler=recorder)
    return cast("BatchGenerator", RecordingGenerator(generator, recorder))

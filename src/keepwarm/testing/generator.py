"""A generator without tensors, whose tokens depend on every id before them."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import CacheLayout, LayerLayout
from keepwarm.core.ports import Draw, Payload, RowId, RowInput, Slab, check_rows

FAKE_LAYOUT = CacheLayout(
    layers=(LayerLayout(num_kv_heads=1, key_dim=1, value_dim=1),), dtype="float32"
)

_MODULUS = (1 << 61) - 1


def kv_of(previous: int, token_id: int) -> int:
    """Return the fake KV of a token: it depends on the token and, through `previous`, on its
    prefix.
    """
    return (previous * 1_000_003 + token_id + 1) % _MODULUS


@dataclass(slots=True, eq=False)
class FakePayload:
    """The fake KV of a run of tokens, an integer each; it is a copy, as the port demands."""

    values: tuple[int, ...]
    token_bytes: int

    @property
    def num_tokens(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return len(self.values) * self.token_bytes


@dataclass(slots=True, eq=False)
class FakeSlab:
    """A slab of fake KV that knows the row it is in, and whether it was dismantled."""

    capacity_tokens: int
    token_bytes: int
    values: list[int] = field(default_factory=list)
    row: RowId | None = None
    is_gone: bool = False
    num_ready_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.capacity_tokens * self.token_bytes

    @property
    def is_ready(self) -> bool:
        return self.num_ready_tokens >= self.capacity_tokens


class GeneratorFault(RuntimeError):
    """What the fake raises where `fail_at` tells it to fail."""


class FakeBatchGenerator:
    """Implements `BatchGenerator` over integers, strictly: misuse raises InvariantBroken.

    Promises that the next token is a function of the KV of all tokens so far, so that a wrong,
    stale or missing piece of cache changes the reply. `script` fixes replies instead: a row's draw
    n gives script[n]. `fail_at` holds the ordinals, from 1, of the steps that raise GeneratorFault
    half-way.

    Records what it was asked to do: `num_calls` (steps), `num_copied_tokens`, `prefilled` (row and
    number of tokens of each chunk) and `batch_sizes` (sampling rows of each step that had any).
    """

    def __init__(
        self,
        *,
        layout: CacheLayout = FAKE_LAYOUT,
        vocab_size: int = 256,
        script: Sequence[int] | None = None,
        fail_at: Sequence[int] = (),
        deterministic: bool = False,
        least_chunk_tokens: int = 1,
    ) -> None:
        self.deterministic = deterministic
        self.least_chunk_tokens = least_chunk_tokens
        self._layout = layout
        self._vocab_size = vocab_size
        self._script = script
        self._fail_at = set(fail_at)
        self._rows: dict[RowId, FakeSlab] = {}
        self._has_model = True
        self.num_calls = 0
        self.num_copied_tokens = 0
        self.prefilled: list[tuple[RowId, int]] = []
        self.batch_sizes: list[int] = []

    def slab_bytes(self, capacity_tokens: int) -> int:
        return self._layout.slab_bytes(capacity_tokens)

    def new_slab(self, capacity_tokens: int) -> Slab:
        return FakeSlab(capacity_tokens, self._layout.token_bytes)

    def prepare(self, slab: Slab, max_bytes: float) -> None:
        outside = self._outside(slab)
        num_tokens = max(min(max_bytes / outside.token_bytes, outside.capacity_tokens), 1)
        outside.num_ready_tokens += int(num_tokens)

    def grow_slab(self, slab: Slab, capacity_tokens: int) -> Slab:
        old = self._outside(slab)
        if capacity_tokens < old.capacity_tokens:
            raise InvariantBroken("a slab was grown to less than it had")
        self.num_copied_tokens += old.num_tokens
        old.is_gone = True
        return FakeSlab(
            capacity_tokens, old.token_bytes, old.values, num_ready_tokens=capacity_tokens
        )

    def trim(self, slab: Slab, num_tokens: int) -> None:
        outside = self._outside(slab)
        if num_tokens > outside.num_tokens:
            raise InvariantBroken("a slab was trimmed to more than it holds")
        del outside.values[num_tokens:]

    def extract(self, slab: Slab, start: int, stop: int) -> Payload:
        source = self._fake(slab)
        if not 0 <= start <= stop <= source.num_tokens:
            raise InvariantBroken(f"[{start}, {stop}) is not within {source.num_tokens} tokens")
        self.num_copied_tokens += stop - start
        return FakePayload(tuple(source.values[start:stop]), source.token_bytes)

    def dismantle(self, slab: Slab, spans: Sequence[tuple[int, int]]) -> list[Payload]:
        payloads = [self.extract(slab, start, stop) for start, stop in spans]
        self._outside(slab).is_gone = True
        return payloads

    def reconstruct(self, slab: Slab, payloads: Sequence[Payload]) -> None:
        target = self._outside(slab)
        for payload in map(_own_payload, payloads):
            self._append(target, payload.values)
            self.num_copied_tokens += payload.num_tokens

    def copy_span(self, source: Slab, target: Slab, start: int, stop: int) -> None:
        payload = self.extract(source, start, stop)
        if target.num_tokens != start:
            raise InvariantBroken(f"a span from {start} was copied behind {target.num_tokens}")
        self.reconstruct(target, [payload])
        self.num_copied_tokens -= stop - start

    def cut(self, payload: Payload, start: int, stop: int) -> Payload:
        own = _own_payload(payload)
        if not start <= stop <= own.num_tokens:
            raise InvariantBroken(f"[{start}, {stop}) cannot be cut from {own!r}")
        return FakePayload(own.values[start:stop], own.token_bytes)

    def pack(self, payload: Payload) -> tuple[memoryview, ...]:
        data = memoryview(array("Q", _own_payload(payload).values).tobytes())
        tensors = self._layout.tensors(payload.num_tokens)
        ends = list(accumulate(tensor.nbytes for tensor in tensors))
        return tuple(data[start:end] for start, end in pairwise([0, *ends]))

    def unpack(self, num_tokens: int, data: memoryview) -> Payload:
        values = tuple(array("Q", bytes(data)))
        if len(values) != num_tokens:
            raise InvariantBroken(f"{data.nbytes} bytes are no payload of {num_tokens} tokens")
        return FakePayload(values, self._layout.token_bytes)

    def largest_difference(self, a: Payload, b: Payload) -> float:
        if a.num_tokens != b.num_tokens:
            raise InvariantBroken(f"{a.num_tokens} tokens were compared with {b.num_tokens}")
        pairs = zip(_own_payload(a).values, _own_payload(b).values, strict=True)
        return float(max((abs(x - y) for x, y in pairs), default=0))

    def open_row(self, row: RowId, slab: Slab) -> None:
        outside = self._outside(slab)
        if row in self._rows:
            raise InvariantBroken(f"row {row} is open already")
        outside.row = row
        self._rows[row] = outside

    def close_row(self, row: RowId) -> Slab:
        slab = self._row(row)
        del self._rows[row]
        slab.row = None
        return slab

    def step(self, inputs: Sequence[RowInput]) -> list[list[int]]:
        check_rows(inputs)
        half = len(inputs) // 2
        self._feed_all(inputs[:half])
        self._count_call()
        self._feed_all(inputs[half:])
        self.prefilled += [(item.row, len(item.token_ids)) for item in inputs if not item.draws]
        if num_sampling := sum(bool(item.draws) for item in inputs):
            self.batch_sizes.append(num_sampling)
        return [self._sample_all(item) for item in inputs]

    def release_model(self) -> None:
        if self._rows:
            raise InvariantBroken(f"rows {list(self._rows)} are open, and the model was to go")
        self._has_model = False

    def _sample_all(self, item: RowInput) -> list[int]:
        """Sample a token behind each of the last ids that has a draw."""
        if not item.draws:
            return []
        states = self._rows[item.row].values[-len(item.draws) :]
        return [self._sample(*pair) for pair in zip(states, item.draws, strict=True)]

    def _sample(self, state: int, draw: Draw) -> int:
        if self._script is not None:
            return self._script[draw.index % len(self._script)]
        if draw.sampling.temperature > 0.0:
            state = kv_of(kv_of(state, draw.sampling.seed), draw.index)
        return (state >> 7) % self._vocab_size

    def _feed_all(self, inputs: Sequence[RowInput]) -> None:
        for item in inputs:
            self._feed(self._row(item.row), item.token_ids)

    def _feed(self, slab: FakeSlab, token_ids: Sequence[int]) -> None:
        values: list[int] = []
        previous = slab.values[-1] if slab.values else 0
        for token_id in token_ids:
            previous = kv_of(previous, token_id)
            values.append(previous)
        self._append(slab, values)

    def _append(self, slab: FakeSlab, values: Sequence[int]) -> None:
        if slab.num_tokens + len(values) > slab.capacity_tokens:
            raise InvariantBroken(f"{slab.num_tokens + len(values)} tokens overflow {slab!r}")
        slab.values.extend(values)

    def _count_call(self) -> None:
        if not self._has_model:
            raise InvariantBroken("a row computes after the weights were released")
        self.num_calls += 1
        if self.num_calls in self._fail_at:
            raise GeneratorFault(f"call {self.num_calls} was told to fail")

    def _row(self, row: RowId) -> FakeSlab:
        slab = self._rows.get(row)
        if slab is None:
            raise InvariantBroken(f"row {row} is not open")
        return slab

    def _outside(self, slab: Slab) -> FakeSlab:
        fake = self._fake(slab)
        if fake.row is not None:
            raise InvariantBroken(f"the slab of row {fake.row} was touched while the row is open")
        return fake

    def _fake(self, slab: Slab) -> FakeSlab:
        if not isinstance(slab, FakeSlab) or slab.is_gone:
            raise InvariantBroken(f"{slab!r} is not a live slab of this generator")
        return slab


def _own_payload(payload: Payload) -> FakePayload:
    if not isinstance(payload, FakePayload):
        raise InvariantBroken(f"{payload!r} is no payload of this generator")
    return payload

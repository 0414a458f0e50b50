"""Products with every format of weights, against numpy; and rows with equal bits in any batch."""

import numpy as np
import pytest
from numpy.typing import NDArray

from keepwarm.native.library import Library, NativeError, Threads
from keepwarm.native.structures import Kind, Scale, Weight
from native_steps import require_native

AFFINE = [(bits, group, scale) for bits in (4, 8) for group in (32, 64) for scale in Scale]
PLAIN = [Kind.FLOAT32, Kind.FLOAT16, Kind.BFLOAT16]
SHAPES = [(32, 64), (96, 576), (320, 192), (1536, 64)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 17, 31, 33, 64, 129]

Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def native() -> Library:
    return require_native()


@pytest.fixture(scope="module", params=[1, 2, 3])
def threads(request: pytest.FixtureRequest, native: Library) -> Threads:
    return Threads(native, request.param)


def aligned(nbytes: int) -> NDArray[np.uint8]:
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes]


def to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    """Cut the lower half off."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Packed:
    """A packed weight, and its values as numpy knows them."""

    def __init__(
        self,
        native: Library,
        kind: Kind,
        arrays: list[NDArray[np.generic]],
        values: Floats,
        *,
        group: int = 32,
        scale: Scale = Scale.FLOAT16,
    ) -> None:
        num_outputs, num_inputs = values.shape
        self.values = values
        self._memory = aligned(native.packed_bytes(kind, group, num_outputs, num_inputs))
        native.pack(kind, group, num_inputs, arrays, self._memory)
        self.weight = Weight(
            kind, group, scale, num_outputs, num_inputs, self._memory.ctypes.data, None
        )


def affine(
    native: Library,
    random: np.random.Generator,
    bits: int,
    group: int,
    scale: Scale,
    shape: tuple[int, int],
) -> Packed:
    codes = random.integers(0, 1 << bits, shape, np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    words = (codes.reshape(shape[0], -1, 32 // bits) << shifts).sum(axis=-1, dtype=np.uint32)
    num_groups = shape[1] // group
    pairs = random.normal(size=(2, shape[0], num_groups)).astype(np.float32) * 0.05
    if scale is Scale.FLOAT16:
        raw = pairs.astype(np.float16)
        kept, halves = raw.astype(np.float32), raw.view(np.uint16)
    else:
        halves = to_bfloat16(pairs)
        kept = from_bfloat16(halves)
    spread = np.repeat(kept, group, axis=-1)
    kind = Kind.AFFINE4 if bits == 4 else Kind.AFFINE8
    values = codes * spread[0] + spread[1]
    return Packed(
        native,
        kind,
        [words, halves[0], halves[1]],
        values.astype(np.float32),
        group=group,
        scale=scale,
    )


def plain(
    native: Library, random: np.random.Generator, kind: Kind, shape: tuple[int, int]
) -> Packed:
    values = random.normal(size=shape).astype(np.float32)
    if kind is Kind.FLOAT32:
        return Packed(native, kind, [values], values)
    if kind is Kind.FLOAT16:
        halves = values.astype(np.float16)
        return Packed(native, kind, [halves.view(np.uint16)], halves.astype(np.float32))
    bits = to_bfloat16(values)
    return Packed(native, kind, [bits], from_bfloat16(bits))


def packed_weights(native: Library, random: np.random.Generator) -> "list[Packed]":
    weights = [affine(native, random, *form, shape) for form in AFFINE for shape in SHAPES]
    return weights + [plain(native, random, kind, shape) for kind in PLAIN for shape in SHAPES]


@pytest.fixture(scope="module")
def weights(native: Library) -> list[Packed]:
    return packed_weights(native, np.random.default_rng(13))


@pytest.mark.parametrize("num_rows", ROWS)
def test_products_are_numpys(threads: Threads, weights: list[Packed], num_rows: int) -> None:
    random = np.random.default_rng(num_rows)
    for packed in weights:
        x = random.normal(size=(num_rows, packed.values.shape[1])).astype(np.float32)
        exact = x.astype(np.float64) @ packed.values.astype(np.float64).T
        size = np.abs(x).astype(np.float64) @ np.abs(packed.values).astype(np.float64).T

        assert np.abs(threads.product(packed.weight, x) - exact).max() <= (1e-5 * size).max()


def test_a_row_has_the_same_bits_in_any_batch(threads: Threads, weights: list[Packed]) -> None:
    random = np.random.default_rng(7)
    for packed in weights:
        x = random.normal(size=(129, packed.values.shape[1])).astype(np.float32)
        whole = threads.product(packed.weight, x)
        for num_rows in ROWS:
            start = int(random.integers(0, 129 - num_rows + 1))
            part = threads.product(packed.weight, x[start : start + num_rows])
            assert np.array_equal(part, whole[start : start + num_rows]), (
                packed.weight.kind,
                num_rows,
            )


def test_the_number_of_threads_changes_no_bit(native: Library, weights: list[Packed]) -> None:
    one, three = Threads(native, 1), Threads(native, 3)
    random = np.random.default_rng(3)
    for packed in weights:
        for num_rows in (1, 5, 64):
            x = random.normal(size=(num_rows, packed.values.shape[1])).astype(np.float32)
            assert np.array_equal(one.product(packed.weight, x), three.product(packed.weight, x))


@pytest.mark.parametrize(
    ("kind", "group", "num_outputs", "num_inputs"),
    [
        (Kind.AFFINE4, 32, 31, 64),
        (Kind.AFFINE4, 32, 0, 64),
        (Kind.AFFINE4, 64, 32, 96),
        (Kind.AFFINE4, 128, 32, 128),
        (Kind.AFFINE8, 0, 32, 64),
        (Kind.FLOAT32, 32, 32, 63),
        (Kind.FLOAT32, 32, -32, 64),
        (9, 32, 32, 64),
    ],
)
def test_shapes_that_cannot_be_packed_are_refused(
    native: Library, kind: Kind, group: int, num_outputs: int, num_inputs: int
) -> None:
    with pytest.raises(NativeError, match="shapes"):
        native.packed_bytes(kind, group, num_outputs, num_inputs)

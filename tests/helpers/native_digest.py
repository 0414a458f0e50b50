"""A digest of the bits that the loaded build of the native step computes, for comparing builds."""

import hashlib

import numpy as np

from keepwarm.native.library import Library, Threads, library
from keepwarm.native.structures import Kind, Scale, Weight


def digest() -> str:
    """Multiply random weights of every kind with random rows, and hash the results."""
    native = library()
    if not isinstance(native, Library):
        raise RuntimeError(native.reason)
    threads, random = Threads(native, 2), np.random.default_rng(5)
    found = hashlib.sha256()
    for kind, scale in ((kind, scale) for kind in Kind for scale in Scale):
        for num_rows in (1, 3, 16, 70):
            found.update(_product(native, threads, random, kind, scale, num_rows).tobytes())
    return found.hexdigest()


def _product(
    native: Library,
    threads: Threads,
    random: np.random.Generator,
    kind: Kind,
    scale: Scale,
    num_rows: int,
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    num_outputs, num_inputs = 96, 192
    bits = {Kind.AFFINE4: 4, Kind.AFFINE8: 8, Kind.FLOAT32: 32}.get(kind, 16)
    # Bytes below 0x3c make small positive numbers of any of the formats.
    words = random.integers(0, 0x3C, (num_outputs, num_inputs * bits // 8), np.uint8)
    pairs = random.integers(0x2000, 0x2FFF, (2, num_outputs, num_inputs // 32), np.uint16)
    arrays = [words, *pairs] if kind in (Kind.AFFINE4, Kind.AFFINE8) else [words]
    memory = np.empty(native.packed_bytes(kind, 32, num_outputs, num_inputs) + 64, np.uint8)
    packed = memory[-memory.ctypes.data % 64 :]
    native.pack(kind, 32, num_inputs, arrays, packed)
    weight = Weight(kind, 32, scale, num_outputs, num_inputs, packed.ctypes.data, None)
    return threads.product(weight, random.normal(size=(num_rows, num_inputs)).astype(np.float32))

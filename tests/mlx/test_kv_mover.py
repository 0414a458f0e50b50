"""The two ways of copying KV between slabs and the host: the same bits, in every type."""

import mlx.core as mx
import numpy as np
import pytest

from keepwarm.core.layout import CacheLayout, LayerLayout
from keepwarm.mlx_backend.compute.kv_copies import DeviceCopies, HostCopies, KVCopies
from keepwarm.mlx_backend.compute.kv_mover import KVMover
from keepwarm.mlx_backend.compute.slab import RowSlab

DTYPES = ["float32", "float16", "bfloat16"]


def layout(dtype: str) -> CacheLayout:
    layer = LayerLayout(num_kv_heads=2, key_dim=8, value_dim=4)
    return CacheLayout(layers=(layer, layer), dtype=dtype)


def noise(slab: RowSlab, num_tokens: int, dtype: str) -> None:
    """Fill the first tokens with values that use every bit of the mantissa."""
    for index, cache in enumerate(slab.layers):
        for array in (cache.keys, cache.values):
            heads, dim = array.shape[1], array.shape[3]
            key = mx.random.key(index)
            part = mx.random.normal((1, heads, num_tokens, dim), key=key).astype(array.dtype)
            array[..., :num_tokens, :] = part
    slab.set_num_tokens(num_tokens)
    mx.eval(slab.arrays())


def arrays(kind: type[HostCopies] | type[DeviceCopies], dtype: str) -> KVMover:
    copies: KVCopies = kind(layout(dtype))
    return KVMover(copies)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_read_the_same_bits(dtype: str) -> None:
    slab = RowSlab(layout(dtype), 512, 512)
    noise(slab, 300, dtype)
    host = arrays(HostCopies, dtype).extract(slab, 7, 290)
    device = arrays(DeviceCopies, dtype).extract(slab, 7, 290)
    for one, other in zip(host.arrays, device.arrays, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
        assert np.count_nonzero(one) > one.size * 0.9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reader", [HostCopies, DeviceCopies])
@pytest.mark.parametrize("writer", [HostCopies, DeviceCopies])
def test_what_one_way_wrote_the_other_reads(
    dtype: str,
    reader: type[HostCopies] | type[DeviceCopies],
    writer: type[HostCopies] | type[DeviceCopies],
) -> None:
    slab, target = RowSlab(layout(dtype), 512, 512), RowSlab(layout(dtype), 512, 512)
    noise(slab, 300, dtype)
    first = arrays(HostCopies, dtype)
    payloads = [first.extract(slab, *span) for span in ((0, 256), (256, 300))]
    arrays(writer, dtype).reconstruct(target, payloads)
    back = arrays(reader, dtype).extract(target, 0, 300)
    for one, other in zip(back.arrays, first.extract(slab, 0, 300).arrays, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_payload_has_the_bytes_that_the_layout_says(dtype: str) -> None:
    slab = RowSlab(layout(dtype), 256, 256)
    noise(slab, 100, dtype)
    payload = arrays(HostCopies, dtype).extract(slab, 0, 100)
    assert payload.nbytes == 100 * layout(dtype).token_bytes


@pytest.mark.parametrize("kind", [HostCopies, DeviceCopies])
def test_a_payload_does_not_see_later_writes(kind: type[HostCopies] | type[DeviceCopies]) -> None:
    slab = RowSlab(layout("float32"), 256, 256)
    noise(slab, 100, "float32")
    payload = arrays(kind, "float32").extract(slab, 0, 100)
    before = [array.copy() for array in payload.arrays]
    for cache in slab.layers:
        cache.keys[..., :100, :] = mx.zeros((1, 2, 100, 8))
        cache.values[..., :100, :] = mx.zeros((1, 2, 100, 4))
    mx.eval(slab.arrays())
    for one, other in zip(payload.arrays, before, strict=True):
        assert np.array_equal(one, other)


def test_a_write_that_fills_the_whole_slab_leaves_it_readable() -> None:
    slab = RowSlab(layout("float32"), 256, 256)
    for cache in slab.layers:
        keys = mx.random.normal((1, 256, 2, 8)).transpose(0, 2, 1, 3)
        values = mx.random.normal((1, 256, 2, 4)).transpose(0, 2, 1, 3)
        cache.append(keys, values)
    mx.eval(slab.arrays())
    host = arrays(HostCopies, "float32").extract(slab, 0, 256)
    device = arrays(DeviceCopies, "float32").extract(slab, 0, 256)
    for one, other in zip(host.arrays, device.arrays, strict=True):
        assert np.array_equal(one, other)

"""How far two payloads differ, in numbers of their own type."""

import numpy as np
import pytest

from keepwarm.core.layout import CacheLayout, LayerLayout
from keepwarm.mlx_backend.compute.payload import KVPayload, largest_difference, unpack


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_differences_are_those_of_the_numbers(dtype: str) -> None:
    layout = CacheLayout((LayerLayout(1, 2, 2),), dtype)

    def of(*values: float) -> KVPayload:
        raw = np.array(values, np.float32)
        if dtype == "bfloat16":
            data = (raw.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        else:
            data = raw.astype(dtype).tobytes()
        return unpack(layout, 1, memoryview(data))

    one = of(1.0, 2.0, -3.0, 0.0)
    assert largest_difference(layout, one, of(1.0, 2.0, -3.0, 0.0)) == 0.0
    assert largest_difference(layout, one, of(1.5, 2.0, -7.0, 0.0)) == 4.0
    assert 0.0 < largest_difference(layout, one, of(1.0, 2.0, -3.0, -0.0)) < 1e-300
    for broken in (np.nan, np.inf, -np.inf):
        assert largest_difference(layout, one, of(1.0, broken, -3.0, 0.0)) == np.inf
        same = of(1.0, broken, -3.0, 0.0)
        assert largest_difference(layout, same, same) == 0.0

"""EXP-006 on small shapes: the bits, and that a hot agent's slab is never copied."""

import pytest

from keepwarm.bench.exp006 import SHAPES, Shape, ShapeResult, Sizes, run_exp006

TINY = (
    Shape.of(1, 2, dtype="float32"),
    Shape.of(3, 2, num_heads=2, dim=32, dtype="float16"),
)


@pytest.fixture(scope="module")
def results() -> tuple[ShapeResult, ...]:
    return run_exp006(Sizes(TINY, num_warm_ups=2, num_calls=5)).results


def test_every_shape_is_measured(results: tuple[ShapeResult, ...]) -> None:
    assert [result.shape for result in results] == ["1x2", "3x2"]
    assert all(calls.p50_s > 0 for result in results for _, calls in result.rows())


def test_the_first_write_after_a_rest_moves_no_slab(results: tuple[ShapeResult, ...]) -> None:
    assert not any(result.slab_moved for result in results)


def test_gathering_gives_the_bits_that_were_put_in(results: tuple[ShapeResult, ...]) -> None:
    assert all(result.same_bits for result in results)


def test_the_issues_shapes_are_all_there() -> None:
    assert [shape.name for shape in SHAPES] == ["1x12", "4x24", "8x30", "16x30", "32x48"]
    assert SHAPES[-1].nbytes == 32 * 256 * 48 * 2 * 8 * 128 * 2

"""What the engine expects of every `BatchGenerator`: the fake one and the one that runs models."""

import importlib.util
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import capacity_for
from keepwarm.core.ports import (
    GREEDY,
    BatchGenerator,
    Draw,
    Payload,
    RowId,
    RowInput,
    Sampling,
    Slab,
)
from keepwarm.testing.generator import FakeBatchGenerator, FakePayload
from native_steps import require_native

HAS_BACKEND = importlib.util.find_spec("mlx") and importlib.util.find_spec("mlx_lm")
needs_backend = pytest.mark.skipif(
    not HAS_BACKEND, reason="MLX is not installed: RowBatchGenerator is NOT tested"
)
REAL = ["llama", "qwen2", "qwen3", "llama, deterministic", "llama, native", "qwen3, native"]
KINDS = ["fake", *(pytest.param(kind, marks=needs_backend) for kind in REAL)]

IDS = [(position * 37 + position // 7) % 256 for position in range(700)]
ROW, OTHER_ROW = RowId(1), RowId(2)

modest = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session")
def generators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BatchGenerator]:
    """One of each kind, made when it is first asked for."""
    return {}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def generator(
    kind: str,
    generators: dict[str, BatchGenerator],
    tmp_path_factory: pytest.TempPathFactory,
) -> BatchGenerator:
    if kind == "fake":
        return FakeBatchGenerator()
    if kind not in generators:
        from keepwarm import load_model
        from tiny_models import write_tiny_model

        architecture, _, mode = kind.partition(", ")
        folder = tmp_path_factory.mktemp(architecture)
        model = write_tiny_model(folder / "model", architecture)
        if mode == "native":
            generators[kind] = native_generator(model)
        else:
            loaded = load_model(model, native=False, home=folder)
            generators[kind] = loaded.batch_gen_factory(deterministic=bool(mode))
    return generators[kind]


def native_generator(folder: Path) -> BatchGenerator:
    """Return the native step over this model, or skip where this machine has none."""
    from mlx_lm.utils import load_model

    from keepwarm.mlx_backend.loading.native import native_step
    from keepwarm.native.library import Missing

    library = require_native()
    model, _ = load_model(folder, lazy=True)
    step = native_step(model, library, max_context_tokens=2048, kv_dtype="float32")
    assert not isinstance(step, Missing), step.reason
    return step.factory(deterministic=True)


@pytest.fixture(autouse=True)
def no_row_is_left_open(generator: BatchGenerator) -> Iterator[None]:
    yield
    for row in (ROW, OTHER_ROW):
        try:
            generator.close_row(row)
        except InvariantBroken:
            continue


def chunk_of(row: RowId, ids: Sequence[int]) -> RowInput:
    return RowInput(row, ids)


def next_of(row: RowId, token_id: int, draw: int = 0, sampling: Sampling = GREEDY) -> RowInput:
    """One id, and the token behind it."""
    return RowInput(row, (token_id,), (Draw(sampling, draw),))


def prefill(generator: BatchGenerator, slab: Slab, ids: Sequence[int], chunk: int = 256) -> Slab:
    generator.open_row(ROW, slab)
    for start in range(0, len(ids), chunk):
        assert generator.step([chunk_of(ROW, ids[start : start + chunk])]) == [[]]
    return generator.close_row(ROW)


def filled(
    generator: BatchGenerator, num_tokens: int, *, chunk: int = 256, room: int = 100
) -> Slab:
    slab = generator.new_slab(capacity_for(num_tokens + room))
    return prefill(generator, slab, IDS[:num_tokens], chunk)


def decoded(
    generator: BatchGenerator,
    slab: Slab,
    first: int,
    num_tokens: int,
    sampling: Sampling = GREEDY,
) -> list[int]:
    """The tokens that follow when the row runs alone; the last one is not fed."""
    generator.open_row(ROW, slab)
    tokens = [first]
    for draw in range(num_tokens):
        tokens += generator.step([next_of(ROW, tokens[-1], draw, sampling)])[0]
    generator.close_row(ROW)
    return tokens[1:]


def bits(payload: Payload) -> list[Any]:
    """The payload's content, comparable: fake values, or the raw bits of every array."""
    if isinstance(payload, FakePayload):
        return list(payload.values)
    return [array.tobytes() for array in payload.arrays]  # type: ignore[attr-defined]


def all_bits(generator: BatchGenerator, slab: Slab) -> list[Any]:
    return bits(generator.extract(slab, 0, slab.num_tokens))


# -- slabs and payloads ------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [256, 512, 1280])
def test_a_new_slab_is_empty_and_as_large_as_was_said(
    generator: BatchGenerator, capacity: int
) -> None:
    slab = generator.new_slab(capacity)
    assert (slab.num_tokens, slab.capacity_tokens) == (0, capacity)
    assert slab.nbytes == generator.slab_bytes(capacity)


def test_a_new_slab_is_prepared_in_parts(generator: BatchGenerator) -> None:
    slab = generator.new_slab(512)
    assert not slab.is_ready
    num_parts = 0
    while not slab.is_ready:
        generator.prepare(slab, slab.nbytes / 2)
        num_parts += 1
    assert num_parts == 2


@pytest.mark.parametrize("num_tokens", [1, 255, 256])
def test_packed_bytes_are_as_the_layout_says_and_come_back_the_same(
    generator: BatchGenerator, num_tokens: int
) -> None:
    slab = filled(generator, num_tokens)
    payload = generator.extract(slab, 0, num_tokens)
    packed = generator.pack(payload)
    assert sum(piece.nbytes for piece in packed) == payload.nbytes
    again = generator.unpack(num_tokens, memoryview(b"".join(packed)))
    assert again.num_tokens == num_tokens
    assert [bytes(piece) for piece in generator.pack(again)] == [bytes(p) for p in packed]
    copy = generator.new_slab(capacity_for(num_tokens))
    generator.reconstruct(copy, [again])
    assert bits(generator.extract(copy, 0, num_tokens)) == bits(payload)


@pytest.fixture
def long_slab(generator: BatchGenerator) -> Slab:
    return filled(generator, 600)


@given(cuts=st.sets(st.integers(1, 599), max_size=4), num_tokens=st.integers(1, 600))
@modest
def test_extracting_in_any_spans_and_reconstructing_gives_the_same_bits(
    generator: BatchGenerator, long_slab: Slab, cuts: set[int], num_tokens: int
) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < num_tokens), num_tokens]
    spans = list(pairwise(edges))
    payloads = [generator.extract(long_slab, start, stop) for start, stop in spans]
    assert [payload.num_tokens for payload in payloads] == [b - a for a, b in spans]
    copy = generator.new_slab(capacity_for(num_tokens))
    generator.reconstruct(copy, payloads)
    assert copy.num_tokens == num_tokens
    assert all_bits(generator, copy) == bits(generator.extract(long_slab, 0, num_tokens))
    for payload, (start, stop) in zip(payloads, spans, strict=True):
        assert bits(generator.extract(copy, start, stop)) == bits(payload)


def test_every_length_from_1_to_600_makes_the_round_trip(
    generator: BatchGenerator, long_slab: Slab, kind: str
) -> None:
    target = generator.new_slab(768)
    for num_tokens in range(1, 601, 1 if kind in ("fake", "llama") else 37):
        payload = generator.extract(long_slab, 0, num_tokens)
        generator.trim(target, 0)
        generator.reconstruct(target, [payload])
        assert bits(generator.extract(target, 0, num_tokens)) == bits(payload)


def test_a_payload_pays_for_its_tokens(generator: BatchGenerator, long_slab: Slab) -> None:
    one = generator.extract(long_slab, 0, 1).nbytes
    assert generator.extract(long_slab, 100, 356).nbytes == 256 * one


@given(start=st.integers(0, 600), stop=st.integers(0, 600))
@modest
def test_copying_a_span_is_extracting_and_reconstructing_it(
    generator: BatchGenerator, long_slab: Slab, start: int, stop: int
) -> None:
    start, stop = sorted((start, stop))
    target = generator.new_slab(768)
    generator.reconstruct(target, [generator.extract(long_slab, 0, start)])
    before = all_bits(generator, long_slab)
    generator.copy_span(long_slab, target, start, stop)
    assert all_bits(generator, target) == bits(generator.extract(long_slab, 0, stop))
    assert all_bits(generator, long_slab) == before


def test_a_span_can_be_copied_and_extracted_from_a_slab_in_an_open_row(
    generator: BatchGenerator,
) -> None:
    slab = filled(generator, 300)
    expected = bits(generator.extract(slab, 0, 256))
    generator.open_row(ROW, slab)
    target = generator.new_slab(256)
    generator.copy_span(slab, target, 0, 256)
    assert bits(generator.extract(slab, 0, 256)) == expected
    assert all_bits(generator, target) == expected


@pytest.mark.parametrize("span", [(0, 0), (0, 1), (0, 100), (40, 99), (99, 100)])
def test_a_cut_payload_is_a_part_of_it(
    generator: BatchGenerator, long_slab: Slab, span: tuple[int, int]
) -> None:
    start, stop = span
    cut = generator.cut(generator.extract(long_slab, 256, 356), start, stop)
    assert cut.num_tokens == stop - start
    assert bits(cut) == bits(generator.extract(long_slab, 256 + start, 256 + stop))


def test_a_dismantled_slab_gives_the_same_payloads_and_is_gone(generator: BatchGenerator) -> None:
    slab = filled(generator, 600)
    spans = [(0, 256), (512, 600)]
    expected = [bits(generator.extract(slab, *span)) for span in spans]
    assert [bits(payload) for payload in generator.dismantle(slab, spans)] == expected
    for use in (
        lambda: generator.trim(slab, 0),
        lambda: generator.extract(slab, 0, 0),
        lambda: generator.open_row(ROW, slab),
    ):
        with pytest.raises(InvariantBroken):
            use()


def test_a_slab_grows_with_its_content(generator: BatchGenerator) -> None:
    slab = filled(generator, 256, room=0)
    expected = all_bits(generator, slab)
    larger = generator.grow_slab(slab, 768)
    assert (larger.capacity_tokens, larger.num_tokens) == (768, 256)
    assert all_bits(generator, larger) == expected
    with pytest.raises(InvariantBroken):
        generator.open_row(ROW, slab)
    assert decoded(generator, larger, 5, 8) == decoded(generator, filled(generator, 256), 5, 8)


@pytest.mark.parametrize("num_kept", [0, 1, 255, 256, 400])
def test_a_trimmed_slab_goes_on_like_a_fresh_one(generator: BatchGenerator, num_kept: int) -> None:
    slab = filled(generator, 450)
    decoded(generator, slab, 9, 5)
    generator.trim(slab, num_kept)
    assert slab.num_tokens == num_kept
    prefill(generator, slab, IDS[num_kept:300])
    fresh = filled(generator, max(num_kept, 300))
    assert decoded(generator, slab, 7, 12) == decoded(generator, fresh, 7, 12)


def test_the_largest_difference_of_payloads(generator: BatchGenerator) -> None:
    slab = filled(generator, 60)
    payload = generator.extract(slab, 0, 40)
    again = generator.cut(payload, 0, 40)
    other = generator.extract(slab, 20, 60)
    assert generator.largest_difference(payload, again) == 0.0
    assert generator.largest_difference(payload, other) > 0.0
    assert generator.largest_difference(payload, other) == generator.largest_difference(
        other, payload
    )
    nothing = generator.cut(payload, 0, 0)
    assert generator.largest_difference(nothing, nothing) == 0.0
    with pytest.raises(InvariantBroken):
        generator.largest_difference(payload, generator.cut(payload, 0, 39))


def test_a_single_flipped_bit_is_a_difference(generator: BatchGenerator) -> None:
    """The first, the middle and the last byte each make a difference."""
    payload = generator.extract(filled(generator, 20), 0, 20)
    data = b"".join(generator.pack(payload))
    for position in (0, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[position] ^= 1
        other = generator.unpack(20, memoryview(bytes(changed)))
        assert generator.largest_difference(payload, other) > 0.0


# -- rows --------------------------------------------------------------------------------------


def test_closing_hands_back_the_slab_that_was_opened(generator: BatchGenerator) -> None:
    slab = generator.new_slab(256)
    generator.open_row(ROW, slab)
    generator.step([chunk_of(ROW, IDS[:9])])
    assert generator.close_row(ROW) is slab
    assert slab.num_tokens == 9


def test_a_row_can_be_opened_again(generator: BatchGenerator) -> None:
    for _ in range(2):
        generator.open_row(ROW, filled_elsewhere(generator))
        assert generator.close_row(ROW).num_tokens == 20


def filled_elsewhere(generator: BatchGenerator) -> Slab:
    slab = generator.new_slab(256)
    generator.open_row(OTHER_ROW, slab)
    generator.step([chunk_of(OTHER_ROW, IDS[:20])])
    return generator.close_row(OTHER_ROW)


@pytest.mark.parametrize(("chunk", "num_tokens"), [(1, 20), (7, 150), (100, 300), (255, 300)])
def test_prefill_in_any_chunks_gives_the_same_tokens(
    generator: BatchGenerator, chunk: int, num_tokens: int
) -> None:
    whole = decoded(generator, filled(generator, num_tokens), 5, 8)
    assert decoded(generator, filled(generator, num_tokens, chunk=chunk), 5, 8) == whole


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, seed=5)], ids=repr)
def test_a_row_says_in_a_batch_what_it_says_alone(
    generator: BatchGenerator, sampling: Sampling
) -> None:
    lengths = (3, 200, 300, 513)
    alone = [decoded(generator, filled(generator, n), 5, 6, sampling) for n in lengths]
    rows = [RowId(10 + n) for n in lengths]
    for row, length in zip(rows, lengths, strict=True):
        generator.open_row(row, filled(generator, length))
    last = [5] * len(rows)
    together: list[list[int]] = [[] for _ in rows]
    for draw in range(6):
        inputs = [next_of(r, t, draw, sampling) for r, t in zip(rows, last, strict=True)]
        last = [token_id for (token_id,) in generator.step(inputs)]
        for tokens, token_id in zip(together, last, strict=True):
            tokens.append(token_id)
    for row, length in zip(rows, lengths, strict=True):
        assert generator.close_row(row).num_tokens == length + 6
    assert together == alone


CHUNKS = [IDS[:100], IDS[100:101], IDS[101:256]]


def in_steps(
    generator: BatchGenerator, *, decoding: Sequence[int], chunks_at: int | None
) -> tuple[list[list[int]], list[Any]]:
    """The tokens and the KV of rows that decode from these lengths on, one step for each of CHUNKS.

    `chunks_at`: where among the inputs another row's chunks are, whose KV comes last then.
    """
    rows = [RowId(10 + number) for number in range(len(decoding))]
    for row, num_tokens in zip(rows, decoding, strict=True):
        generator.open_row(row, filled(generator, num_tokens))
    generator.open_row(ROW, generator.new_slab(256))
    tokens = [[5] for _ in rows]
    for draw, ids in enumerate(CHUNKS):
        inputs = [next_of(row, tokens[n][-1], draw) for n, row in enumerate(rows)]
        if chunks_at is not None:
            inputs.insert(chunks_at, chunk_of(ROW, ids))
        sampled = generator.step(inputs)
        if chunks_at is not None:
            assert sampled.pop(chunks_at) == []
        for one, (token_id,) in zip(tokens, sampled, strict=True):
            one.append(token_id)
    slabs = [generator.close_row(row) for row in (*rows, ROW)]
    return tokens, [all_bits(generator, slab) for slab in slabs if slab.num_tokens]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_chunk_beside_decode_changes_no_bit_of_either(
    generator: BatchGenerator, place: int
) -> None:
    apart, kv = in_steps(generator, decoding=(20, 300), chunks_at=None)
    _, chunk_kv = in_steps(generator, decoding=(), chunks_at=0)
    together, all_kv = in_steps(generator, decoding=(20, 300), chunks_at=place)
    assert together == apart
    assert all_kv == [*kv, *chunk_kv]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, seed=5)], ids=repr)
def test_guessed_ids_are_verified_in_one_step(
    generator: BatchGenerator, sampling: Sampling
) -> None:
    """The ids of a reply, fed at once, are followed by the tokens that they were followed by."""
    tokens = decoded(generator, filled(generator, 200), 5, 6, sampling)
    expected_beside = decoded(generator, filled(generator, 30), 5, 1)
    slabs = filled(generator, 200), filled(generator, 30)
    generator.open_row(ROW, slabs[0])
    generator.open_row(OTHER_ROW, slabs[1])
    draws = tuple(Draw(sampling, index) for index in range(6))
    guessed = RowInput(ROW, (5, *tokens[:5]), draws)
    verified, beside = generator.step([guessed, next_of(OTHER_ROW, 5)])
    assert (verified, beside) == (tokens, expected_beside)
    assert generator.close_row(ROW).num_tokens == 206


def test_a_reconstructed_slab_says_what_the_first_would_have_said(
    generator: BatchGenerator,
) -> None:
    slab = filled(generator, 513)
    copy = generator.new_slab(768)
    spans = [(0, 256), (256, 512), (512, 513)]
    generator.reconstruct(copy, [generator.extract(slab, *span) for span in spans])
    assert decoded(generator, copy, 5, 10) == decoded(generator, slab, 5, 10)


def test_decoding_leaves_payloads_and_copies_as_they_were(generator: BatchGenerator) -> None:
    slab = filled(generator, 300)
    payload = generator.extract(slab, 256, 300)
    copy = generator.new_slab(512)
    generator.copy_span(slab, copy, 0, 300)
    before = (bits(payload), all_bits(generator, copy))
    decoded(generator, slab, 5, 10)
    generator.trim(slab, 0)
    prefill(generator, slab, IDS[300:600][:300])
    assert (bits(payload), all_bits(generator, copy)) == before


# -- misuse ------------------------------------------------------------------------------------


def misuses(generator: BatchGenerator, slab: Slab) -> dict[str, Any]:
    """On a slab of 300 tokens that is in an open row."""
    outside = generator.new_slab(256)
    ten = generator.extract(slab, 0, 10)
    too_many = [generator.extract(slab, 0, 256), ten]
    return {
        "open a row twice": lambda: generator.open_row(ROW, outside),
        "open a slab in two rows": lambda: generator.open_row(OTHER_ROW, slab),
        "close a row that is not open": lambda: generator.close_row(OTHER_ROW),
        "prefill a row that is not open": lambda: generator.step([chunk_of(OTHER_ROW, [1])]),
        "decode a row that is not open": lambda: generator.step([next_of(OTHER_ROW, 1)]),
        "feed a row twice": lambda: generator.step([next_of(ROW, 1), chunk_of(ROW, [1])]),
        "feed a row nothing": lambda: generator.step([chunk_of(ROW, [])]),
        "draw more often than ids are fed": lambda: generator.step(
            [RowInput(ROW, (1,), (Draw(GREEDY, 0), Draw(GREEDY, 1)))]
        ),
        "trim inside": lambda: generator.trim(slab, 0),
        "grow inside": lambda: generator.grow_slab(slab, 1024),
        "dismantle inside": lambda: generator.dismantle(slab, [(0, 10)]),
        "reconstruct inside": lambda: generator.reconstruct(slab, [ten]),
        "extract beyond the end": lambda: generator.extract(slab, 0, 301),
        "extract backwards": lambda: generator.extract(slab, 20, 10),
        "trim to more": lambda: generator.trim(outside, 1),
        "cut to more": lambda: generator.cut(ten, 0, 11),
        "reconstruct beyond the capacity": lambda: generator.reconstruct(outside, too_many),
        "copy a span with a gap": lambda: generator.copy_span(slab, outside, 5, 9),
        "prefill beyond the capacity": lambda: generator.step([chunk_of(ROW, IDS[:300])]),
        "a foreign payload": lambda: generator.reconstruct(outside, [object()]),  # type: ignore[list-item]
        "a foreign slab": lambda: generator.trim(object(), 0),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize(
    "misuse", list(misuses(FakeBatchGenerator(), filled(FakeBatchGenerator(), 300)))
)
def test_misuse_is_a_broken_invariant(generator: BatchGenerator, misuse: str) -> None:
    slab = filled(generator, 300)
    generator.open_row(ROW, slab)
    with pytest.raises(InvariantBroken):
        misuses(generator, slab)[misuse]()


# -- only where there are arrays ---------------------------------------------------------------


def addresses(slab: Any) -> list[int]:
    import numpy as np

    return [
        np.frombuffer(array, dtype=np.uint32).__array_interface__["data"][0]
        for array in slab.arrays()
    ]


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=needs_backend) for k in REAL], indirect=True
)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_nothing_that_is_done_to_a_slab_moves_its_arrays(
    generator: BatchGenerator, num_rows: int
) -> None:
    slabs = [filled(generator, 100 + row) for row in range(num_rows)]
    before = [addresses(slab) for slab in slabs]
    for row, slab in enumerate(slabs):
        generator.open_row(RowId(10 + row), slab)
    fork = generator.new_slab(512)
    for draw in range(4):
        generator.extract(slabs[0], 0, 100)
        generator.step([next_of(RowId(10 + row), 5, draw) for row in range(num_rows)])
        if draw == 1:
            generator.copy_span(slabs[0], fork, 0, 100)
    for row in range(num_rows):
        generator.close_row(RowId(10 + row))
    payload = generator.extract(slabs[0], 0, 50)
    generator.trim(slabs[0], 10)
    generator.reconstruct(slabs[0], [payload])
    prefill(generator, slabs[0], IDS[:40])
    assert [addresses(slab) for slab in slabs] == before


@pytest.mark.parametrize(
    "kind", [pytest.param("llama, deterministic", marks=needs_backend)], indirect=True
)
def test_canonical_shapes_give_the_same_bits_whatever_the_chunks_and_the_batch(
    generator: BatchGenerator,
) -> None:
    whole = filled(generator, 300)
    decoded(generator, whole, 5, 1)
    generator.open_row(OTHER_ROW, filled(generator, 77))
    for chunk in (37, 255):
        slab = filled(generator, 300, chunk=chunk)
        generator.open_row(ROW, slab)
        generator.step([next_of(OTHER_ROW, 3), next_of(ROW, 5)])
        generator.close_row(ROW)
        assert all_bits(generator, slab) == all_bits(generator, whole)

"""A record as a file: every bit comes back, and nothing else is taken for it."""

import json
import random
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keepwarm.core.block import BlockHash, child_hash
from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import BLOCK_TOKENS, CacheLayout, LayerLayout
from keepwarm.core.stored import KVFamily, Record
from keepwarm.store.disk import record as record_module
from keepwarm.store.disk.record import (
    MAX_HEADER_BYTES,
    Decoded,
    Header,
    decode,
    encode,
    identity_of,
    max_file_bytes,
    read_header,
)
from keepwarm.store.disk.tensors import layout_digest
from keepwarm.store.errors import BadRecord, DamagedRecord, ForeignRecord

DTYPES = ["float32", "float16", "bfloat16"]
LAYOUT = CacheLayout(layers=(LayerLayout(2, 3, 5), LayerLayout(1, 4, 4)), dtype="float16")
FAMILY = KVFamily("fingerprint", LAYOUT)
UINT32 = st.integers(0, 2**32 - 1)


def record_of(family: KVFamily, token_ids: list[int], *, start: int = 0, depth: int = 0) -> Record:
    """The record of the block's tokens from `start` on; `token_ids` are from its first one."""
    parent = family.root if depth == 0 else child_hash(family.root, range(depth))
    return Record(
        hash=child_hash(parent, token_ids),
        before=child_hash(parent, token_ids[:start]) if start else parent,
        parent=parent,
        depth=depth,
        start=start,
        stop=len(token_ids),
    )


def pieces_of(layout: CacheLayout, num_tokens: int, seed: int = 0) -> list[memoryview]:
    noise = random.Random(seed)  # noqa: S311
    return [memoryview(noise.randbytes(spec.nbytes)) for spec in layout.tensors(num_tokens)]


def file_of(
    family: KVFamily, token_ids: list[int], *, start: int = 0, depth: int = 0
) -> tuple[Record, bytes]:
    record = record_of(family, token_ids, start=start, depth=depth)
    pieces = pieces_of(family.layout, record.num_tokens)
    return record, b"".join(encode(family, record, token_ids, pieces))


def resealed(raw: bytes) -> bytes:
    """Return the bytes with the checksum that belongs to them, as a forger would write it."""
    zeroed = raw[: record_module._CHECKSUM_START] + b"0" * 32 + raw[record_module._CHECKSUM_STOP :]
    checksum = record_module._checksum([zeroed])
    return raw[: record_module._CHECKSUM_START] + checksum + raw[record_module._CHECKSUM_STOP :]


def rewritten(raw: bytes, found: str, put: str) -> bytes:
    """The file with another header text of any length, and all that follows from it, right."""
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length].rstrip(b" "), raw[8 + length :]
    assert header.count(found.encode()) == 1
    header = header.replace(found.encode(), put.encode())
    header += b" " * (-(8 + len(header)) % 64)
    return resealed(len(header).to_bytes(8, "little") + header + data)


def assert_refused(raw: bytes, family: KVFamily = FAMILY) -> None:
    with pytest.raises(BadRecord):
        decode(memoryview(raw), family)


@st.composite
def families(draw: st.DrawFn) -> KVFamily:
    sizes = st.integers(1, 4)
    layer = st.builds(LayerLayout, sizes, sizes, st.integers(0, 4))
    layout = CacheLayout(
        layers=tuple(draw(st.lists(layer, min_size=1, max_size=3))),
        dtype=draw(st.sampled_from(DTYPES)),
    )
    text = st.text(max_size=8)
    return KVFamily(draw(text), layout, lineage=draw(text), namespace=draw(text))


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Ids from a block's first token on, where the record's run starts, and the block's depth."""
    stop = draw(st.integers(1, BLOCK_TOKENS))
    first_id = draw(st.integers(0, 2**32 - stop))
    return (
        list(range(first_id, first_id + stop)),
        draw(st.integers(0, stop - 1)),
        draw(st.integers(0, 3)),
    )


@given(family=families(), run=runs(), seed=st.integers(0, 100))
@example(family=FAMILY, run=([2**32 - 1] * BLOCK_TOKENS, 0, 3), seed=0)
@example(family=FAMILY, run=([0] * BLOCK_TOKENS, BLOCK_TOKENS - 1, 0), seed=0)
@settings(deadline=None)
def test_every_record_comes_back_as_it_was(
    family: KVFamily, run: tuple[list[int], int, int], seed: int
) -> None:
    token_ids, start, depth = run
    record = record_of(family, token_ids, start=start, depth=depth)
    pieces = pieces_of(family.layout, record.num_tokens, seed)
    parts = encode(family, record, token_ids, pieces)
    assert all(part is piece for part, piece in zip(parts[1:], pieces, strict=True))
    raw = b"".join(parts)
    assert len(parts[0]) % 64 == 0
    assert len(raw) <= max_file_bytes(family, record.num_tokens)

    assert decode(memoryview(raw), family) == Decoded(record, tuple(token_ids), b"".join(pieces))
    header = read_header(BytesIO(raw))
    checksum = json.loads(parts[0][8:])["__metadata__"]["checksum"]
    assert header == Header(
        identity_of(family), record, tuple(token_ids), checksum, len(raw), family
    )


@pytest.mark.parametrize("num_tokens", range(1, BLOCK_TOKENS + 1))
def test_a_run_of_any_length_fits_where_it_ends_the_block(num_tokens: int) -> None:
    token_ids = list(range(BLOCK_TOKENS))
    record, raw = file_of(FAMILY, token_ids, start=BLOCK_TOKENS - num_tokens)
    assert decode(memoryview(raw), FAMILY).record == record
    assert len(raw) <= max_file_bytes(FAMILY, num_tokens)


def test_what_is_decoded_is_a_view() -> None:
    raw = bytearray(file_of(FAMILY, [1, 2])[1])
    decoded = decode(memoryview(raw), FAMILY)
    raw[-1] ^= 255
    assert decoded.data[-1] == raw[-1]


@pytest.mark.parametrize(("dtype", "numpy_type"), [("float32", "<f4"), ("float16", "<f2")])
def test_safetensors_reads_the_same_bits(dtype: str, numpy_type: str, tmp_path: Path) -> None:
    layout = CacheLayout(layers=LAYOUT.layers, dtype=dtype)
    family = KVFamily("fingerprint", layout)
    record = record_of(family, [7, 8, 9])
    pieces = pieces_of(layout, 3)
    path = tmp_path / "record.safetensors"
    path.write_bytes(b"".join(encode(family, record, [7, 8, 9], pieces)))
    tensors = safetensors.numpy.load_file(path)
    specs = layout.tensors(3)
    assert tensors.keys() == {spec.name for spec in specs}
    for spec, piece in zip(specs, pieces, strict=True):
        assert tensors[spec.name].dtype == np.dtype(numpy_type)
        assert tensors[spec.name].shape == spec.shape
        assert tensors[spec.name].tobytes() == piece


def test_safetensors_reads_bfloat16_and_the_metadata(tmp_path: Path) -> None:
    layout = CacheLayout(layers=LAYOUT.layers, dtype="bfloat16")
    family = KVFamily("fingerprint", layout, namespace="Zoë")
    record = record_of(family, [7, 8, 9], start=1, depth=2)
    pieces = pieces_of(layout, 2)
    raw = b"".join(encode(family, record, [7, 8, 9], pieces))
    found = dict(safetensors.deserialize(raw))
    for spec, piece in zip(layout.tensors(2), pieces, strict=True):
        tensor = found[spec.name]
        assert (tensor["dtype"], tuple(tensor["shape"])) == ("BF16", spec.shape)
        assert bytes(tensor["data"]) == piece
    path = tmp_path / "record.safetensors"
    path.write_bytes(raw)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    del metadata["checksum"]
    assert metadata == {
        "format": "keepwarm-record-1",
        "hash": record.hash.hex(),
        "before": record.before.hex(),
        "parent": record.parent.hex(),
        "depth": "2",
        "start": "1",
        "stop": "3",
        "tokens": "[7,8,9]",
        "fingerprint": "fingerprint",
        "lineage": "exact",
        "namespace": "Zoë",
        "encoding": "raw",
        "layout": layout_digest(layout),
    }


def test_two_thousand_random_injuries_are_all_noticed() -> None:
    raw = file_of(FAMILY, [1, 2, 3])[1]
    chance = random.Random(20260101)  # noqa: S311
    for _ in range(1500):
        injured = bytearray(raw)
        injured[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        assert_refused(bytes(injured))
    for _ in range(500):
        assert_refused(raw[: chance.randrange(len(raw))])


def test_every_bit_of_the_header_counts() -> None:
    raw = bytearray(file_of(FAMILY, [1, 2, 3])[1])
    for index in range(8 + int.from_bytes(raw[:8], "little")):
        for bit in range(8):
            raw[index] ^= 1 << bit
            assert_refused(bytes(raw))
            raw[index] ^= 1 << bit


@pytest.mark.parametrize("more", [b"\0", b" ", b"\0" * 64])
def test_trailing_bytes_are_refused_even_with_the_right_checksum(more: bytes) -> None:
    raw = file_of(FAMILY, [1, 2, 3])[1]
    assert_refused(raw + more)
    assert_refused(resealed(raw + more))
    with pytest.raises(DamagedRecord, match="bytes instead of"):
        read_header(BytesIO(raw + more))


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("fingerprint", replace(FAMILY, fingerprint="another")),
        ("lineage", replace(FAMILY, lineage="q8")),
        ("namespace", replace(FAMILY, namespace="alice")),
        ("layout", replace(FAMILY, layout=replace(LAYOUT, dtype="bfloat16"))),
        ("layout", replace(FAMILY, layout=replace(LAYOUT, layers=LAYOUT.layers[::-1]))),
    ],
)
def test_a_sound_record_of_another_family_is_foreign(field: str, other: KVFamily) -> None:
    raw = file_of(other, [1, 2, 3])[1]
    with pytest.raises(ForeignRecord) as caught:
        decode(memoryview(raw), FAMILY)
    assert caught.value.field == field
    assert read_header(BytesIO(raw)).identity == identity_of(other)


def test_another_encoding_is_foreign() -> None:
    raw = rewritten(file_of(FAMILY, [1])[1], '"encoding":"raw"', '"encoding":"q8"')
    with pytest.raises(ForeignRecord, match="its encoding is 'q8'; expected 'raw'"):
        decode(memoryview(raw), FAMILY)


def test_another_version_of_the_format_is_refused() -> None:
    raw = file_of(FAMILY, [1])[1].replace(b"keepwarm-record-1", b"keepwarm-record-2")
    with pytest.raises(DamagedRecord, match="does not start as a keepwarm-record-1 file"):
        decode(memoryview(raw), FAMILY)


@pytest.mark.parametrize(
    ("found", "put"),
    [
        ('"tokens":"[1,2,3]"', '"tokens":"[1,2,4]"'),
        ('"tokens":"[1,2,3]"', '"tokens":"[1,2]"'),
        ('"tokens":"[1,2,3]"', '"tokens":"[1, 2, 3]"'),
        ('"tokens":"[1,2,3]"', '"tokens":"[true,2,3]"'),
        ('"tokens":"[1,2,3]"', '"tokens":"[1.0,2,3]"'),
        ('"tokens":"[1,2,3]"', '"tokens":"[4294967297,2,3]"'),
        ('"tokens":"[1,2,3]"', '"tokens":"[-1,2,3]"'),
        ('"tokens":"[1,2,3]"', '"tokens":"{}"'),
        ('"tokens":"[1,2,3]"', '"tokens":"' + "[" * 100_000 + '"'),
        ('"tokens":"[1,2,3]"', '"tokens":[1,2,3]'),
        ('"depth":"0"', '"depth":"1"  '),
        ('"depth":"0"', '"depth":0'),
        ('"depth":"0"', '"depth":"-1"'),
        ('"depth":"0"', '"depth":" 0"'),
        ('"depth":"0"', '"depth":"4294967296"'),
        ('"depth":"0"', '"depth":"' + "9" * 5000 + '"'),
        ('"start":"1"', '"start":"0"'),
        ('"start":"1"', '"start":"2"'),
        ('"start":"1"', '"start":"3"'),
        ('"stop":"3"', '"stop":"4"'),
        ('"stop":"3"', '"stop":"257"'),
        ('"fingerprint":"fingerprint"', '"fingerprint":"\\ud800"'),
        ('"fingerprint":"fingerprint"', '"fingerprint":"\\u0066ingerprint"'),
        ('"fingerprint":"fingerprint"', '"fingerprint":"fingerprint","fingerprint":"fingerprint"'),
        ('"lineage":"exact",', ""),
        ('"lineage":"exact"', '"lineage":null'),
        ('"lineage":"exact"', '"lineage":"exact","more":"things"'),
        ('"lineage":"exact","namespace":""', '"namespace":"","lineage":"exact"'),
        ('"shape":[2,2,3]', '"shape":[2,2,3.0]'),
        ('"shape":[2,2,3]', '"shape":{"a":1}'),
        ('"shape":[2,2,3]', '"shape":[2,2,3],"more":1'),
        ('"data_offsets":[0,24]', '"data_offsets":[false,24]'),
        ('"data_offsets":[0,24]', '"data_offsets":[0,25]'),
        ('"data_offsets":[0,24]', '"data_offsets":[-1,24]'),
        ('"data_offsets":[0,24]', '"data_offsets":[0]'),
        ('"data_offsets":[0,24]', '"data_offsets":' + "[" * 5000 + "]" * 5000),
        ('"data_offsets":[0,24]}', '"data_offsets":[0,24]},"__metadata__":{}'),
        ('"data_offsets":[0,24]}', '"data_offsets":[0,24]},"x":{"dtype":"F16"}'),
    ],
)
def test_a_forged_header_with_the_right_checksum_is_refused(found: str, put: str) -> None:
    raw = file_of(FAMILY, [1, 2, 3], start=1)[1]
    assert rewritten(raw, found, found) == raw
    forged = rewritten(raw, found, put)
    with pytest.raises(DamagedRecord):
        decode(memoryview(forged), FAMILY)
    with pytest.raises(DamagedRecord):
        read_header(BytesIO(forged))


@pytest.mark.parametrize(
    ("found", "put"),
    [
        ('"layers.0.keys"', '"layers.0.kings"'),
        ('"shape":[2,2,3]', '"shape":[2,3,2]'),
        ('"shape":[2,2,3],"data_offsets":[0,24]', '"shape":[2,2,4],"data_offsets":[0,24]'),
    ],
)
def test_tensors_that_are_not_the_layouts_are_refused(found: str, put: str) -> None:
    _, raw = file_of(FAMILY, [1, 2, 3], start=1)
    forged = rewritten(raw, found, put)
    with pytest.raises(DamagedRecord, match="not that of 2 tokens of its layout"):
        decode(memoryview(forged), FAMILY)
    with pytest.raises(DamagedRecord, match="its tensors are not those"):
        read_header(BytesIO(forged))


@pytest.mark.parametrize("name", ["hash", "before", "parent"])
def test_a_forged_hash_is_refused(name: str) -> None:
    record, raw = file_of(FAMILY, [1, 2, 3], start=1)
    given = getattr(record, name).hex()
    for forged in (bytes(32).hex(), given.upper(), given[2:], f"{given} ", "x" * 64, ""):
        resigned = rewritten(raw, f'"{name}":"{given}"', f'"{name}":"{forged}"')
        with pytest.raises(DamagedRecord):
            decode(memoryview(resigned), FAMILY)
        with pytest.raises(DamagedRecord):
            read_header(BytesIO(resigned))


def test_a_first_block_hangs_on_its_familys_root() -> None:
    record, raw = file_of(FAMILY, [1, 2, 3], depth=1)
    assert decode(memoryview(raw), FAMILY).record == record
    with pytest.raises(DamagedRecord, match="not the root of its family"):
        decode(memoryview(rewritten(raw, '"depth":"1"', '"depth":"0"')), FAMILY)


def test_the_parent_of_a_later_block_is_a_hash() -> None:
    parent = b"short"
    record = Record(
        child_hash(BlockHash(parent), [1]), BlockHash(parent), BlockHash(parent), 1, 0, 1
    )
    with pytest.raises(InvariantBroken, match="its parent's hash has 5 bytes"):
        encode(FAMILY, record, [1], pieces_of(LAYOUT, 1))


def test_a_header_in_another_place_than_a_multiple_of_64_is_refused() -> None:
    raw = file_of(FAMILY, [1, 2, 3])[1]
    length = int.from_bytes(raw[:8], "little")
    for padding in (1, 64):
        moved = (length + padding).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * padding
        assert_refused(resealed(moved + raw[8 + length :]))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"1234567",
        b"\xff" * 8,
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 1),
        (1).to_bytes(8, "little"),
        (0).to_bytes(8, "little"),
    ],
)
def test_what_was_never_a_record_is_refused(raw: bytes) -> None:
    assert_refused(raw)
    with pytest.raises(DamagedRecord):
        read_header(BytesIO(raw))


def test_no_more_than_the_longest_header_is_read() -> None:
    class CountingFile(BytesIO):
        num_read = 0

        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert size >= 0
            self.num_read += size
            return super().read(size)

    record, raw = file_of(FAMILY, [1, 2, 3])
    file = CountingFile(raw)
    assert read_header(file).record == record
    assert file.num_read == 8 + int.from_bytes(raw[:8], "little")
    greedy = CountingFile((1 << 62).to_bytes(8, "little") + raw)
    with pytest.raises(DamagedRecord):
        read_header(greedy)
    assert greedy.num_read == 8


@given(
    text=st.one_of(
        st.binary(max_size=400),
        st.text(max_size=200).map(str.encode),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
    ),
    form=st.sampled_from(["whole", "header", "after the opening"]),
    cut=st.integers(0, 500),
)
@settings(deadline=None, max_examples=300)
def test_arbitrary_bytes_are_bad_records_and_nothing_else(text: bytes, form: str, cut: int) -> None:
    if form == "after the opening":
        sound = file_of(FAMILY, [1, 2, 3])[1]
        header = (sound[8 : 8 + cut] + text).ljust(120, b" ")
    else:
        header = text
    raw = text if form == "whole" else len(header).to_bytes(8, "little") + header
    if len(raw) >= record_module._CHECKSUM_STOP and form != "whole":
        raw = resealed(raw)
    assert_refused(raw)
    with pytest.raises(BadRecord):
        read_header(BytesIO(raw))


@given(key=st.sampled_from(record_module._METADATA_KEYS), value=st.text(max_size=80))
@settings(deadline=None)
def test_any_text_in_any_field_is_sound_or_refused(key: str, value: str) -> None:
    raw = file_of(FAMILY, [1, 2, 3], start=1, depth=2)[1]
    length = int.from_bytes(raw[:8], "little")
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    written = f'"{key}":{json.dumps(metadata[key])}'
    forged = rewritten(raw, written, f'"{key}":{json.dumps(value)}')
    for read in (lambda: decode(memoryview(forged), FAMILY), lambda: read_header(BytesIO(forged))):
        try:
            read()
        except BadRecord:
            continue


def test_pieces_that_are_not_the_layouts_are_a_bug() -> None:
    record = record_of(FAMILY, [1, 2, 3])
    pieces = pieces_of(LAYOUT, 3)
    for wrong in (pieces[:-1], [*pieces, pieces[0]], pieces[::-1], pieces_of(LAYOUT, 2)):
        with pytest.raises(InvariantBroken, match="pieces of"):
            encode(FAMILY, record, [1, 2, 3], wrong)
    every_other = memoryview(bytes(2 * pieces[0].nbytes))[::2]
    with pytest.raises(InvariantBroken, match="not contiguous"):
        encode(FAMILY, record, [1, 2, 3], [every_other, *pieces[1:]])


def test_pieces_may_have_any_type_and_shape_of_their_size() -> None:
    record = record_of(FAMILY, [1, 2, 3])
    pieces = pieces_of(LAYOUT, 3)
    shaped = [
        memoryview(np.frombuffer(piece, dtype="<f2").reshape(spec.shape))
        for piece, spec in zip(pieces, LAYOUT.tensors(3), strict=True)
    ]
    as_bytes = encode(FAMILY, record, [1, 2, 3], pieces)
    assert encode(FAMILY, record, [1, 2, 3], shaped)[0] == as_bytes[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"hash": BlockHash(bytes(32))},
        {"before": BlockHash(bytes(32))},
        {"parent": BlockHash(bytes(32))},
        {"depth": -1},
        {"start": 3},
        {"start": -1},
        {"stop": 2},
    ],
)
def test_a_record_that_contradicts_itself_is_a_bug(wrong: dict[str, object]) -> None:
    record = record_of(FAMILY, [1, 2, 3])._replace(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InvariantBroken, match="cannot be stored"):
        encode(FAMILY, record, [1, 2, 3], pieces_of(LAYOUT, 3))


def test_a_header_that_no_reader_would_read_is_not_written() -> None:
    family = replace(FAMILY, fingerprint="f" * MAX_HEADER_BYTES)
    with pytest.raises(InvariantBroken, match="its header has"):
        file_of(family, [1])


def test_layouts_are_told_apart_by_their_digests() -> None:
    layouts = [
        LAYOUT,
        replace(LAYOUT, dtype="bfloat16"),
        replace(LAYOUT, layers=LAYOUT.layers[:1]),
        replace(LAYOUT, layers=(LayerLayout(2, 5, 3), LAYOUT.layers[1])),
    ]
    assert len({layout_digest(layout) for layout in layouts}) == len(layouts)
    assert layout_digest(LAYOUT) == layout_digest(replace(LAYOUT))

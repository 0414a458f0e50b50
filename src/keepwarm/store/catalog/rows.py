"""Values in the catalogue's columns, and the rows that start-up reads in bulk."""

import json
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from keepwarm.core.block import BlockHash
from keepwarm.core.layout import CacheLayout, LayerLayout
from keepwarm.core.ports import Message
from keepwarm.core.stored import KVFamily, Record
from keepwarm.core.transcript import Receipt, Span
from keepwarm.store.catalog.errors import UnstorableMessage

_ID_BYTES = 4


class RecordRow(NamedTuple):
    """A stored record, as the catalogue knows it; a tuple because start-up reads 100,000.

    `maker` is the agent that it counts against, None once that agent was deleted.
    """

    hash: BlockHash
    before: BlockHash
    parent: BlockHash
    depth: int
    start: int
    stop: int
    family: KVFamily
    file_bytes: int
    maker: str | None

    @classmethod
    def of(
        cls, record: Record, family: KVFamily, *, file_bytes: int, maker: str | None
    ) -> "RecordRow":
        return cls(
            record.hash,
            record.before,
            record.parent,
            record.depth,
            record.start,
            record.stop,
            family,
            file_bytes,
            maker,
        )

    @property
    def record(self) -> Record:
        return Record._make(self[:6])


class BlockUsage(NamedTuple):
    """How many lines use each block, stored or not, and when the last of them did.

    `last_used` leaves out blocks that no line has used yet (0).
    """

    num_lines: Counter[BlockHash]
    last_used: dict[BlockHash, int]


def encode_text(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogatepass")


def decode_text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "surrogatepass")


def encode_ids(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def decode_ids(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // _ID_BYTES}I", data)


def encode_message(message: Message) -> bytes:
    """Encode a message as JSON: a tuple comes back as a list. Raises UnstorableMessage."""
    try:
        # Not ASCII: escaped, two lone surrogates that follow one another come back as one letter.
        text = json.dumps(dict(message), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise UnstorableMessage(str(error)) from error
    return text.encode("utf-8", "surrogatepass")


def decode_message(data: bytes) -> Message:
    message: dict[str, Any] = json.loads(data.decode("utf-8", "surrogatepass"))
    return message


def encode_receipt(receipt: Receipt | None) -> bytes | None:
    return None if receipt is None else json.dumps(asdict(receipt)).encode()


def decode_receipt(data: bytes | None) -> Receipt | None:
    """Decode a receipt. Raises ValueError or TypeError for what is none."""
    return None if data is None else Receipt(**json.loads(data))


def span_row(span: Span) -> tuple[bytes | None, bytes, bool, bool]:
    return encode_text(span.text), encode_ids(span.token_ids), span.is_whole, span.is_special


def span_of_row(text: bytes | None, token_ids: bytes, is_whole: int, is_special: int) -> Span:
    return Span(decode_text(text), decode_ids(token_ids), bool(is_whole), bool(is_special))


def encode_layout(layout: CacheLayout) -> str:
    layers = [[layer.num_kv_heads, layer.key_dim, layer.value_dim] for layer in layout.layers]
    return json.dumps({"dtype": layout.dtype, "layers": layers}, separators=(",", ":"))


def decode_layout(text: str) -> CacheLayout:
    fields = json.loads(text)
    return CacheLayout(tuple(LayerLayout(*layer) for layer in fields["layers"]), fields["dtype"])

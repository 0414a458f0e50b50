"""Blocks: 256 tokens of KV over all layers, named by what went into them."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NewType

from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.pool import Allocation
from keepwarm.core.ports import Payload

BlockHash = NewType("BlockHash", bytes)
LineId = NewType("LineId", int)

EXACT = "exact"


def root_hash(*, fingerprint: str, lineage: str = EXACT, namespace: str = "") -> BlockHash:
    """Return the parent of every first block: other weights, lineages, namespaces share nothing."""
    parts = (fingerprint, lineage, namespace)
    framed = b"".join(len(p.encode()).to_bytes(4, "little") + p.encode() for p in parts)
    return BlockHash(hashlib.sha256(b"keepwarm-block-v1" + framed).digest())


def child_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Return the name of the block that follows `parent` and holds `token_ids`."""
    return BlockHash(hashlib.sha256(parent + array("I", token_ids).tobytes()).digest())


def chain_hashes(parent: BlockHash, token_ids: Sequence[int]) -> Iterator[BlockHash]:
    """Yield the names of the whole blocks of `token_ids`, which follow `parent`, one at a time."""
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        parent = child_hash(parent, token_ids[start : start + BLOCK_TOKENS])
        yield parent


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many leading ids agree."""
    limit = min(len(a), len(b))
    if limit and a[0] != b[0]:  # most comparisons are with another conversation's line
        return 0
    for start in range(0, limit, BLOCK_TOKENS):
        stop = min(start + BLOCK_TOKENS, limit)
        if tuple(a[start:stop]) != tuple(b[start:stop]):  # a list never equals a tuple
            return next(i for i in range(start, stop) if a[i] != b[i])
    return limit


@dataclass(slots=True, eq=False)
class Block:
    """One block and where its KV is: a payload of its own, the slabs of hot lines, or both.

    `slabs` are the lines whose slab holds it (at position depth * 256); `owners` are the lines
    whose block table names it. A line whose slab holds the block owns it.
    """

    hash: BlockHash
    depth: int
    payload: Payload | None = None
    allocation: Allocation | None = None
    slabs: set[LineId] = field(default_factory=set)
    owners: set[LineId] = field(default_factory=set)

"""What the engine needs from others, as small protocols beside their consumer.

Each has a real and a fake implementation and one contract suite over both:
`BatchGenerator` is `mlx_backend.RowBatchGenerator` and `testing.FakeBatchGenerator`; `Tokenizer` is
`mlx_backend.HFTokenizer` and `testing.FakeTokenizer`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NewType, Protocol

from keepwarm.core.layout import CacheLayout

RowId = NewType("RowId", int)
Message = Mapping[str, Any]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
"""Who may speak in a message."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k, top_p, min_p 0 are off.

    `seed` and the token's position alone decide the draw, so that it does not depend on what else
    is in the batch.
    """

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0


GREEDY = Sampling()


class Payload(Protocol):
    """The KV bytes of a run of tokens over all layers. Opaque to everyone but the generator."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class Slab(Protocol):
    """The contiguous K and V of one line, with room for `capacity_tokens`. One owner."""

    @property
    def capacity_tokens(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """How many tokens hold KV, from position 0 on."""
        ...

    @property
    def nbytes(self) -> int: ...

    @property
    def is_ready(self) -> bool:
        """Whether all of its memory has been touched; the first touch is slow."""
        ...


@dataclass(frozen=True, slots=True)
class RowInput:
    """One row of a decode step: the token to feed, and what is sampled after it."""

    row: RowId
    token_id: int
    sampling: Sampling
    draw: int
    """The ordinal of the sampled token within the reply: with the seed, it fixes the draw."""


class BatchGenerator(Protocol):
    """Runs the model over rows. It owns no schedule and no budget: those are the engine's.

    A slab is either with its line (outside) or in an open row (inside), never both; between calls
    nothing is pending: every array has been evaluated. When a call raises, the slabs of the rows
    that it named may hold anything beyond the `num_tokens` they had before.
    """

    def slab_bytes(self, capacity_tokens: int) -> int:
        """What a slab of that capacity will occupy (padding included)."""
        ...

    def new_slab(self, capacity_tokens: int) -> Slab:
        """An empty slab. `capacity_tokens` is a multiple of the block.

        Its memory is touched by `prepare`, or all at once when it is used before that.
        """
        ...

    def prepare(self, slab: Slab, max_bytes: float) -> None:
        """Touch the next `max_bytes` of a new slab's memory, or somewhat more."""
        ...

    def grow_slab(self, slab: Slab, capacity_tokens: int) -> Slab:
        """Move the KV into a larger slab, layer by layer; `slab` is empty afterwards."""
        ...

    def trim(self, slab: Slab, num_tokens: int) -> None:
        """Forget every token from `num_tokens` on."""
        ...

    def extract(self, slab: Slab, start: int, stop: int) -> Payload:
        """A copy of the KV of the positions [start, stop)."""
        ...

    def dismantle(self, slab: Slab, spans: Sequence[tuple[int, int]]) -> list[Payload]:
        """Extract the spans [start, stop) and free the slab, layer by layer.

        The peak above the larger of slab and payloads is one layer; the slab must not be used
        again.
        """
        ...

    def reconstruct(self, slab: Slab, payloads: Sequence[Payload]) -> None:
        """Append copies of the payloads' KV, in order, behind what the slab holds."""
        ...

    def copy_span(self, source: Slab, target: Slab, start: int, stop: int) -> None:
        """Append the KV of [start, stop) of `source` to `target`, which ends at `start`.

        `source` may be in an open row; it is unchanged.
        """
        ...

    def cut(self, payload: Payload, start: int, stop: int) -> Payload:
        """A copy of the positions [start, stop) of a payload."""
        ...

    def pack(self, payload: Payload) -> tuple[memoryview, ...]:
        """The payload's own bytes, not a copy: one piece for each of `CacheLayout.tensors`."""
        ...

    def unpack(self, num_tokens: int, data: memoryview) -> Payload:
        """The payload whose packed bytes `data` is, end to end. It may keep `data` and not copy."""
        ...

    def largest_difference(self, a: Payload, b: Payload) -> float:
        """Of two payloads of as many tokens: 0.0 only where all bits are equal, inf for a NaN."""
        ...

    def open_row(self, row: RowId, slab: Slab) -> None:
        """Take the slab into the batch. Copies nothing."""
        ...

    def close_row(self, row: RowId) -> Slab:
        """Take the row out of the batch and hand its slab back. Copies nothing."""
        ...

    def prefill(self, row: RowId, token_ids: Sequence[int]) -> None:
        """Compute and append the KV of `token_ids`; nothing is sampled."""
        ...

    def decode(self, inputs: Sequence[RowInput]) -> list[int]:
        """Feed one token to each row and sample the next; appends one token of KV to each row."""
        ...

    def release_model(self) -> None:
        """Let go of the weights. Slabs and payloads can still be moved, but no row computes."""
        ...


class BatchGenFactory(Protocol):
    def __call__(self, *, deterministic: bool) -> BatchGenerator: ...


class Detokenizer(Protocol):
    """Turns ids into text as they come."""

    def push(self, token_id: int) -> str:
        """The text completed by this token: never a part of a character."""
        ...

    def has_text(self, token_id: int) -> bool:
        """Whether the token is text, or a part of one: special tokens and unknown ids are not."""
        ...

    @property
    def pending(self) -> bool:
        """Whether the last tokens are still waiting for the rest of a character."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of rendered text: a special token of the template, or ordinary text between two."""

    text: str
    special_id: int | None = None


class Tokenizer(Protocol):
    """Text to ids and back, and the chat template."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def fingerprint(self) -> str:
        """The same for tokenizers whose ids mean the same tokens."""
        ...

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[Piece, ...]:
        """The chat template over the messages, cut at its special tokens.

        Special-token text inside a message's content stays ordinary text. Raises InvalidRequest
        when the template refuses the messages.
        """
        ...

    def split(self, text: str) -> tuple[Piece, ...]:
        """Raw text, cut at its special tokens, which count as such (for bare completions)."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ordinary text to ids; special-token text in it is not special.

        Raises InvalidRequest for half of a surrogate pair, which JSON can bring.
        """
        ...

    def least_tokens(self, text: str) -> int:
        """As ordinary text it has so many tokens at least, found without encoding it.

        0 where nothing can be promised.
        """
        ...

    def detokenizer(self) -> Detokenizer:
        """A fresh one for a reply. Special tokens give no text."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, as far as the engine needs to know it."""

    name: str
    fingerprint: str
    layout: CacheLayout
    max_context_tokens: int
    vocab_size: int
    tokenizer: Tokenizer
    batch_gen_factory: BatchGenFactory
    model: object = None
    close: Callable[[], None] = lambda: None

"""The engine's ports: generator and tokenizer as protocols, and the model that carries both.

Each port has a real and a fake implementation, and one contract suite runs over both:
`BatchGenerator` is `mlx_backend.RowBatchGenerator` and `testing.FakeBatchGenerator`; `Tokenizer` is
`mlx_backend.HFTokenizer` and `testing.FakeTokenizer`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NewType, Protocol

from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import CacheLayout

RowId = NewType("RowId", int)
Message = Mapping[str, Any]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
"""The values that a message's `role` may have."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; 0 turns top_k, top_p or min_p off.

    `seed` and the token's place in the reply alone decide the draw, so the rest of the batch does
    not influence it.
    """

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0


GREEDY = Sampling()


class Payload(Protocol):
    """The KV of a run of tokens over all layers. Only the generator looks inside."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class Slab(Protocol):
    """The contiguous K and V of one line, with room for `capacity_tokens`. It has one owner."""

    @property
    def capacity_tokens(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """How many tokens, from position 0 on, have KV in the slab."""
        ...

    @property
    def nbytes(self) -> int: ...

    @property
    def is_ready(self) -> bool:
        """Whether all of its memory has been touched. The first touch is slow (see `prepare`)."""
        ...


@dataclass(frozen=True, slots=True)
class Draw:
    """How one token is sampled, and its index in the reply, which with the seed fixes the draw."""

    sampling: Sampling
    index: int


@dataclass(frozen=True, slots=True)
class RowInput:
    """What a step feeds to one row: its next ids, and a draw behind each of the last of them.

    One id and one draw while the row decodes, ids without a draw in a chunk of a prompt, several
    draws where guessed ids are verified. Raises InvariantBroken without ids, and for more draws
    than ids.
    """

    row: RowId
    token_ids: Sequence[int]
    draws: tuple[Draw, ...] = ()

    def __post_init__(self) -> None:
        if not self.token_ids or len(self.draws) > len(self.token_ids):
            raise InvariantBroken(
                f"row {self.row}: {len(self.token_ids)} ids and {len(self.draws)} draws"
            )


def check_rows(inputs: Sequence[RowInput]) -> None:
    """Raise InvariantBroken where a row occurs twice among the inputs of one step."""
    if len({item.row for item in inputs}) < len(inputs):
        raise InvariantBroken(f"a row occurs twice in a step: {[item.row for item in inputs]}")


class BatchGenerator(Protocol):
    """Runs the model over rows. Schedule and budget are the engine's.

    A slab is either with its line (outside) or in an open row (inside), never both. Between calls
    every array has been evaluated. When a call raises, the slabs of the rows that it named may
    hold anything beyond the `num_tokens` they had before.
    """

    @property
    def least_chunk_tokens(self) -> int:
        """How many tokens a chunk beside other rows needs to be worth its place in a step.

        1 where all inputs of a step share one pass over the weights.
        """
        ...

    def slab_bytes(self, capacity_tokens: int) -> int:
        """Return how many bytes a slab of that capacity occupies, padding included."""
        ...

    def new_slab(self, capacity_tokens: int) -> Slab:
        """Make an empty slab. `capacity_tokens` is a multiple of the block's 256.

        `prepare` touches its memory in parts; a slab used before that is touched all at once.
        """
        ...

    def prepare(self, slab: Slab, max_bytes: float) -> None:
        """Touch about the next `max_bytes` of a new slab's memory."""
        ...

    def grow_slab(self, slab: Slab, capacity_tokens: int) -> Slab:
        """Move the KV into a larger slab, layer by layer; `slab` is empty afterwards."""
        ...

    def trim(self, slab: Slab, num_tokens: int) -> None:
        """Forget every token from `num_tokens` on."""
        ...

    def extract(self, slab: Slab, start: int, stop: int) -> Payload:
        """Copy the KV of the positions [start, stop) out of the slab."""
        ...

    def dismantle(self, slab: Slab, spans: Sequence[tuple[int, int]]) -> list[Payload]:
        """Extract the spans [start, stop) and free the slab, layer by layer.

        Memory peaks at most one layer above the larger of slab and payloads. The slab must not be
        used again.
        """
        ...

    def reconstruct(self, slab: Slab, payloads: Sequence[Payload]) -> None:
        """Append copies of the payloads' KV to the slab, in order."""
        ...

    def copy_span(self, source: Slab, target: Slab, start: int, stop: int) -> None:
        """Append the KV of [start, stop) of `source` to `target`, which ends at `start`.

        `source` may be in an open row, and does not change.
        """
        ...

    def cut(self, payload: Payload, start: int, stop: int) -> Payload:
        """Copy the positions [start, stop) of a payload into a new one."""
        ...

    def pack(self, payload: Payload) -> tuple[memoryview, ...]:
        """Return the payload's own bytes, uncopied: one view for each of `CacheLayout.tensors`."""
        ...

    def unpack(self, num_tokens: int, data: memoryview) -> Payload:
        """Make a payload of its packed bytes, joined in `data`, which it may keep uncopied."""
        ...

    def largest_difference(self, a: Payload, b: Payload) -> float:
        """Compare payloads of equal length: 0.0 only where all bits are equal, inf for a NaN."""
        ...

    def open_row(self, row: RowId, slab: Slab) -> None:
        """Take the slab into the batch. Copies nothing."""
        ...

    def close_row(self, row: RowId) -> Slab:
        """Take the row out of the batch and hand its slab back. Copies nothing."""
        ...

    def step(self, inputs: Sequence[RowInput]) -> list[list[int]]:
        """Feed each row its ids, appending their KV, and sample a token for each of its draws.

        Returns the sampled tokens of each input. A row occurs once at most. An id's token depends
        on the ids before it, and not on the other rows.
        """
        ...

    def release_model(self) -> None:
        """Release the weights. Slabs and payloads can still be moved, but no row computes."""
        ...


class BatchGenFactory(Protocol):
    """Makes the generator of a loaded model; `deterministic` asks for canonical shapes."""

    def __call__(self, *, deterministic: bool) -> BatchGenerator: ...


class Detokenizer(Protocol):
    """Turns ids into text as they come."""

    def push(self, token_id: int) -> str:
        """Return the text that this token completes: never a part of a character."""
        ...

    def has_text(self, token_id: int) -> bool:
        """Whether the token stands for text. Special tokens and unknown ids do not."""
        ...

    @property
    def pending(self) -> bool:
        """Whether the last tokens are still waiting for the rest of a character."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of rendered text: one special token, or the ordinary text between two of them."""

    text: str
    special_id: int | None = None


class Tokenizer(Protocol):
    """Turns text into ids and back, and writes messages by the chat template."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly when their ids mean the same tokens."""
        ...

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[Piece, ...]:
        """Apply the chat template to the messages, and cut the text at its special tokens.

        Special-token text inside a message's content stays ordinary text. Raises InvalidRequest
        when the template rejects the messages.
        """
        ...

    def split(self, text: str) -> tuple[Piece, ...]:
        """Cut raw text at its special tokens, which count as special (for bare completions)."""
        ...

    def encode(self, text: str) -> list[int]:
        """Encode ordinary text; special-token text in it is not special.

        Raises InvalidRequest for half of a surrogate pair, which JSON can contain.
        """
        ...

    def least_tokens(self, text: str) -> int:
        """Return a lower bound on the tokens of ordinary text, found without encoding it.

        0 where nothing can be promised.
        """
        ...

    def detokenizer(self) -> Detokenizer:
        """Make a detokenizer for one reply. Special tokens give no text."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run, as far as the engine needs to know it."""

    name: str
    fingerprint: str
    layout: CacheLayout
    max_context_tokens: int
    vocab_size: int
    tokenizer: Tokenizer
    batch_gen_factory: BatchGenFactory
    computed_by: str = ""
    """Which way the model is computed here, and why in that way; for people."""
    is_reproducible: bool = False
    """Whether every way to the same KV gives the same bits, without the canonical shapes."""
    bare: Callable[[], object] = lambda: None
    """Return mlx-lm's own model of the same weights, to compare with; it may load it."""
    close: Callable[[], None] = lambda: None

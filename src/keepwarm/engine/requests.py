"""From what a caller passes to `submit` to checked values; a wrong one raises and names itself."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeGuard

from keepwarm.core.block import EXACT
from keepwarm.core.errors import InvalidRequest
from keepwarm.core.ports import Message, Sampling
from keepwarm.core.stored import MAX_QUOTA_BYTES, AgentSettings, Overflow
from keepwarm.core.transcript import MAX_DIGEST_CHARS, MAX_KEY_CHARS, is_receipt_key
from keepwarm.engine.prompt.old_messages import mend
from keepwarm.engine.reply.stop_strings import validate_stop

NAME = r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}"
NAMESPACE = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
AGENT_ID = re.compile(f"(?:{NAMESPACE}/)?{NAME}")
MAX_SEED = (1 << 64) - 1
GREEDY_BELOW = 1e-4
"""Logits that are divided by less overflow."""
_ENTROPY = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class ReceiptKey:
    """By which a request is known when it is sent again; `digest` is of what it asks for."""

    key: str
    digest: str

    def __post_init__(self) -> None:
        if not is_receipt_key(self.key):
            problem = f"must have 1 to {MAX_KEY_CHARS} printable characters"
            raise InvalidRequest("Idempotency-Key", problem)
        if len(self.digest) > MAX_DIGEST_CHARS:
            problem = f"its digest must have at most {MAX_DIGEST_CHARS} characters"
            raise InvalidRequest("Idempotency-Key", problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What every protocol translates to: `submit`'s arguments, whose checks are `submit`'s.

    `model`: which one answers; the one that the agent talked to last where it is empty.
    `queue_timeout_s`: how long it may wait for its row; `deadline_s`: for its last token.
    """

    model: str = ""
    agent_id: str | None = None
    namespace: str = ""
    messages: Sequence[Message] | None = None
    continue_final_message: bool = False
    append: Sequence[Message] | None = None
    text: str | None = None
    token_ids: Sequence[int] | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] | None = None
    priority: int | None = None
    receipt_key: ReceiptKey | None = None
    queue_timeout_s: float | None = None
    deadline_s: float | None = None

    @property
    def source(self) -> "PromptSource":
        """Raises InvalidRequest where there is not exactly one."""
        return PromptSource(
            messages=self.messages,
            append=self.append,
            text=self.text,
            token_ids=self.token_ids,
            continue_final_message=self.continue_final_message,
        )

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `BlockPoolBatchEngine.submit`."""
        limits = ("model", "queue_timeout_s", "deadline_s")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in limits}

    def checked(self) -> "Asked":
        """Check every value by itself. Raises InvalidRequest."""
        return Asked(
            source=self.source.in_repair(),
            agent_id=valid_agent_id(self.agent_id),
            namespace=valid_namespace(self.namespace),
            max_tokens=valid_max_tokens(self.max_tokens),
            sampling=valid_sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                seed=self.seed,
            ),
            stops=validate_stop(self.stop),
            priority=None if self.priority is None else valid_priority(self.priority),
            receipt_key=self.receipt_key,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """The prompt as given: exactly one of the four.

    `continue_final_message`: the last of `messages` is the beginning of the reply. `mended`: what
    was changed in old messages, a short sentence for each change.
    """

    messages: Sequence[Message] | None = None
    append: Sequence[Message] | None = None
    text: str | None = None
    token_ids: Sequence[int] | None = None
    continue_final_message: bool = False
    mended: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [
            name
            for name in ("messages", "append", "text", "token_ids")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            what = " and ".join(given) or "none"
            raise InvalidRequest(
                "prompt", f"give exactly one of messages, append, text and token_ids, not {what}"
            )
        if self.continue_final_message and self.messages is None:
            raise InvalidRequest("continue_final_message", "needs messages")

    def in_repair(self) -> "PromptSource":
        """Return the source with old messages that can be read.

        New ones are left for the checks to refuse.
        """
        messages = mend(self.messages, is_begun=self.continue_final_message)
        new = mend(self.append)
        notes = (*messages.notes, *new.notes)
        return replace(self, messages=messages.messages, append=new.messages, mended=notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request whose values are in their ranges; None in `max_tokens` and `priority` is open."""

    source: PromptSource
    agent_id: str | None
    namespace: str
    max_tokens: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    priority: int | None
    receipt_key: ReceiptKey | None


def valid_agent_id(agent_id: object) -> str | None:
    """Return the name: 1 to 128 letters, digits and . _ : @ + -, a letter or digit first.

    A namespace, of 1 to 64 letters, digits and . _ -, may stand before it and a slash.
    """
    if agent_id is None:
        return None
    if not isinstance(agent_id, str) or not AGENT_ID.fullmatch(agent_id):
        raise InvalidRequest(
            "agent_id",
            f"{agent_id!r} is no agent's name: use 1 to 128 letters, digits and . _ : @ + -, "
            "beginning with a letter or digit",
        )
    return agent_id


def valid_name(name: object) -> str:
    """Return the name, which must have no namespace."""
    if isinstance(name, str) and "/" in name:
        raise InvalidRequest("agent_id", f"{name!r} is no agent's name: it has a slash")
    valid = valid_agent_id(name)
    if valid is None:
        raise InvalidRequest("agent_id", "must be an agent's name")
    return valid


def valid_namespace(namespace: object) -> str:
    """Empty, or 1 to 64 letters, digits and . _ - that begin with a letter or digit."""
    if namespace == "":
        return ""
    if not isinstance(namespace, str) or not re.fullmatch(NAMESPACE, namespace):
        raise InvalidRequest(
            "namespace", f"{namespace!r} is none: use 1 to 64 letters, digits and . _ -"
        )
    return namespace


def valid_max_tokens(max_tokens: object) -> int | None:
    if max_tokens is None:
        return None
    if not _is_int(max_tokens) or max_tokens < 1:
        raise InvalidRequest("max_tokens", f"must be a whole number from 1, not {max_tokens!r}")
    return max_tokens


def valid_token_ids(token_ids: object, vocab_size: int) -> list[int]:
    if not isinstance(token_ids, Sequence) or isinstance(token_ids, str | bytes):
        raise InvalidRequest("token_ids", f"must be a list of ids, not {token_ids!r}")
    ids = list(token_ids)
    if not ids:
        raise InvalidRequest("token_ids", "is empty; there must be at least one id")
    for position, token_id in enumerate(ids):
        if not _is_int(token_id) or not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                "token_ids",
                f"{token_id!r} at position {position} is not an id from 0 to {vocab_size - 1}",
            )
    return ids


def valid_text(text: object) -> str:
    if not isinstance(text, str) or not text:
        raise InvalidRequest("text", "must be text with at least one character")
    return text


def valid_priority(priority: object) -> int:
    if not _is_int(priority) or not -100 <= priority <= 100:
        raise InvalidRequest("priority", f"must be a whole number from -100 to 100: {priority!r}")
    return priority


def valid_settings(settings: AgentSettings) -> AgentSettings:
    """Return an agent's settings, each in its range. Raises InvalidRequest."""
    valid_priority(settings.priority)
    if not isinstance(settings.pinned, bool):
        raise InvalidRequest("pinned", f"must be true or false, not {settings.pinned!r}")
    if settings.overflow not in list(Overflow):
        raise InvalidRequest("overflow", f"must be one of {[*Overflow]}, not {settings.overflow!r}")
    quota = settings.quota_bytes
    if quota is not None and (not _is_int(quota) or not 0 <= quota <= MAX_QUOTA_BYTES):
        problem = f"must be a whole number from 0 to {MAX_QUOTA_BYTES:,}, not {quota!r}"
        raise InvalidRequest("quota_bytes", problem)
    if settings.policy != EXACT:
        problem = f"{settings.policy!r} does not exist yet; only {EXACT} does"
        raise InvalidRequest("kv_policy", problem)
    return settings


def valid_sampling(
    *, temperature: float, top_p: float, top_k: int, min_p: float, seed: int | None
) -> Sampling:
    """Sampling settings in their ranges; without a seed, one is drawn.

    A temperature so low that nothing but the likeliest token can be drawn is greedy.
    """
    _check_range("temperature", temperature, 0.0, 100.0)
    _check_range("top_p", top_p, 0.0, 1.0)
    _check_range("min_p", min_p, 0.0, 1.0)
    if not _is_int(top_k) or top_k < 0:
        raise InvalidRequest("top_k", f"must be a whole number from 0 (off), not {top_k!r}")
    if seed is None:
        seed = _ENTROPY.getrandbits(64)
    if not _is_int(seed) or not 0 <= seed <= MAX_SEED:
        raise InvalidRequest("seed", f"must be a whole number from 0 to {MAX_SEED}, not {seed!r}")
    return Sampling(
        temperature=0.0 if temperature < GREEDY_BELOW else float(temperature),
        top_p=float(top_p),
        top_k=top_k,
        min_p=float(min_p),
        seed=seed,
    )


def _check_range(field: str, value: object, low: float, high: float) -> None:
    if not _is_number(value) or not low <= value <= high:
        raise InvalidRequest(field, f"must be a number from {low:g} to {high:g}, not {value!r}")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)

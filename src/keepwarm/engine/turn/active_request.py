"""A request while it is in the engine: its sequence, its line and its reply; and its events."""

from dataclasses import dataclass

from keepwarm.core.events import (
    CacheReport,
    Completed,
    Delta,
    Failed,
    FinishReason,
    Progress,
    Started,
    Timing,
    Usage,
)
from keepwarm.core.layout import BLOCK_TOKENS
from keepwarm.core.sequence import TokenSequence
from keepwarm.core.transcript import Receipt
from keepwarm.engine.agents.agent import Line
from keepwarm.engine.prompt.divergence import Divergence, Reason
from keepwarm.engine.reply.reply_text import Emitted, Reply, ReplyText
from keepwarm.engine.requests import ReceiptKey
from keepwarm.engine.turn.intake import Wanted

EVICTED = "evicted"
CACHED = "cached"
ANOTHER_TEXT = frozenset({Reason.EDITED_TEXT, Reason.SHORTENED_TEXT, Reason.EDITED_SPECIAL})


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """Everything that belongs to one request. Only the engine's thread touches it.

    `line` is the one that `wanted` continues, or was opened for it.
    """

    sequence: TokenSequence
    line: Line
    wanted: Wanted
    reply: ReplyText
    receipt_key: ReceiptKey | None = None
    has_started: bool = False
    first_token_s: float | None = None

    @property
    def request_id(self) -> str:
        return self.sequence.request_id

    @property
    def agent_id(self) -> str | None:
        return self.sequence.agent_id

    @property
    def kept_reply(self) -> Reply:
        """The reply as the line will remember it: by its text, or by its ids as the prompt was."""
        reply = self.reply.reply
        return reply if self.wanted.prompt.is_of_ids else reply.spoken

    @property
    def num_kept_tokens(self) -> int:
        """Prompt and reply as the line will remember them."""
        return self.sequence.num_prompt_tokens + len(self.kept_reply.token_ids)

    @property
    def _is_new_line(self) -> bool:
        return self.wanted.line is None

    def started(self) -> Started:
        return Started(self.request_id, self.agent_id, self._cache_report(), self.wanted.adapted)

    def progress(self) -> Progress:
        sequence = self.sequence
        num_done = min(sequence.blocks.num_in_slab, sequence.target_tokens)
        return Progress(self.request_id, self.agent_id, num_done, sequence.target_tokens)

    def delta(self, emitted: Emitted) -> Delta:
        return Delta(self.request_id, self.agent_id, emitted.text, emitted.token_ids)

    def failed(self, error: Exception) -> Failed:
        return Failed(self.request_id, self.agent_id, error, self.reply.reply.text)

    def completed(self, reason: FinishReason, now_s: float) -> Completed:
        reply = self.reply.reply
        return Completed(
            request_id=self.request_id,
            agent_id=self.agent_id,
            text=reply.text,
            token_ids=reply.token_ids,
            finish_reason=reason,
            usage=Usage(
                prompt_tokens=self.sequence.num_prompt_tokens,
                cached_tokens=self.sequence.cached_tokens or 0,
                completion_tokens=self.sequence.num_reply_tokens,
            ),
            cache=self._cache_report(),
            timing=self._timing(now_s),
            stop_sequence=self.reply.stopped_by,
            num_dropped_turns=self.wanted.num_dropped_turns,
            adapted=self.wanted.adapted,
        )

    def receipt(self, reason: FinishReason) -> Receipt | None:
        """Return what answers the request when it is sent again; a cancelled one runs again."""
        if self.receipt_key is None or reason is FinishReason.CANCELLED:
            return None
        return Receipt(
            key=self.receipt_key.key,
            digest=self.receipt_key.digest,
            finish_reason=reason,
            prompt_tokens=self.sequence.num_prompt_tokens,
            cached_tokens=self.sequence.cached_tokens or 0,
            completion_tokens=self.sequence.num_reply_tokens,
        )

    def _cache_report(self) -> CacheReport:
        cached = self.sequence.cached_tokens or 0
        num_prompt = self.sequence.num_prompt_tokens
        diverged_at, reason = self._divergence(cached, num_prompt)
        return CacheReport(
            tier=self.sequence.tier,
            cached_tokens=cached,
            prompt_tokens=num_prompt,
            diverged_at=diverged_at,
            reason=reason,
            restored_s=self.sequence.restored_s,
            message=self.wanted.locate(diverged_at),
        )

    def _divergence(self, cached: int, num_prompt: int) -> tuple[int, str]:
        """Return the first prompt token that was not there, and why.

        A new line of an agent finds whole blocks of the line that it is most like, and not its
        tail; why it could not go on with that line says more than that.
        """
        # The last token of a line may have been sampled and never fed: lacking it is no loss.
        num_lacking = min(self.wanted.prompt.num_shared, num_prompt) - 1 - cached
        if num_lacking > 0 and not self._is_new_line:
            return cached, EVICTED
        if self._is_new_conversation(num_lacking):
            return cached, Reason.NEW_LINE.value
        if num_lacking >= BLOCK_TOKENS:
            return cached, EVICTED
        return self._as_known(cached)

    def _is_new_conversation(self, num_lacking: int) -> bool:
        """Whether what the prompt shares with a line is no more than how conversations begin."""
        divergence = self.wanted.prompt.divergence
        if divergence is None or self.agent_id is not None:
            return divergence is None and self._is_new_line and num_lacking > 0
        is_apart = self._is_new_line and num_lacking > 0
        if is_apart or divergence.reason in ANOTHER_TEXT:
            return not self._shares_a_reply(divergence)
        return False

    def _shares_a_reply(self, divergence: Divergence) -> bool:
        message = self.wanted.locate(divergence.token_index)
        known = (self.wanted.conversation or ())[:message]
        return any(said["role"] == "assistant" for said in known)

    def _as_known(self, cached: int) -> tuple[int, str]:
        divergence = self.wanted.prompt.divergence
        if divergence is None:
            return self.sequence.num_prompt_tokens, CACHED
        is_new = divergence.reason in (Reason.NEW_LINE, Reason.NEW_MESSAGE)
        if cached > divergence.token_index and not is_new:
            return cached, Reason.NOT_COMPUTED.value
        return max(divergence.token_index, cached), divergence.reason.value

    def _timing(self, now_s: float) -> Timing:
        sequence = self.sequence
        start = sequence.submitted_s
        first = self.first_token_s
        return Timing(
            queued_s=(now_s if sequence.admitted_s is None else sequence.admitted_s) - start,
            first_token_s=None if first is None else first - start,
            total_s=now_s - start,
            num_preemptions=sequence.num_preemptions,
        )

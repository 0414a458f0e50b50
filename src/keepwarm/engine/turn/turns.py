"""The requests in the engine: their replies, token by token, and what each leaves to its line."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from keepwarm.core.errors import InvariantBroken, RequestBroke
from keepwarm.core.events import Event, FinishReason
from keepwarm.core.ports import Tokenizer
from keepwarm.core.sequence import TokenSequence
from keepwarm.engine.agents.book import AgentBook
from keepwarm.engine.agents.commits import Commits
from keepwarm.engine.agents.lines import Lines, history
from keepwarm.engine.reply.reply_text import ReplyText
from keepwarm.engine.requests import Asked
from keepwarm.engine.turn.active_request import ActiveRequest
from keepwarm.engine.turn.intake import Wanted
from keepwarm.kv.batch import Batch
from keepwarm.kv.outcomes import Advanced, Broken, Opened, Outcome, Sampled
from keepwarm.kv.tiers import Tiers

_log = logging.getLogger(__name__)


class Turns:
    """Owns the requests that have not ended; `emit` takes their events."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        batch: Batch,
        tiers: Tiers,
        book: AgentBook,
        lines: Lines,
        commits: Commits,
        emit: Callable[[Event], None],
        clock: Callable[[], float],
        ids: Iterator[int],
    ) -> None:
        self.active: dict[str, ActiveRequest] = {}
        self._tokenizer = tokenizer
        self._batch = batch
        self._tiers = tiers
        self._book = book
        self._lines = lines
        self._commits = commits
        self._emit = emit
        self._clock = clock
        self._ids = ids

    def __repr__(self) -> str:
        return f"Turns({len(self.active)} requests)"

    def __len__(self) -> int:
        return len(self.active)

    def begin(self, asked: Asked, wanted: Wanted) -> str:
        """Queue the request on its line, or on a new one. Returns its id."""
        reply = ReplyText(self._tokenizer.detokenizer(), asked.stops)
        line = wanted.line or self._lines.open(asked.agent_id, asked.namespace)
        line.in_use = True
        number = next(self._ids)
        sequence = TokenSequence(
            request_id=f"req-{number}",
            agent_id=asked.agent_id,
            arrival=number,
            prompt_ids=wanted.prompt.token_ids,
            max_tokens=wanted.max_reply_tokens,
            sampling=asked.sampling,
            priority=wanted.priority,
            blocks=line.blocks,
            known_ids=line.transcript.token_ids,
            submitted_s=self._clock(),
        )
        active = ActiveRequest(sequence, line, wanted, reply, asked.receipt_key)
        self.active[active.request_id] = active
        self._batch.enqueue(sequence)
        return active.request_id

    def cancel(self, request_id: str) -> bool:
        """Returns whether it had not ended yet."""
        active = self.active.get(request_id)
        if active is None:
            return False
        with self._at_its_own_risk(active):
            active.reply.cancel()
            self._finish(active, FinishReason.CANCELLED)
        return True

    def abandon(self, error: Exception) -> None:
        """End all requests with the error."""
        for active in list(self.active.values()):
            self._batch.leave(active.sequence)
            self._fail(active, error)

    def check(self) -> None:
        """Check that lines are in use where requests run on them, at the places of their agents."""
        running = {id(active.line) for active in self.active.values()}
        if {id(line) for line in self._lines.all() if line.in_use} != running:
            raise InvariantBroken(f"{self!r}: lines in use and requests differ")
        for active in self.active.values():
            if active.sequence.blocks is not active.line.blocks:
                raise InvariantBroken(f"{active.request_id} runs on KV that its line has not")

    def take(self, outcome: Outcome) -> bool:
        """Bring the outcome's request on, or end it. Returns whether it is a request of these."""
        active = self.active.get(outcome.sequence.request_id)
        if active is None:
            return False
        with self._at_its_own_risk(active):
            self._take(active, outcome)
        return True

    @contextmanager
    def _at_its_own_risk(self, active: ActiveRequest) -> Iterator[None]:
        """Yield what is computed for one request ends at most that request.

        Whatever a template, a tokenizer or a bug raises is that request's error. Bookkeeping that
        contradicts itself is everybody's.
        """
        try:
            yield
        except InvariantBroken:
            raise
        except Exception as error:  # noqa: BLE001 - of foreign code, and of ours
            _log.exception("request %s ends, others go on", active.request_id)
            self._break_off(active, error)

    def _take(self, active: ActiveRequest, outcome: Outcome) -> None:
        if isinstance(outcome, Sampled):
            self._take_token(active, outcome.token_id)
        elif isinstance(outcome, Opened):
            self._start(active)
        elif isinstance(outcome, Advanced):
            self._emit(active.progress())
        elif isinstance(outcome, Broken):
            self._fail(active, outcome.error)

    def _start(self, active: ActiveRequest) -> None:
        """Once, however often the row opens anew."""
        if not active.has_started:
            active.has_started = True
            self._emit(active.started())

    def _take_token(self, active: ActiveRequest, token_id: int) -> None:
        if active.first_token_s is None:
            active.first_token_s = self._clock()
        if token_id in self._tokenizer.eos_token_ids:
            self._finish(active, FinishReason.STOP)
            return
        emitted = active.reply.push(token_id)
        if emitted:
            self._emit(active.delta(emitted))
        if active.reply.stopped_by is not None:
            self._finish(active, FinishReason.STOP)
        elif active.sequence.num_to_come <= 0:
            self._finish(active, FinishReason.LENGTH)

    def _finish(self, active: ActiveRequest, reason: FinishReason) -> None:
        """Send what was held back, keep the turn, and let the line rest."""
        if reason is not FinishReason.CANCELLED and (emitted := active.reply.finish()):
            self._emit(active.delta(emitted))
        self._batch.leave(active.sequence)
        is_kept = active.sequence.admitted_s is not None and self._keep(active, reason)
        completed = active.completed(reason, self._clock())
        self._close(active)
        if is_kept and active.agent_id is not None:
            agent = self._book.get(active.agent_id)
            if agent.main is active.line:
                completed = replace(completed, turn=len(agent.turns))
            self._commits.commit(agent, completed)
        else:
            self._emit(completed)

    def _keep(self, active: ActiveRequest, reason: FinishReason) -> bool:
        """Return the line knows the prompt and the reply as sent, by the ids that were fed for
        them.

        A request that was cancelled before its first token leaves the conversation as it was; what
        it computed stays with the line's blocks. Returns whether there is a turn to commit.
        """
        line, wanted, reply = active.line, active.wanted, active.kept_reply
        self._tiers.truncate(line.blocks, active.num_kept_tokens)
        if active.first_token_s is None:
            return False
        conversation = history(wanted.conversation, wanted.reply_prefix + reply.text)
        line.transcript = wanted.prompt.transcript.extended(reply.span)
        self._lines.record_turn(
            active.agent_id,
            line,
            wanted.prompt.num_shared,
            conversation,
            active.receipt(reason),
            is_appended=wanted.is_appended,
        )
        return True

    def _fail(self, active: ActiveRequest, error: Exception) -> None:
        """End the request with an error: the conversation stays, and what was computed can be
        found.
        """
        self._close(active)
        self._emit(active.failed(error))

    def _break_off(self, active: ActiveRequest, error: Exception) -> None:
        """End the request wherever it is, perhaps on its way out, with its one last event."""
        self._batch.leave(active.sequence)
        if active.request_id in self.active:
            self._close(active)
        self._emit(active.failed(RequestBroke(error)))

    def _close(self, active: ActiveRequest) -> None:
        active.line.in_use = False
        del self.active[active.request_id]
        self._lines.tidy(active.agent_id)

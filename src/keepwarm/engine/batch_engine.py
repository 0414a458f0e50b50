"""BlockPoolBatchEngine: requests in, events out, and every agent's memory kept between them."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

from keepwarm.core.agent_store import AgentStore, NoStore
from keepwarm.core.block import common_prefix
from keepwarm.core.errors import (
    AgentBusy,
    AgentExists,
    ContextTooLong,
    InvalidRequest,
    InvariantBroken,
    NeverFits,
    QueueFull,
)
from keepwarm.core.events import Completed, Event, FinishReason
from keepwarm.core.fidelity import kv_bound
from keepwarm.core.layout import BLOCK_TOKENS, capacity_for
from keepwarm.core.policies import EngineConfig
from keepwarm.core.pool import BlockPool, PoolSnapshot
from keepwarm.core.ports import BatchGenFactory, LoadedModel, Message
from keepwarm.core.sequence import TokenSequence, prefetch_sequence
from keepwarm.core.stored import (
    AgentSettings,
    BundleEvent,
    BundleRead,
    BundleStored,
    BundleWritten,
    Committed,
    Fetched,
    KVFamily,
    Saved,
    StoreHealth,
)
from keepwarm.core.transcript import Transcript
from keepwarm.engine.active import ActiveRequest
from keepwarm.engine.agents import (
    Agent,
    AgentBook,
    AgentView,
    Choice,
    Line,
    history,
    view_of_summary,
)
from keepwarm.engine.batch import (
    Advanced,
    Batch,
    BatchCounters,
    Broken,
    Outcome,
    Restored,
    Sampled,
)
from keepwarm.engine.bundles import (
    ExportSummary,
    ImportSummary,
    imported_state,
    name_of,
    private_terms,
)
from keepwarm.engine.chat import (
    Prompt,
    continue_ids,
    continue_line,
    truncate,
    validate_messages,
    with_reply,
)
from keepwarm.engine.keeper import AgentKeeper
from keepwarm.engine.output import ReplyText, validate_stop
from keepwarm.engine.requests import (
    PromptSource,
    valid_agent_id,
    valid_max_tokens,
    valid_priority,
    valid_sampling,
    valid_text,
    valid_token_ids,
)
from keepwarm.engine.tiers import TierCounters, Tiers
from keepwarm.engine.verifying import ColdRun, Verifier, VerifyReport

STORE_WAIT_S = 0.05

Answer = TypeVar("Answer", BundleWritten, BundleRead, BundleStored)

CANONICAL_LINEAGE = "exact-canonical"
"""Blocks computed in canonical shapes differ in their last bits: they have other hashes."""


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine at one moment, for people and metrics."""

    num_waiting: int
    num_running: int
    agents: tuple[AgentView, ...]
    pool: PoolSnapshot
    tiers: TierCounters
    batch: BatchCounters
    store: StoreHealth


class BlockPoolBatchEngine:
    """Continuous batching over agents that keep their KV in blocks.

    Everything happens in the caller's thread, and in `step`; the engine has no lock and must be
    used from one thread, the one that loaded the model. `batch_gen_factory` replaces the model's
    generator. `deterministic=True` computes in canonical shapes: the same bits whatever the chunks,
    the batch and the history (on the CPU).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        pool: BlockPool,
        store: AgentStore | None = None,
        config: EngineConfig | None = None,
        batch_gen_factory: BatchGenFactory | None = None,
        deterministic: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config or EngineConfig()
        self._loaded = loaded
        self._tokenizer = loaded.tokenizer
        self._clock = clock
        factory = batch_gen_factory or loaded.batch_gen_factory
        lineage = CANONICAL_LINEAGE if deterministic else "exact"
        family = KVFamily(loaded.fingerprint, loaded.layout, lineage)
        self._family = family
        self._kv_bound = kv_bound(loaded.layout.dtype, deterministic=deterministic)
        self._store = store or NoStore()
        self.tiers = Tiers(
            pool, factory(deterministic=deterministic), family=family, store=self._store
        )
        self.batch = Batch(
            self.tiers,
            new_generator=lambda: factory(deterministic=deterministic),
            config=self.config,
            clock=clock,
        )
        self._keeper = AgentKeeper(
            self._store,
            tokenizer=loaded.tokenizer.fingerprint,
            root_of=self.tiers.root_of,
            new_blocks=self.tiers.new_line,
        )
        self._book = AgentBook(
            new_blocks=self.tiers.new_line,
            forget=self.tiers.forget,
            load=self._keeper.load,
            max_side_lines=self.config.max_side_lines,
            max_anonymous_lines=self.config.max_anonymous_lines,
        )
        self._active: dict[str, ActiveRequest] = {}
        self._prefetching: dict[str, Line] = {}
        self._verifier = Verifier(
            self.tiers,
            self._store,
            chunk_tokens=self.config.prefill_chunk_tokens,
            hear=self._hear_store,
        )
        self._uncommitted: dict[int, Completed | None] = {}
        self._answers: dict[int, BundleEvent] = {}
        self._durable = True
        self._events: list[Event] = []
        self._stalled = False
        self._ids = itertools.count(1)

    def __repr__(self) -> str:
        return f"BlockPoolBatchEngine({self._loaded.name}: {self.batch!r}, {self.tiers!r})"

    # -- requests --------------------------------------------------------------------------------

    def submit(
        self,
        *,
        agent_id: str | None = None,
        messages: Sequence[Message] | None = None,
        append: Sequence[Message] | None = None,
        text: str | None = None,
        token_ids: Sequence[int] | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        priority: int | None = None,
    ) -> str:
        """Queue a request and return its id; its events come from `step`.

        The prompt is one of `messages` (the whole conversation), `append` (new messages for the
        agent's main line), `text` or `token_ids`. Without `agent_id` it is anonymous: blocks are
        found by content. `max_tokens` None lets the reply fill the context; `priority` None is the
        agent's own.

        Raises InvalidRequest (ContextTooLong, NeverFits), AgentBusy (`append` while the main line
        runs), UnknownAgent (`append` to nobody) and QueueFull; nothing is taken when it raises.
        """
        source = PromptSource(messages=messages, append=append, text=text, token_ids=token_ids)
        agent_id = valid_agent_id(agent_id)
        wanted_tokens = valid_max_tokens(max_tokens)
        sampling = valid_sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
        )
        stops = validate_stop(stop)
        priority = self._priority(agent_id, priority)
        if len(self.batch.waiting) >= self.config.max_waiting:
            raise QueueFull(num_waiting=len(self.batch.waiting))
        choice, conversation = self._choose(agent_id, source)
        prompt_ids = list(choice.prompt.token_ids)
        max_tokens = self._fit(len(prompt_ids), wanted_tokens)

        line = choice.line or self._book.open_line(agent_id)
        line.in_use = True
        number = next(self._ids)
        sequence = TokenSequence(
            request_id=f"req-{number}",
            agent_id=agent_id,
            arrival=number,
            token_ids=prompt_ids,
            num_prompt_tokens=len(prompt_ids),
            max_tokens=max_tokens,
            sampling=sampling,
            priority=priority,
            blocks=line.blocks,
            known_ids=line.transcript.token_ids,
            submitted_s=self._clock(),
        )
        reply = ReplyText(self._tokenizer.detokenizer(), stops)
        self._active[sequence.request_id] = ActiveRequest(
            sequence, line, choice.prompt, conversation, reply
        )
        self.batch.enqueue(sequence)
        self._stalled = False
        return sequence.request_id

    def cancel(self, request_id: str) -> bool:
        """End a request now; its Completed comes with the next step. False when it had ended."""
        active = self._active.get(request_id)
        if active is None:
            return False
        active.reply.cancel()
        self._finish(active, FinishReason.CANCELLED)
        return True

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything, or events wait to be fetched."""
        return bool(self._active or self._events or self._uncommitted or self._prefetching)

    def step(self) -> list[Event]:
        """One decode step for every ready row, some prefill beside it, and what came of them.

        Waits briefly when there is nothing to do but to hear from the store.
        """
        if self._stalled:
            self._store.wait(STORE_WAIT_S)
        self._take_store_events()
        outcomes = self.batch.step()
        for outcome in outcomes:
            self._take_outcome(outcome)
        self.tiers.save_some(self.config.save_bytes_per_step)
        self._take_store_events()
        events, self._events = self._events, []
        self._stalled = not (outcomes or events) and self.batch.only_waits
        return events

    # -- agents ----------------------------------------------------------------------------------

    def agents(self) -> tuple[AgentView, ...]:
        """All agents, those that are only on disk as well."""
        here = [self._view(agent) for agent in self._book]
        there = [
            view_of_summary(summary)
            for summary in self._store.summaries()
            if not self._book.is_here(summary.agent_id)
        ]
        return (*here, *there)

    def agent(self, agent_id: str) -> AgentView:
        """Raises UnknownAgent."""
        return self._view(self._book.get(agent_id))

    def _view(self, agent: Agent) -> AgentView:
        namespace = agent.main.blocks.namespace
        return self._book.view(agent, lambda ids: self.tiers.stored_tokens(ids, namespace))

    def fork(self, agent_id: str, new_id: str, *, at_turn: int | None = None) -> None:
        """A new agent that knows what this one knew after `at_turn` turns (None: all of them).

        Whole blocks are shared by reference. Raises UnknownAgent, AgentBusy, AgentExists and
        InvalidRequest.
        """
        parent = self._idle_agent(agent_id, "fork it")
        if valid_agent_id(new_id) is None:
            raise InvalidRequest("new_id", "a fork needs a name")
        self._check_is_new(new_id)
        num_tokens, messages = self._position(parent, at_turn)
        main = parent.main
        child = Line(
            self.tiers.fork(main.blocks, _held(main, num_tokens), new_id),
            truncate(main.transcript, num_tokens),
            messages,
        )
        turns = [turn for turn in parent.turns if turn.num_tokens <= num_tokens]
        self._commit(self._book.add(Agent(new_id, child, turns=turns)))

    def rollback(self, agent_id: str, *, turn: int) -> None:
        """Forget everything after `turn` turns. Raises UnknownAgent, AgentBusy, InvalidRequest."""
        agent = self._idle_agent(agent_id, "roll it back")
        num_tokens, messages = self._position(agent, turn)
        main = agent.main
        main.transcript = truncate(main.transcript, num_tokens)
        main.messages = messages
        del agent.turns[turn:]
        self.tiers.truncate(main.blocks, _held(main, num_tokens))
        self._commit(agent)

    def demote(self, agent_id: str) -> None:
        """Turn the agent's slab into blocks now, as memory pressure would. Raises AgentBusy."""
        blocks = self._idle_agent(agent_id, "demote it").main.blocks
        if blocks.slab is not None:
            self.tiers.demote(blocks)

    def park(self, agent_id: str) -> None:
        """Save the agent and free its memory when the disk has it. Raises AgentBusy.

        What the disk does not take stays in memory.
        """
        agent = self._idle_agent(agent_id, "park it")
        for line in agent.lines:
            self.tiers.put_away(line.blocks)

    def prefetch(self, agent_id: str) -> None:
        """Bring the agent's KV into a slab, so that its next turn resumes hot; in the background.

        Raises UnknownAgent, and AgentBusy while its main line runs.
        """
        line = self._book.get(agent_id).main
        if line.in_use:
            raise AgentBusy(agent_id, "prefetch it")
        number = next(self._ids)
        sequence = prefetch_sequence(number, line.blocks, line.transcript.token_ids)
        if sequence is None:
            return
        line.in_use = True
        self._prefetching[sequence.request_id] = line
        self.batch.enqueue(sequence)
        self._stalled = False

    def forget_cache(self, agent_id: str) -> None:
        """Drop the agent's KV and keep what it said: its next turn is prefilled from the start.

        What lies on disk stays there and is found again by content.
        """
        self.tiers.truncate(self._idle_agent(agent_id, "empty its cache").main.blocks, 0)

    def pin(self, agent_id: str, *, pinned: bool = True) -> None:
        """Never evict the agent's blocks (its slab may still become blocks)."""
        self.configure(agent_id, pinned=pinned)

    def configure(
        self,
        agent_id: str,
        *,
        pinned: bool | None = None,
        priority: int | None = None,
        quota_bytes: int | None = None,
    ) -> None:
        """Change the agent's settings; None leaves one as it is. Raises UnknownAgent."""
        agent = self._book.get(agent_id)
        old = agent.settings
        agent.settings = AgentSettings(
            pinned=old.pinned if pinned is None else pinned,
            priority=old.priority if priority is None else valid_priority(priority),
            quota_bytes=old.quota_bytes if quota_bytes is None else quota_bytes,
            policy=old.policy,
        )
        agent.main.blocks.pinned = agent.settings.pinned
        self._commit(agent)

    def delete(self, agent_id: str) -> None:
        """The agent and what only it owned are gone, from the disk as well.

        Raises UnknownAgent, AgentBusy.
        """
        self._idle_agent(agent_id, "delete it")
        self._book.remove(agent_id)
        self._uncommitted[self._store.delete_agent(agent_id)] = None

    # -- agents as data --------------------------------------------------------------------------

    def export(self, agent_id: str, path: Path | str, *, timeout_s: float = 30.0) -> ExportSummary:
        """Write the agent with its KV into one file, for another machine.

        What the disk has not taken within `timeout_s` is left out and counted. Waits for the disk,
        so nothing else runs meanwhile. Raises UnknownAgent, AgentBusy, NoAgentStore, BundleFailed.
        """
        agent = self._idle_agent(agent_id, "export it")
        self._save_lines(agent, timeout_s)
        state, path = self._keeper.state_of(agent), Path(path)
        tokenizer = self._tokenizer.fingerprint
        ticket = self._store.write_bundle(self._family, tokenizer, state, path)
        written = self._answer(ticket, BundleWritten)
        held = [_held(line, line.transcript.num_tokens) for line in agent.lines]
        stored = [self._num_stored(line) for line in agent.lines]
        missing = (max(a - b, 0) for a, b in zip(held, stored, strict=True))
        return ExportSummary(
            agent_id, path, written.file_bytes, written.num_records, sum(stored), sum(missing)
        )

    def import_agent(self, path: Path | str, agent_id: str | None = None) -> ImportSummary:
        """Make an agent of a file that `export` wrote, anywhere; None keeps its name.

        Nobody else finds its KV before `verify` has recomputed it. Of another model only what was
        said is kept. Waits for the disk, so nothing else runs meanwhile. Raises BadBundle (nothing
        is left behind), AgentExists, InvalidRequest, NoAgentStore, BundleFailed.
        """
        self._check_is_new(valid_agent_id(agent_id))
        terms = private_terms(self._family, self._tokenizer.fingerprint, self._loaded.vocab_size)
        bundle = self._answer(self._store.read_bundle(Path(path), terms), BundleRead).bundle
        if bundle is None:
            raise InvariantBroken(f"the store answered for {path} without a bundle")
        name = agent_id or name_of(bundle)
        self._check_is_new(name)
        stored = self._answer(self._store.store_bundle(bundle, name), BundleStored)
        state = imported_state(bundle, name, stored.num_records)
        agent = self._book.add(self._keeper.agent_of(state))
        self._commit(agent)
        return ImportSummary(
            agent_id=name,
            num_tokens=agent.main.transcript.num_tokens,
            num_turns=len(agent.turns),
            num_records=stored.num_records,
            num_dropped=bundle.num_dropped,
            num_left_out=len(bundle.records) - stored.num_records,
            is_durable=self.flush(),
        )

    def verify(self, agent_id: str) -> VerifyReport:
        """Compute the agent's main line cold and compare with what memory and disk hold of it.

        Blocks that differ by more than legitimate computations may are dropped: a cache may forget,
        never lie. An imported agent that passes is shared from then on, by the KV that was computed
        here. Takes as long as a prefill, and nothing else runs meanwhile. Raises UnknownAgent,
        AgentBusy, GeneratorFailed, and PoolExhausted without room for a second copy of the line.
        """
        agent = self._idle_agent(agent_id, "verify it")
        main = agent.main
        token_ids = main.transcript.token_ids
        num_held = _held(main, len(token_ids))
        with self._verifier.run(main.blocks, token_ids, num_held) as cold:
            report = self._report(agent, cold)
            if not report.passed:
                self._drop_differing(main, cold, report)
            elif report.became_shared:
                self._share(agent, cold)
        return report

    def _report(self, agent: Agent, cold: ColdRun) -> VerifyReport:
        main = agent.main
        report = VerifyReport(
            agent_id=agent.agent_id,
            num_tokens=main.transcript.num_tokens,
            num_compared=sum(check.num_tokens for check in cold.checks if check.is_compared),
            bound=self._kv_bound,
            blocks=cold.checks,
        )
        return replace(report, became_shared=report.passed and bool(main.blocks.namespace))

    def _drop_differing(self, main: Line, cold: ColdRun, report: VerifyReport) -> None:
        depth = report.differing[0]
        self.batch.set_back(self.tiers.owners_of(main.blocks, depth))
        self.tiers.distrust(main.blocks, depth)
        self._store.drop(cold.records_at(report.differing))

    def _share(self, agent: Agent, cold: ColdRun) -> None:
        """What was computed here takes the place of what was imported.

        Lines and forks that still use imported blocks keep those to themselves.
        """
        imported = agent.main.blocks
        agent.main.blocks = self._verifier.take(cold)
        agent.main.blocks.pinned = imported.pinned
        self.tiers.forget(imported)
        self._commit(agent)
        self._store.drop([record.hash for record in cold.records], if_unused=True)

    def _save_lines(self, agent: Agent, timeout_s: float) -> None:
        """Wait until the disk has taken the agent and its KV, as far as it does in time."""
        until = time.monotonic() + timeout_s
        lines = [line.blocks for line in agent.lines]
        for blocks in lines:
            self.tiers.offer_line(blocks)
        while any(map(self.tiers.is_unsaved, lines)) and time.monotonic() < until:
            self.tiers.save_some()
            self._hear_store()
        self.flush(max(until - time.monotonic(), 0.0))

    def _num_stored(self, line: Line) -> int:
        return self.tiers.stored_tokens(line.transcript.token_ids, line.blocks.namespace)

    def _check_is_new(self, agent_id: str | None) -> None:
        if agent_id is not None and agent_id in self._book:
            raise AgentExists(agent_id)

    def _answer(self, ticket: int, kind: type[Answer]) -> Answer:
        """The store's answer; its error is raised."""
        while ticket not in self._answers:
            self._hear_store()
        answer = self._answers.pop(ticket)
        if not isinstance(answer, kind):
            raise InvariantBroken(f"ticket {ticket} was answered with {answer}")
        if answer.error is not None:
            raise answer.error
        return answer

    def _hear_store(self) -> None:
        self._store.wait(STORE_WAIT_S)
        self._take_store_events()

    # -- the store -------------------------------------------------------------------------------

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until every change so far is committed. Returns whether the disk took them all."""
        until = time.monotonic() + timeout_s
        while self._uncommitted and time.monotonic() < until:
            self._hear_store()
        return not self._uncommitted and self._durable

    def close(self, timeout_s: float = 60.0) -> bool:
        """Save every line's KV to its last token, before a shutdown; the store stays open.

        Returns whether all of it was taken by the disk in time.
        """
        self.tiers.offer_tails()
        until = time.monotonic() + timeout_s
        while len(self.tiers.saves) and time.monotonic() < until:
            self.tiers.save_some()
            self._hear_store()
        return self.flush(max(until - time.monotonic(), 1.0)) and not len(self.tiers.saves)

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            num_waiting=len(self.batch.waiting),
            num_running=len(self.batch.running),
            agents=self.agents(),
            pool=self.tiers.pool.snapshot(),
            tiers=self.tiers.counters,
            batch=self.batch.counters,
            store=self._store.health(),
        )

    def check(self) -> None:
        """Raise InvariantBroken when any of the bookkeeping contradicts itself."""
        self.tiers.check()
        self.batch.check()
        self._store.check()

    # -- inside ----------------------------------------------------------------------------------

    def _take_outcome(self, outcome: Outcome) -> None:
        request_id = outcome.sequence.request_id
        active = self._active.get(request_id)
        if active is None:
            self._end_prefetch(outcome)
        elif isinstance(outcome, Sampled):
            self._take_token(active, outcome.token_id)
        elif isinstance(outcome, Advanced):
            self._events.append(active.progress())
        elif isinstance(outcome, Broken):
            self._fail(active, outcome.error)

    def _end_prefetch(self, outcome: Outcome) -> None:
        """It is complete, or it failed, which costs nothing but the time."""
        if isinstance(outcome, Restored | Broken):
            line = self._prefetching.pop(outcome.sequence.request_id, None)
            if line is not None:
                line.in_use = False
                if line.blocks.busy:
                    self.tiers.park(line.blocks)

    def _take_store_events(self) -> None:
        for event in self._store.poll():
            if isinstance(event, Saved):
                self.tiers.saves.note(event.record_hash, retry=event.retry)
            elif isinstance(event, Fetched):
                self.tiers.fetches.note(event)
            elif isinstance(event, Committed):
                self._take_committed(event)
            else:
                self._answers[event.ticket] = event
        self.tiers.release_put_away()

    def _take_committed(self, event: Committed) -> None:
        self._durable = event.durable
        completed = self._uncommitted.pop(event.ticket)
        if completed is not None:
            self._events.append(replace(completed, durable=event.durable))

    def _commit(self, agent: Agent, completed: Completed | None = None) -> None:
        """Write the agent; the turn's final event is sent when the disk has answered."""
        self._uncommitted[self._keeper.commit(agent)] = completed

    def _priority(self, agent_id: str | None, priority: int | None) -> int:
        if priority is not None:
            return valid_priority(priority)
        agent = self._book.find(agent_id) if agent_id is not None else None
        return agent.settings.priority if agent is not None else 0

    def _choose(
        self, agent_id: str | None, source: PromptSource
    ) -> tuple[Choice, tuple[Message, ...] | None]:
        """The line to continue and its prompt, and the conversation where it is known."""
        if source.append is not None:
            return self._choose_main(agent_id, validate_messages(source.append))
        conversation = None if source.messages is None else validate_messages(source.messages)
        return self._book.choose(agent_id, self._prompt_maker(source, conversation)), conversation

    def _choose_main(
        self, agent_id: str | None, new: tuple[Message, ...]
    ) -> tuple[Choice, tuple[Message, ...]]:
        if agent_id is None:
            raise InvalidRequest("append", "needs an agent_id: only an agent has a history")
        main = self._book.get(agent_id).main
        if main.in_use:
            raise AgentBusy(agent_id, "append to it")
        if main.messages is None:
            raise InvalidRequest("append", "this agent's last prompt was not given as messages")
        conversation = (*main.messages, *new)
        make_prompt = self._prompt_maker(PromptSource(messages=conversation), conversation)
        return Choice(main, make_prompt(main.transcript)), conversation

    def _prompt_maker(
        self, source: PromptSource, conversation: tuple[Message, ...] | None
    ) -> Callable[[Transcript], Prompt]:
        if source.token_ids is not None:
            ids = valid_token_ids(source.token_ids, self._loaded.vocab_size)
            return lambda known: continue_ids(known, ids)
        if conversation is not None:
            pieces = self._tokenizer.render(conversation)
        else:
            pieces = self._tokenizer.split(valid_text(source.text or ""))
        # Every line of the agent is asked, and most spans of the prompt are new to most of them.
        encode = cache(self._tokenizer.encode)
        return lambda known: continue_line(known, pieces, encode)

    def _fit(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """How long the reply may be: as asked for, within the context and the memory budget."""
        context = self._loaded.max_context_tokens
        if num_prompt_tokens >= context:
            raise ContextTooLong(num_prompt_tokens=num_prompt_tokens, max_context_tokens=context)
        budget = self.tiers.pool.budget_bytes
        needed = self._slab_bytes(num_prompt_tokens + 1)
        if needed > budget:
            raise NeverFits(needed_bytes=needed, budget_bytes=budget)
        num_blocks = budget // self._loaded.layout.block_bytes
        while self._slab_bytes(num_blocks * BLOCK_TOKENS) > budget:
            num_blocks -= 1
        room = min(context, num_blocks * BLOCK_TOKENS) - num_prompt_tokens
        return room if max_tokens is None else min(max_tokens, room)

    def _slab_bytes(self, num_tokens: int) -> int:
        return self.tiers.generator.slab_bytes(capacity_for(num_tokens))

    def _take_token(self, active: ActiveRequest, token_id: int) -> None:
        sequence = active.sequence
        sequence.append(token_id)
        if sequence.first_token_s is None:
            sequence.first_token_s = self._clock()
        if token_id in self._tokenizer.eos_token_ids:
            self._finish(active, FinishReason.STOP)
            return
        emitted = active.reply.push(token_id)
        if emitted:
            self._events.append(active.delta(emitted))
        if active.reply.stopped_by is not None:
            self._finish(active, FinishReason.STOP)
        elif len(sequence.reply_ids) >= sequence.max_tokens:
            self._finish(active, FinishReason.LENGTH)

    def _finish(self, active: ActiveRequest, reason: FinishReason) -> None:
        """Send what was held back, keep the turn, and let the line rest."""
        if reason is not FinishReason.CANCELLED and (emitted := active.reply.finish()):
            self._events.append(active.delta(emitted))
        self.batch.leave(active.sequence)
        is_kept = active.sequence.admitted_s is not None and self._keep_turn(active)
        completed = active.completed(reason, self._clock())
        self._close(active)
        if is_kept and active.agent_id is not None:
            self._commit(self._book.get(active.agent_id), completed)
        else:
            self._events.append(completed)

    def _keep_turn(self, active: ActiveRequest) -> bool:
        """The line knows the prompt and the reply as sent, by the ids that were fed for them.

        A request that was cancelled before its first token leaves the conversation as it was; what
        it computed stays with the line's blocks. Returns whether there is a turn to commit.
        """
        line = active.line
        reply = active.reply.reply
        self.tiers.truncate(line.blocks, active.num_kept_tokens)
        if active.sequence.first_token_s is None:
            return False
        conversation = history(active.messages, reply.text)
        echo = (
            self._tokenizer.render(conversation, add_generation_prompt=False)
            if conversation is not None
            else ()
        )
        line.transcript = with_reply(active.prompt.transcript, reply, echo)
        num_kept = active.prompt.num_shared
        self._book.record_turn(active.agent_id, line, num_kept, conversation)
        return True

    def _fail(self, active: ActiveRequest, error: Exception) -> None:
        """The conversation stays as it was before the request; what was computed can be found."""
        self._events.append(active.failed(error))
        self._close(active)

    def _close(self, active: ActiveRequest) -> None:
        if active.line.blocks.busy:
            self.tiers.park(active.line.blocks)
        active.line.in_use = False
        del self._active[active.request_id]
        self._book.tidy(active.agent_id)

    def _idle_agent(self, agent_id: str, action: str) -> Agent:
        agent = self._book.get(agent_id)
        if agent.in_use:
            raise AgentBusy(agent_id, action)
        return agent

    def _position(self, agent: Agent, turn: int | None) -> tuple[int, tuple[Message, ...] | None]:
        """Tokens and messages after so many turns."""
        if turn is None:
            return agent.main.transcript.num_tokens, agent.main.messages
        if not 0 <= turn <= len(agent.turns):
            raise InvalidRequest("turn", f"{turn} is not from 0 to {len(agent.turns)}")
        if turn == 0:
            return 0, ()
        end = agent.turns[turn - 1]
        return end.num_tokens, end.messages


def _held(line: Line, num_tokens: int) -> int:
    """How many of the conversation's first tokens the line's KV really is of.

    A request that failed or was cancelled may have left the KV of another continuation.
    """
    return common_prefix(line.blocks.token_ids, line.transcript.token_ids[:num_tokens])

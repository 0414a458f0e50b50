"""BlockPoolBatchEngine: requests in, events out, and every agent's memory kept between them."""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from keepwarm.core.agent_store import AgentStore, NoStore
from keepwarm.core.errors import (
    AgentBusy,
    DamagedAgent,
    EngineStopped,
    InvalidRequest,
    QueueFull,
)
from keepwarm.core.events import Event
from keepwarm.core.fidelity import kv_bound
from keepwarm.core.policies import EngineConfig
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import BatchGenFactory, LoadedModel, Message
from keepwarm.core.sequence import TokenSequence
from keepwarm.core.stored import (
    DEFAULT_SETTINGS,
    AgentSettings,
    AgentState,
    KVFamily,
    Overflow,
)
from keepwarm.core.transcript import Turn
from keepwarm.engine.agents.agent_keeper import AgentKeeper
from keepwarm.engine.agents.book import Agent, AgentBook, AgentView, Line, view_of_summary
from keepwarm.engine.agents.bundles import ExportSummary, ImportSummary
from keepwarm.engine.agents.store_inbox import Commit, StoreInbox
from keepwarm.engine.agents.transfer import AgentPorter
from keepwarm.engine.agents.verification import AgentVerifier, VerifyQueue
from keepwarm.engine.jobs import Jobs
from keepwarm.engine.prompt.continuation import opening, truncate, validate_messages
from keepwarm.engine.prompt.encoding import Guard
from keepwarm.engine.prompt.prompt_reader import PromptReader
from keepwarm.engine.prompt.reply_text import ReplyText
from keepwarm.engine.prompt.stop_strings import validate_stop
from keepwarm.engine.requests import (
    GenerateRequest,
    PromptSource,
    ReceiptKey,
    valid_agent_id,
    valid_max_tokens,
    valid_namespace,
    valid_sampling,
    valid_settings,
)
from keepwarm.engine.snapshot import EngineSnapshot
from keepwarm.engine.turn.active_request import ActiveRequest
from keepwarm.engine.turn.intake import Intake, Reading
from keepwarm.engine.turn.prefetcher import Prefetcher
from keepwarm.engine.turn.turns import Turns
from keepwarm.kv.batch import Batch, Outcome
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.tiers import Tiers
from keepwarm.kv.verifier import VerifyReport

T = TypeVar("T")

CANONICAL_LINEAGE = "exact-canonical"
"""Blocks computed in canonical shapes differ in their last bits: they have other hashes."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """An agent's line whose KV is to be computed in advance, and what finds its ids."""

    line: Line
    read: Callable[[Guard], tuple[int, ...]]


class BlockPoolBatchEngine:
    """Continuous batching over agents that keep their KV in blocks.

    Everything happens in the caller's thread, and in `step`; the engine has no lock and must be
    used from one thread. A change of an agent returns its `Commit`, whose `durable` is known when a
    later step, or `flush`, has heard the disk. `batch_gen_factory` replaces the model's generator.
    `deterministic=True` computes in canonical shapes: the same bits whatever the chunks, the batch
    and the history (on the CPU). `request_ids` is for engines that share a thread. `recorded_as` is
    the model's name in what is committed of agents that talked to it last; empty for a server's
    default one.

    `suspend` gives the weights back and `resume` takes the same ones again: in between everything
    works that computes nothing, and whatever ran waits.
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
        request_ids: Iterator[int] | None = None,
        recorded_as: str = "",
    ) -> None:
        self.config = config or EngineConfig()
        self._model = GeneratorSource(loaded, batch_gen_factory, deterministic=deterministic)
        loaded = self._model.facts
        self._loaded = loaded
        self._tokenizer = loaded.tokenizer
        self._clock = clock
        lineage = CANONICAL_LINEAGE if deterministic else "exact"
        family = KVFamily(loaded.fingerprint, loaded.layout, lineage)
        self._family = family
        self._store = store or NoStore()
        self.tiers = Tiers(pool, self._model.new_generator(), family=family, store=self._store)
        self.batch = Batch(
            self.tiers,
            new_generator=self._model.new_generator,
            config=self.config,
            clock=clock,
            make_way=self.make_way,
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
            give_way=self._give_way,
            max_side_lines=self.config.max_side_lines,
            max_anonymous_lines=self.config.max_anonymous_lines,
            model=recorded_as,
        )
        self._link = StoreInbox(self._store, self.tiers, self._keeper, emit=self._emit)
        self._porter = AgentPorter(
            loaded,
            family,
            self.tiers,
            store=self._store,
            link=self._link,
            keeper=self._keeper,
            book=self._book,
        )
        verifier = AgentVerifier(
            self.tiers,
            self.batch,
            store=self._store,
            link=self._link,
            bound=kv_bound(loaded.layout.dtype, deterministic=deterministic),
        )
        self._verifies = VerifyQueue(verifier, self.tiers)
        self._intake = Intake(loaded, self._book, self.tiers)
        self._turns = Turns(
            loaded.tokenizer,
            batch=self.batch,
            tiers=self.tiers,
            book=self._book,
            link=self._link,
            emit=self._emit,
            clock=clock,
        )
        self._active = self._turns.active
        self._prefetches = Prefetcher(self.batch, self.tiers)
        self._jobs = Jobs()
        self._events: list[Event] = []
        self._stalled = False
        self._recorded_as = recorded_as
        self._ids = request_ids or itertools.count(1)

    def __repr__(self) -> str:
        return f"BlockPoolBatchEngine({self._loaded.name}: {self.batch!r}, {self.tiers!r})"

    # -- requests --------------------------------------------------------------------------------

    def submit(
        self,
        *,
        agent_id: str | None = None,
        messages: Sequence[Message] | None = None,
        continue_final_message: bool = False,
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
        namespace: str = "",
        receipt_key: ReceiptKey | None = None,
        reading: Reading | None = None,
    ) -> str:
        """Queue a request and return its id; its events come from `step`.

        The prompt is one of `messages` (the whole conversation), `append` (new messages for the
        agent's main line), `text` or `token_ids`. Without `agent_id` it is anonymous: blocks are
        found by content, in the `namespace`; an agent's is a part of its name. With
        `continue_final_message` the last message is the beginning of the reply, which goes on
        with it. `max_tokens` None lets the reply fill the context; `priority` None is the agent's
        own. `receipt_key` is kept with the turn, for `receipt`. `reading` is for a thread that
        others wait for: a long prompt raises ReadElsewhere, and comes again when it was read.

        Raises InvalidRequest (ContextTooLong, NeverFits), AgentBusy (`append` while the main line
        runs), UnknownAgent (`append` to nobody) and QueueFull; nothing is taken when it raises.
        """
        source = PromptSource(
            messages=messages,
            append=append,
            text=text,
            token_ids=token_ids,
            continue_final_message=continue_final_message,
        ).in_repair()
        agent_id = valid_agent_id(agent_id)
        self._book.check_stays(agent_id)
        wanted_tokens = valid_max_tokens(max_tokens)
        sampling = valid_sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
        )
        stops = validate_stop(stop)
        priority = self._intake.priority(agent_id, priority)
        if len(self.batch.waiting) >= self.config.max_waiting:
            raise QueueFull(num_waiting=len(self.batch.waiting))
        namespace = valid_namespace(namespace)
        wanted = self._intake.choose(
            agent_id, source, namespace=namespace, max_tokens=wanted_tokens, reading=reading
        )
        prompt_ids = list(wanted.prompt.token_ids)
        max_tokens = self._intake.reply_tokens(len(prompt_ids), wanted_tokens)
        reply = ReplyText(self._tokenizer.detokenizer(), stops)

        if agent_id is not None:
            self._give_way(agent_id)
        line = wanted.line or self._book.open_line(agent_id, namespace)
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
        active = ActiveRequest(sequence, line, wanted.prompt, wanted.conversation, reply)
        active.locate = wanted.locate
        active.reply_prefix = wanted.reply_prefix
        active.adapted = (*source.mended, *wanted.adapted)
        active.is_new_line = wanted.line is None
        active.num_dropped_turns = wanted.num_dropped_turns
        active.receipt_key = receipt_key
        active.is_appended = source.append is not None
        self._turns.begin(active)
        self._stalled = False
        return sequence.request_id

    def count_tokens(
        self,
        *,
        messages: Sequence[Message] | None = None,
        continue_final_message: bool = False,
        text: str | None = None,
    ) -> int:
        """How many tokens such a prompt has. Raises InvalidRequest."""
        source = PromptSource(
            messages=messages, text=text, continue_final_message=continue_final_message
        ).in_repair()
        return self.reader.num_tokens(source)

    @property
    def reader(self) -> PromptReader:
        """Reads prompts for this model on any thread."""
        return self._intake.reader

    def check_length(self, request: GenerateRequest, reading: Reading | None = None) -> None:
        """Refuse a prompt that is too long as things stand, for a request that has to wait.

        Raises InvalidRequest, UnknownAgent, and ReadElsewhere as `submit` does.
        """
        self._intake.check_length(
            request.agent_id,
            request.source,
            namespace=request.namespace,
            max_tokens=request.max_tokens,
            reading=reading,
        )

    def cancel(self, request_id: str) -> bool:
        """End a request now; its Completed comes with the next step. False when it had ended."""
        return self._turns.cancel(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything, or events wait to be fetched."""
        is_running = not self.is_suspended and bool(
            self._active or self._prefetches or self._verifies
        )
        is_waited_for = bool(self._events) or self._link.is_committing or self._jobs.is_ready
        return is_running or is_waited_for

    @property
    def num_active(self) -> int:
        """How many requests have not ended."""
        return len(self._active)

    @property
    def is_suspended(self) -> bool:
        return self.batch.is_suspended

    @property
    def has_chores(self) -> bool:
        """Whether the store is at work for this engine: `step` has to be called now and then.

        Not without pause: the store's thread needs the interpreter, too.
        """
        return self.tiers.saves.is_busy or bool(len(self.tiers.saves)) or bool(self._jobs)

    def step(self, *, may_wait: bool = True) -> list[Event]:
        """One decode step for every ready row, some prefill beside it, and what came of them.

        Waits briefly when there is nothing to do but to hear from the store, if it may.
        """
        if may_wait and self._stalled and self.has_work:
            self._link.wait()
        self._link.take_events()
        outcomes = self.batch.step()
        for outcome in outcomes:
            self._take_outcome(outcome)
        has_verified = self._verifies.advance(self.batch.spare_tokens)
        self.tiers.save_some(self.config.save_bytes_per_step)
        self._link.take_events()
        self._jobs.advance()
        events, self._events = self._events, []
        is_idle = not (outcomes or events or has_verified or self._jobs.is_ready)
        self._stalled = is_idle and self.batch.only_waits
        return events

    # -- the model -------------------------------------------------------------------------------

    def suspend(self, timeout_s: float = 60.0) -> bool:
        """Give the weights back. What runs waits, and all KV leaves memory for the disk.

        Returns whether the disk took everything in time; what it did not take stays in memory.
        Whatever raises leaves the engine as it was, but for rows that wait.
        """
        self.batch.suspend()
        try:
            self._prefetches.call_off()
            self._verifies.call_off("its model was put out of memory")
            self.tiers.put_all_away()
        except BaseException:
            self.batch.resume()
            raise
        until = time.monotonic() + timeout_s
        self._link.save_while(lambda: bool(len(self.tiers.saves)), until)
        is_saved = self.flush(max(until - time.monotonic(), 1.0)) and not len(self.tiers.saves)
        self.tiers.drop_spares()
        self.tiers.generator.release_model()
        self._model.leave()
        self._stalled = False
        return is_saved

    def resume(self, loaded: LoadedModel) -> None:
        """Take the weights again, which must be the same. What waited goes on."""
        self._model.take(loaded)
        self.tiers.generator = self._model.new_generator()
        self.batch.resume()
        self._stalled = False

    @property
    def model(self) -> str:
        """Its name."""
        return self._loaded.name

    @property
    def fingerprint(self) -> str:
        """Of the model."""
        return self._loaded.fingerprint

    def abandon(self, error: Exception) -> list[Event]:
        """End all requests and jobs with this error: their model does not come back."""
        self._turns.abandon(error)
        self._jobs.abandon(error)
        events, self._events = self._events, []
        return events

    # -- agents ----------------------------------------------------------------------------------

    def holds(self, agent_id: str) -> bool:
        """Whether the agent is in this engine's memory, be it only by what it said."""
        return self._book.is_here(agent_id)

    def is_in_use(self, agent_id: str) -> bool:
        """Whether one of its lines runs, or waits to."""
        return self.holds(agent_id) and self._book.get(agent_id).in_use

    def is_leaving(self, agent_id: str) -> bool:
        """Whether the agent's deletion is on its way to the disk."""
        return self.holds(agent_id) and self._book.get(agent_id).is_leaving

    def state_of(self, agent_id: str) -> AgentState:
        """What another engine needs to go on with the agent. Raises UnknownAgent, AgentBusy."""
        return self._keeper.state_of(self._book.get_idle(agent_id, "move it to another model"))

    def adopt(self, state: AgentState) -> None:
        """Go on with an agent as another engine left it; what this one holds of its KV stays.

        It is committed as it is now, and counts as used last. Raises AgentBusy.
        """
        agent = self._take_over(state)
        self.tiers.touch(agent.main.blocks)
        self._link.commit(agent)

    def _take_over(self, state: AgentState) -> Agent:
        old = None
        if self.holds(state.agent_id):
            old = self._book.get_idle(state.agent_id, "move it to another model")
        self.tiers.catch_up(state.last_used)
        agent = self._keeper.agent_of(state)
        if old is not None:
            self._book.hand_over(old, agent)
        return self._book.add(agent)

    def leave(self, agent_id: str) -> None:
        """Another engine goes on with the agent: what this one had to say of it is not written."""
        if self.holds(agent_id):
            self._book.get(agent_id).has_left = True

    def let_go(self, agent_id: str) -> None:
        """Forget an agent that another engine has deleted."""
        if self.holds(agent_id):
            self._book.get_idle(agent_id, "delete it").has_left = True
            self._book.remove(agent_id)

    @property
    def is_stalled(self) -> bool:
        """Whether the last step found that there is only the store to wait for."""
        return self._stalled and self.has_work

    def agent_ids(self) -> tuple[str, ...]:
        """Of those in memory."""
        return tuple(agent.agent_id for agent in self._book)

    def last_used(self, agent_id: str) -> int:
        """When the agent's main line was used last; it orders lines. Raises UnknownAgent."""
        return self._book.get(agent_id).main.blocks.last_used

    def agents_here(self) -> tuple[AgentView, ...]:
        """Those in memory."""
        return tuple(self._view(agent) for agent in self._book)

    def models_of_agents(self) -> dict[str, str]:
        """By agent in memory, the name of the model that it talked to last."""
        return {agent.agent_id: agent.model for agent in self._book}

    def agents(self) -> tuple[AgentView, ...]:
        """All agents, those that are only on disk as well."""
        there = [
            view_of_summary(summary).holding(self._store.num_stored(summary.agent_id))
            for summary in self._store.summaries()
            if not self._book.is_here(summary.agent_id)
        ]
        return (*self.agents_here(), *there)

    def agent(self, agent_id: str) -> AgentView:
        """Raises UnknownAgent."""
        return self._view(self._book.get(agent_id))

    def _view(self, agent: Agent) -> AgentView:
        namespace = agent.main.blocks.namespace
        return self._book.view(agent, lambda ids: self.tiers.saver.stored_tokens(ids, namespace))

    def knows(self, agent_id: str) -> bool:
        """Whether there is such an agent, here or on disk."""
        return agent_id in self._book

    def recorded_model(self, agent_id: str) -> str | None:
        """Of the agent, as it is committed; None where there is no such agent."""
        agent = self._book.find(agent_id)
        return agent.model if agent is not None else None

    def turns(self, agent_id: str) -> tuple[Turn, ...]:
        """What the agent's main line has said and heard so far. Raises UnknownAgent."""
        return tuple(self._book.get(agent_id).turns)

    def settings(self, agent_id: str) -> AgentSettings:
        """Raises UnknownAgent."""
        return self._book.get(agent_id).settings

    def system(self, agent_id: str) -> str | None:
        """The system prompt that the agent's conversation opens with. Raises UnknownAgent."""
        messages = opening(self._book.get(agent_id).main.messages)
        return "\n".join(str(message["content"]) for message in messages) or None

    def receipt(self, agent_id: str, key: str) -> Turn | None:
        """The turn that a request with this key ended with, in this run or an earlier one."""
        agent = self._book.find(agent_id)
        turns = reversed(agent.turns) if agent is not None else ()
        return next((turn for turn in turns if turn.receipt and turn.receipt.key == key), None)

    def create(
        self,
        agent_id: str,
        *,
        system: str | None = None,
        settings: AgentSettings = DEFAULT_SETTINGS,
    ) -> Commit:
        """A new agent that has said nothing yet. Raises InvalidRequest and AgentExists."""
        if valid_agent_id(agent_id) is None:
            raise InvalidRequest("agent_id", "an agent needs a name")
        valid_settings(settings)
        self._book.check_is_new(agent_id)
        messages: tuple[Message, ...] = ()
        if system is not None:
            messages = validate_messages([{"role": "system", "content": system}])
        line = Line(self.tiers.new_line(agent_id), messages=messages)
        line.blocks.pinned = settings.pinned
        agent = Agent(agent_id, line, settings=settings, model=self._recorded_as)
        return self._link.commit(self._book.add(agent))

    def fork(self, agent_id: str, new_id: str, *, at_turn: int | None = None) -> Commit:
        """A new agent that knows what this one knew after `at_turn` turns (None: all of them).

        It has the parent's settings but for the pin, and none of its receipts: a key is of one
        agent's request. Whole blocks are shared by reference. Raises UnknownAgent, AgentBusy,
        AgentExists and InvalidRequest.
        """
        parent = self._book.get_idle(agent_id, "fork it")
        if valid_agent_id(new_id) is None:
            raise InvalidRequest("new_id", "a fork needs a name")
        self._book.check_is_new(new_id)
        num_tokens, messages = parent.after_turn(at_turn)
        main = parent.main
        child = Line(
            self.tiers.fork(main.blocks, main.num_held(num_tokens), new_id),
            truncate(main.transcript, num_tokens),
            messages,
            turns=[turn.without_receipt() for turn in parent.turns[:at_turn]],
        )
        settings = parent.settings.of_fork()
        fork = Agent(new_id, child, settings=settings, model=parent.model, has_fixed_main=True)
        return self._link.commit(self._book.add(fork))

    def rollback(self, agent_id: str, *, turn: int) -> Commit:
        """Forget everything after `turn` turns. Raises UnknownAgent, AgentBusy, InvalidRequest."""
        agent = self._book.get_idle(agent_id, "roll it back")
        num_tokens, messages = agent.after_turn(turn)
        main = agent.main
        main.transcript = truncate(main.transcript, num_tokens)
        main.messages = messages
        del agent.turns[turn:]
        agent.has_fixed_main = True
        self.tiers.truncate(main.blocks, main.num_held(num_tokens))
        return self._link.commit(agent)

    def demote(self, agent_id: str) -> None:
        """Turn the agent's slab into blocks now, as memory pressure would. Raises AgentBusy."""
        blocks = self._book.get_idle(agent_id, "demote it").main.blocks
        if blocks.slab is not None:
            self.tiers.demote(blocks)

    def park(self, agent_id: str) -> Commit:
        """Save the agent and free its memory when the disk has it. Raises AgentBusy.

        What the disk does not take stays in memory. The commit is of what was said; KV is saved in
        the background.
        """
        agent = self._book.get_idle(agent_id, "park it")
        for line in agent.lines:
            self.tiers.saver.put_away(line.blocks)
        return self._link.settle(agent)

    def prefetch(self, agent_id: str) -> None:
        """Bring the agent's KV into a slab, so that its next turn resumes hot; in the background.

        Whatever is asked of the agent meanwhile calls it off, and what is there by then stays.
        Raises UnknownAgent, and AgentBusy while its main line runs.
        """
        line = self._book.get_staying(agent_id).main
        if line.in_use:
            raise AgentBusy(agent_id, "prefetch it")
        self._give_way(agent_id)
        self._prefetches.begin(next(self._ids), line, line.transcript.token_ids)
        self._stalled = False

    def begin_building(self, state: AgentState) -> BuildPlan | None:
        """Take over an agent that talks to another engine's model, for when it comes here.

        `read` of the plan can be called on any thread; `build` takes what it returns. None where
        the agent has a quota, so that somebody would have to give way. Raises AgentBusy.
        """
        if state.settings.quota_bytes is not None:
            return None
        agent = self._take_over(state)
        agent.has_left = True
        line = agent.main
        line.blocks.pinned = False  # until it comes
        return BuildPlan(line, partial(self.reader.history_ids, line.messages, line.transcript))

    def build(self, plan: BuildPlan, token_ids: tuple[int, ...]) -> bool:
        """Compute its KV in the background, until `call_off_builds`, where nobody has to give way.

        Memory and disk must have room. Returns whether it was begun.
        """
        num_tokens = len(token_ids)
        if self._intake.would_drop_turns(num_tokens) or not self.has_room_for(num_tokens):
            return False
        self._stalled = False
        return self._prefetches.begin(next(self._ids), plan.line, token_ids, may_compute=True)

    def has_room_for(self, num_tokens: int) -> bool:
        """Whether KV of so many tokens fits into memory and onto the disk as they are."""
        needed_bytes = self._intake.slab_bytes(num_tokens)
        health = self._store.health()
        disk_bytes = health.disk_bytes + health.queued_bytes + needed_bytes
        has_disk = not health.budget_bytes or disk_bytes <= health.budget_bytes
        return has_disk and needed_bytes <= self.tiers.pool.free_bytes

    def has_answered(self, agent_id: str) -> bool:
        """Whether the agent has had a turn here. Raises UnknownAgent."""
        return self._book.get(agent_id).has_answered

    def num_tokens(self, agent_id: str) -> int:
        """Of the agent's main line. Raises UnknownAgent."""
        return self._book.get(agent_id).main.transcript.num_tokens

    @property
    def is_building(self) -> bool:
        return self._prefetches.is_computing

    def call_off_builds(self) -> None:
        """What has been computed stays."""
        self._prefetches.call_off(only_computing=True)

    def forget_cache(self, agent_id: str) -> None:
        """Drop the agent's KV and keep what it said: its next turn is prefilled from the start.

        What lies on disk stays there and is found again by content.
        """
        self.tiers.truncate(self._book.get_idle(agent_id, "empty its cache").main.blocks, 0)

    def pin(self, agent_id: str, *, pinned: bool = True) -> Commit:
        """Never evict the agent's blocks (its slab may still become blocks)."""
        return self.configure(agent_id, pinned=pinned)

    def configure(
        self,
        agent_id: str,
        *,
        pinned: bool | None = None,
        priority: int | None = None,
        quota_bytes: int | None = None,
        overflow: Overflow | None = None,
    ) -> Commit:
        """Change the agent's settings; None leaves one as it is.

        Raises UnknownAgent, AgentLeaving and InvalidRequest.
        """
        agent = self._book.get_staying(agent_id)
        old = agent.settings
        settings = valid_settings(
            replace(
                old,
                pinned=old.pinned if pinned is None else pinned,
                priority=old.priority if priority is None else priority,
                quota_bytes=old.quota_bytes if quota_bytes is None else quota_bytes,
                overflow=old.overflow if overflow is None else overflow,
            )
        )
        return self._decide(agent, settings)

    def lift_quota(self, agent_id: str) -> Commit:
        """Let the agent's own blocks take what they need on disk.

        Raises UnknownAgent and AgentLeaving.
        """
        agent = self._book.get_staying(agent_id)
        return self._decide(agent, replace(agent.settings, quota_bytes=None))

    def _decide(self, agent: Agent, settings: AgentSettings) -> Commit:
        if settings == agent.settings:
            return self._link.settle(agent)
        agent.settings = settings
        agent.main.blocks.pinned = settings.pinned
        return self._link.commit(agent)

    def is_durable(self, agent_id: str) -> bool:
        """Whether the disk has everything that was said to the agent and decided about it."""
        return self._store.is_durable(agent_id)

    def delete(self, agent_id: str) -> Commit:
        """The agent and what only it owned go for good: from memory when the disk has let it go.

        Until then it is busy. Where the disk refuses, it is as it was, in memory as well. One that
        is damaged can be deleted. Raises UnknownAgent, AgentBusy.
        """
        try:
            agent = self._book.get_idle(agent_id, "delete it")
        except DamagedAgent:
            return self._link.delete(agent_id)
        agent.is_leaving = True
        commit = self._link.delete(agent_id)
        commit.then(partial(self._end_deletion, agent))
        return commit

    def _end_deletion(self, agent: Agent, is_done: bool) -> None:
        agent.is_leaving = False
        if is_done:
            self._book.remove(agent.agent_id)

    # -- agents as data --------------------------------------------------------------------------

    def export(self, agent_id: str, path: Path | str, *, timeout_s: float = 30.0) -> ExportSummary:
        """Write the agent with its KV into one file, for another machine.

        It may be in the middle of a reply: then the file has it as its last turn left it. What the
        disk has not taken within `timeout_s` is left out and counted. Waits for the disk, and
        nothing else runs meanwhile; see `begin_export`. Raises UnknownAgent, NoAgentStore,
        BundleFailed.
        """
        answer: Future[ExportSummary] = Future()
        self.begin_export(agent_id, path, answer, timeout_s=timeout_s)
        return self._wait_for(answer)

    def begin_export(
        self,
        agent_id: str,
        path: Path | str,
        answer: "Future[ExportSummary]",
        *,
        timeout_s: float = 30.0,
    ) -> None:
        """The same between steps: the answer gets what `export` returns or raises.

        Where the answer is cancelled, the export is called off and leaves no file.
        """
        self._jobs.begin(self._porter.exporting(agent_id, Path(path), timeout_s), answer)

    def import_agent(
        self, path: Path | str, agent_id: str | None = None, *, namespace: str = ""
    ) -> ImportSummary:
        """Make an agent of a file that `export` wrote, anywhere; None keeps its name.

        `namespace` is then that of the name.

        Nobody else finds its KV before `verify` has recomputed it. Of another model only what was
        said is kept. Waits for the disk, and nothing else runs meanwhile; see `begin_import`.
        Raises BadBundle (nothing is left behind), AgentExists, InvalidRequest, NoAgentStore,
        BundleFailed.
        """
        answer: Future[ImportSummary] = Future()
        self.begin_import(path, agent_id, answer, namespace=namespace)
        return self._wait_for(answer)

    def begin_import(
        self,
        path: Path | str,
        agent_id: str | None,
        answer: "Future[ImportSummary]",
        *,
        namespace: str = "",
        is_taken: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """The same between steps: the answer gets what `import_agent` returns or raises.

        Where the answer is cancelled before the agent is there, nothing is left behind. `is_taken`
        says of a name whether it is another engine's.
        """
        steps = self._porter.importing(Path(path), agent_id, valid_namespace(namespace), is_taken)
        self._jobs.begin(steps, answer)

    def _wait_for(self, answer: "Future[T]") -> T:
        while not answer.done():
            if not self._jobs.is_ready:
                self._link.hear()
            self.tiers.save_some()
            self._jobs.advance()
        return answer.result()

    def verify(self, agent_id: str) -> VerifyReport:
        """Compute the agent's main line cold and compare with what memory and disk hold of it.

        Blocks that differ by more than legitimate computations may are dropped: a cache may forget,
        never lie. An imported agent that passes is shared from then on, by the KV that was computed
        here. Takes as long as a prefill, and no request goes on meanwhile: `begin_verify` runs
        beside them. Raises UnknownAgent, AgentBusy, GeneratorFailed, and PoolExhausted without room
        for a second copy of the line.
        """
        result: Future[VerifyReport] = Future()
        self.begin_verify(agent_id, result)
        while not result.done():
            if not self._verifies.advance(self.config.prefill_chunk_tokens):
                self._link.hear()
        return result.result()

    def begin_verify(self, agent_id: str, result: "Future[VerifyReport]") -> None:
        """Begin to verify the agent, a unit with each `step` that has time for it.

        The result gets what `verify` returns or raises, or VerifyInterrupted when another call
        for the agent came or a request needed the memory. Cancelling the result ends it. Raises
        UnknownAgent and AgentBusy.
        """
        self._verifies.check_is_free(agent_id)
        self._verifies.begin(self._book.get_idle(agent_id, "verify it"), result)
        self._stalled = False

    # -- the store -------------------------------------------------------------------------------

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until every change so far is committed. Returns whether the disk took them all."""
        return self._link.flush(timeout_s)

    def close(self, timeout_s: float = 60.0) -> bool:
        """Save every line's KV to its last token, before a shutdown; the store stays open.

        Exports and imports end here. Returns whether all KV was taken by the disk in time.
        """
        self._verifies.call_off("the server stops")
        self._jobs.abandon(EngineStopped())
        self.tiers.saver.offer_tails()
        until = time.monotonic() + timeout_s
        self._link.save_while(lambda: bool(len(self.tiers.saves)), until)
        is_saved = not len(self.tiers.saves)
        if not is_saved:
            self._log_unsaved()
        return self.flush(max(until - time.monotonic(), 1.0)) and is_saved

    def _log_unsaved(self) -> None:
        """KV is lost with this process, and what was said is not."""
        for agent in self._book:
            num_unsaved = sum(map(self._porter.num_unsaved, agent.lines))
            if num_unsaved:
                _log.warning(
                    "the disk has not taken the KV of %s tokens of agent %r: it is computed again",
                    f"{num_unsaved:,}",
                    agent.agent_id,
                )

    def make_way(self) -> bool:
        """A request lacks memory or a row: end what no request waits for. Returns whether there was
        anything.
        """
        has_prefetched = self._prefetches.call_off()
        return self._verifies.call_off("a request needed the memory") or has_prefetched

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            num_waiting=len(self.batch.waiting),
            num_running=len(self.batch.running),
            pool=self.tiers.pool.snapshot(),
            tiers=replace(self.tiers.counters),
            batch=replace(self.batch.counters),
            store=self._store.health(),
            num_mended_spans=self._intake.num_mended_spans,
        )

    def check(self) -> None:
        """Raise InvariantBroken when any of the bookkeeping contradicts itself."""
        self.tiers.check()
        self.batch.check()
        self._store.check()

    # -- inside ----------------------------------------------------------------------------------

    def _emit(self, event: Event) -> None:
        self._events.append(event)

    def _give_way(self, agent_id: str) -> None:
        """Something is asked of the agent: what goes on beside it ends where it is."""
        self._prefetches.call_off(agent_id=agent_id)
        self._verifies.call_off("something else was asked of the agent", agent_id)

    def _take_outcome(self, outcome: Outcome) -> None:
        active = self._active.get(outcome.sequence.request_id)
        if active is None:
            self._prefetches.take(outcome)
        else:
            self._turns.take(active, outcome)

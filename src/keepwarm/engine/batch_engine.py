"""BlockPoolBatchEngine: requests in, events out, and every agent's memory kept between them."""

import time
from collections.abc import Callable, Iterator, Sequence

from keepwarm.core.agent_store import AgentStore, NoStore
from keepwarm.core.errors import EngineStopped, QueueFull
from keepwarm.core.events import Event
from keepwarm.core.policies import EngineConfig
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import BatchGenFactory, LoadedModel, Message
from keepwarm.engine.agents.book import AgentBook
from keepwarm.engine.parts import EngineParts, Surroundings
from keepwarm.engine.requests import GenerateRequest, PromptSource, ReceiptKey
from keepwarm.engine.snapshot import EngineSnapshot
from keepwarm.engine.turn.intake import Reading
from keepwarm.kv.generator_source import GeneratorSource


class BlockPoolBatchEngine:
    """Continuous batching over agents that keep their KV in blocks.

    Everything happens in the caller's thread, and in `step`; the engine has no lock and must be
    used from one thread. A change of an agent returns its `Commit`, whose `durable` is known when a
    later step, or `flush`, has heard the disk. `batch_gen_factory` replaces the model's generator.
    `deterministic=True` computes in canonical shapes: the same bits whatever the chunks, the batch
    and the history (on the CPU). Engines that share a thread share `request_ids` and the `book` of
    agents, in which an agent is at one of them. `recorded_as` is the model's name in what is
    committed of agents that talked to it last; empty for a server's default one.

    Calls on agents are attributes, bound to the part that answers them: `create`, `fork`,
    `rollback`, `park`, `prefetch`, `configure`, `delete`, `agents`, `turns` and the others of
    `AgentCommands`, `export` and `import_agent` of `Transfers`, `verify` of `Verifications`.

    `suspend` gives the weights back and `resume` takes the same ones again: in between everything
    works that computes nothing, and what ran waits.
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
        book: AgentBook | None = None,
        recorded_as: str = "",
    ) -> None:
        self.config = config or EngineConfig()
        self._model = GeneratorSource(loaded, batch_gen_factory, deterministic=deterministic)
        self._store = store or NoStore()
        given = Surroundings(
            pool=pool,
            store=self._store,
            book=book or AgentBook(self._store),
            config=self.config,
            clock=clock,
            recorded_as=recorded_as,
            request_ids=request_ids,
        )
        parts = EngineParts(self._model, given, deterministic=deterministic)
        self.tiers = parts.tiers
        self.batch = parts.batch
        self.background = parts.background
        self.intake = parts.intake
        self.place = parts.place
        self.building = parts.building
        self.book = parts.book
        self._lines = parts.lines
        self._commits = parts.commits
        self._turns = parts.turns
        self._prefetches = parts.prefetches
        self._verifies = parts.verifies
        self._transfers = parts.transfers
        self._jobs = parts.jobs
        self._events = parts.events
        self._idle_at: tuple[int, int] | None = None
        self._offer_calls(parts)

    def _offer_calls(self, parts: EngineParts) -> None:
        """Offer the calls of the parts that answer for agents as the engine's own.

        They are bound once instead of being written again: each is documented where it is done.
        """
        agents, transfers, verifies = parts.commands, parts.transfers, parts.verifies
        self.agents, self.agent, self.knows = agents.agents, agents.agent, agents.knows
        self.turns, self.settings, self.system = agents.turns, agents.settings, agents.system
        self.receipt, self.is_durable = agents.receipt, agents.is_durable
        self.create, self.fork, self.rollback = agents.create, agents.fork, agents.rollback
        self.pin, self.configure = agents.pin, agents.configure
        self.lift_quota, self.delete = agents.lift_quota, agents.delete
        self.demote, self.park, self.prefetch = agents.demote, agents.park, agents.prefetch
        self.forget_cache = agents.forget_cache
        self.export, self.begin_export = transfers.export, transfers.begin_export
        self.import_agent, self.begin_import = transfers.import_agent, transfers.begin_import
        self.verify, self.begin_verify = verifies.verify, verifies.begin_verify

    def __repr__(self) -> str:
        return f"BlockPoolBatchEngine({self._model.facts.name}: {self.batch!r}, {self.tiers!r})"

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
        runs), UnknownAgent (`append` without such an agent) and QueueFull; nothing is taken when it
        raises.
        """
        asked = GenerateRequest(
            agent_id=agent_id,
            messages=messages,
            continue_final_message=continue_final_message,
            append=append,
            text=text,
            token_ids=token_ids,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            stop=stop,
            priority=priority,
            namespace=namespace,
            receipt_key=receipt_key,
        ).checked()
        if self.batch.num_waiting >= self.config.max_waiting:
            raise QueueFull(num_waiting=self.batch.num_waiting)
        with self.book.moved(asked.agent_id, self.place):
            wanted = self.intake.choose(asked, reading)
            if asked.agent_id is not None:
                self.background.give_way(asked.agent_id)
            return self._turns.begin(asked, wanted)

    def count_tokens(
        self,
        *,
        messages: Sequence[Message] | None = None,
        continue_final_message: bool = False,
        text: str | None = None,
    ) -> int:
        """Return how many tokens such a prompt has. Raises InvalidRequest."""
        source = PromptSource(
            messages=messages, text=text, continue_final_message=continue_final_message
        ).in_repair()
        return self.intake.reader.num_tokens(source)

    def cancel(self, request_id: str) -> bool:
        """End a request now; its Completed comes with the next step. False when it had ended."""
        return self._turns.cancel(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything, or events wait to be fetched."""
        is_running = not self.is_suspended and bool(
            self._turns or self._prefetches or self._verifies
        )
        is_waited_for = bool(self._events) or self._commits.is_committing or self._jobs.is_ready
        return is_running or is_waited_for

    @property
    def is_suspended(self) -> bool:
        return self.batch.is_suspended

    @property
    def is_settled(self) -> bool:
        """Whether there is no work, and no change that the disk has not taken."""
        return not self.has_work and self._commits.is_settled

    @property
    def has_chores(self) -> bool:
        """Whether the store is at work for this engine: `step` has to be called now and then.

        Not without pause: the store's thread needs the interpreter, too.
        """
        return self.tiers.saves.is_busy or bool(len(self.tiers.saves)) or bool(self._jobs)

    def step(self, *, may_wait: bool = True) -> list[Event]:
        """Run one decode step for every ready row, and some prefill beside it; return the events.

        Waits briefly when there is nothing to do but to hear from the store, if it may.
        """
        if may_wait and self.is_stalled:
            self._commits.wait()
        self._commits.poll()
        outcomes = self.batch.step()
        for outcome in outcomes:
            if not self._turns.take(outcome):
                self._prefetches.take(outcome)
        has_verified = self._verifies.advance(self.batch.spare_tokens)
        self.tiers.save_some(self.config.save_bytes_per_step)
        self._commits.poll()
        self._jobs.advance()
        events = self._take_events()
        is_idle = not (outcomes or events or has_verified or self._jobs.is_ready)
        self._idle_at = self._begun if is_idle and self.batch.only_waits else None
        return events

    @property
    def is_stalled(self) -> bool:
        """Whether the last step found that there is only the store to wait for.

        What was begun since then has not been looked at.
        """
        return self._idle_at == self._begun and self.has_work

    # -- the model -------------------------------------------------------------------------------

    def suspend(self, timeout_s: float = 60.0) -> bool:
        """Give the weights back. What runs waits, and all KV leaves memory for the disk.

        Returns whether the disk took everything in time; what it did not take stays in memory.
        Whatever raises leaves the engine as it was, but for rows that wait.
        """
        self.batch.suspend()
        try:
            self.background.make_way("its model was put out of memory")
            self.tiers.put_all_away()
        except BaseException:
            self.batch.resume()
            raise
        until = time.monotonic() + timeout_s
        self._commits.save_while(lambda: bool(len(self.tiers.saves)), until)
        is_saved = self.flush(max(until - time.monotonic(), 1.0)) and not len(self.tiers.saves)
        self.tiers.drop_spares()
        self._model.release_weights()
        self._idle_at = None
        return is_saved

    def resume(self, loaded: LoadedModel) -> None:
        """Take the weights again, which must be the same. What waited goes on."""
        self._model.take_weights(loaded)
        self.batch.resume()
        self._idle_at = None

    @property
    def model(self) -> str:
        """Its name."""
        return self._model.facts.name

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint."""
        return self._model.facts.fingerprint

    def abandon(self, error: Exception) -> list[Event]:
        """End all requests and jobs with this error: their model does not come back."""
        self._verifies.cancel("its model does not come back")
        self._turns.abandon(error)
        self._jobs.abandon(error)
        return self._take_events()

    # -- the store -------------------------------------------------------------------------------

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until every change so far is committed. Returns whether the disk took them all."""
        return self._commits.flush(timeout_s)

    def close(self, timeout_s: float = 60.0) -> bool:
        """Save every line's KV to its last token, before a shutdown; the store stays open.

        Exports and imports end here. Returns whether all KV was taken by the disk in time.
        """
        self._verifies.cancel("the server stops")
        self._jobs.abandon(EngineStopped())
        self.tiers.saves.offer_tails()
        until = time.monotonic() + timeout_s
        self._commits.save_while(lambda: bool(len(self.tiers.saves)), until)
        is_saved = not len(self.tiers.saves)
        if not is_saved:
            self._transfers.log_unsaved()
        return self.flush(max(until - time.monotonic(), 1.0)) and is_saved

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            num_waiting=self.batch.num_waiting,
            num_running=self.batch.num_running,
            pool=self.tiers.pool.snapshot(),
            tiers=self.tiers.counters,
            batch=self.batch.counters,
            store=self._store.health(),
            num_mended_spans=self.intake.num_mended_spans,
        )

    def check(self) -> None:
        """Raise InvariantBroken when any of the bookkeeping contradicts itself."""
        self.tiers.check()
        self.batch.check()
        self.book.check()
        self._turns.check()
        self._store.check()

    # -- inside ----------------------------------------------------------------------------------

    def _take_events(self) -> list[Event]:
        events = list(self._events)
        self._events.clear()
        return events

    @property
    def _begun(self) -> tuple[int, int]:
        """Changes when something is begun, unless as much has ended."""
        return self.batch.num_waiting, len(self._verifies)

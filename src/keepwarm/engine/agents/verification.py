"""Agents that are compared with a cold run, beside the requests and a unit at a time."""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, replace

from keepwarm.core.agent_store import RecordStore
from keepwarm.core.errors import AgentBusy, VerifyInterrupted
from keepwarm.core.ports import BatchGenerator
from keepwarm.core.steps import Pause, Steps
from keepwarm.engine.agents.agent import Agent, Line, Place
from keepwarm.engine.agents.book import AgentBook
from keepwarm.engine.agents.commits import Commit, Commits
from keepwarm.engine.jobs import Job
from keepwarm.kv.batch import Batch
from keepwarm.kv.generator_source import GeneratorSource
from keepwarm.kv.tiers import Tiers
from keepwarm.kv.verifier import ColdRun, UnitTokens, Verifier, VerifyReport


class AgentVerifier:
    """Compares agents with a cold run, and acts on what that says."""

    def __init__(
        self,
        tiers: Tiers,
        batch: Batch,
        model: GeneratorSource,
        *,
        store: RecordStore,
        commits: Commits,
        bound: float,
    ) -> None:
        self._tiers = tiers
        self._batch = batch
        self._store = store
        self._commits = commits
        self._bound = bound
        self._verifier = Verifier(tiers, store, model)

    def verify(self, agent: Agent, unit_tokens: UnitTokens) -> Steps[VerifyReport]:
        """Verify the main line: KV that differs is dropped, imported KV that agrees is shared.

        `unit_tokens` says how much the next unit may compute. Between two units nothing may change
        the agent's main line. Closed before its end, it drops what has differed by then.
        """
        main = agent.main
        token_ids = main.transcript.token_ids
        with self._verifier.cold_run(main.blocks, token_ids, main.num_held()) as cold:
            try:
                yield from self._verifier.compare(cold, main.blocks, unit_tokens)
            except GeneratorExit:
                self._drop_differing(main, cold, self._report(agent, cold))
                raise
            report = self._report(agent, cold)
            self._drop_differing(main, cold, report)
            commit = self._share(agent, cold) if report.became_shared else None
        while commit is not None and commit.durable is None:
            yield Pause.WAITING
        return replace(report, is_durable=commit is None or bool(commit.durable))

    def _report(self, agent: Agent, cold: ColdRun) -> VerifyReport:
        main = agent.main
        report = VerifyReport(
            agent_id=agent.agent_id,
            num_tokens=main.transcript.num_tokens,
            num_compared=sum(check.num_tokens for check in cold.checks if check.is_compared),
            bound=self._bound,
            blocks=tuple(cold.checks),
        )
        return replace(report, became_shared=report.passed and main.blocks.is_private)

    def _drop_differing(self, main: Line, cold: ColdRun, report: VerifyReport) -> None:
        if report.passed:
            return
        depth = report.differing[0]
        self._batch.set_back(self._tiers.owners_of(main.blocks, depth))
        self._tiers.distrust(main.blocks, depth)
        self._store.drop(cold.records_at(report.differing))

    def _share(self, agent: Agent, cold: ColdRun) -> Commit:
        """Put what was computed here in the place of what was imported.

        Lines and forks that still use imported blocks keep those to themselves.
        """
        imported = agent.main.blocks
        agent.main.blocks = self._verifier.take(cold)
        self._tiers.pin(agent.main.blocks, pinned=imported.pinned)
        self._tiers.forget(imported)
        commit = self._commits.commit(agent)
        self._store.drop([record.hash for record in cold.records], if_unused=True)
        return commit


@dataclass(slots=True, eq=False)
class _Verification:
    agent: Agent
    job: Job[VerifyReport]
    generator: BatchGenerator | None = None
    """That it has a row in, once it has begun."""


class Verifications:
    """Owns the verifications that go on beside the requests, one after the other.

    Whatever is asked of an agent calls its verification off, and so does a request that needs the
    memory. Where nothing else runs, `alone_tokens` are computed at a time.
    """

    def __init__(
        self,
        verifier: AgentVerifier,
        model: GeneratorSource,
        *,
        book: AgentBook,
        place: Place,
        commits: Commits,
        alone_tokens: int,
    ) -> None:
        self._verifier = verifier
        self._model = model
        self._book = book
        self._place = place
        self._commits = commits
        self._alone_tokens = alone_tokens
        self._queue: deque[_Verification] = deque()
        self._unit_tokens = 0

    def __repr__(self) -> str:
        return f"Verifications({[one.agent.agent_id for one in self._queue]})"

    def __len__(self) -> int:
        return len(self._queue)

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
            if not self.advance(self._alone_tokens):
                self._commits.hear()
        return result.result()

    def begin_verify(self, agent_id: str, result: "Future[VerifyReport]") -> None:
        """Begin to verify the agent, a unit with each `step` that has time for it.

        The result gets what `verify` returns or raises, or VerifyInterrupted when another call
        for the agent came or a request needed the memory. Cancelling the result ends it. Raises
        UnknownAgent and AgentBusy.
        """
        if any(one.agent.agent_id == agent_id for one in self._queue):
            raise AgentBusy(agent_id, "verify it twice")
        agent = self._book.bring(agent_id, self._place, "verify it")
        steps = self._verifier.verify(agent, lambda: self._unit_tokens)
        self._queue.append(_Verification(agent, Job(steps, result)))

    def advance(self, unit_tokens: int) -> bool:
        """Advance the first job by a unit of at most `unit_tokens` tokens; by none where that is 0.

        Returns whether that did anything but wait.
        """
        self._unit_tokens = unit_tokens
        if not self._queue or not unit_tokens:
            return False
        first = self._queue[0]
        if first.generator is None:
            first.generator = self._model.generator
        elif first.generator is not self._model.generator:
            self._interrupt(first, "the model failed in another request's step")
            return True
        # Not in the queue meanwhile: what a step does to the agent must not end that very step.
        self._queue.popleft()
        if first.job.advance():
            return True
        self._queue.appendleft(first)
        return first.job.is_ready

    def cancel(self, reason: str, agent_id: str | None = None) -> bool:
        """End all of them, or this agent's. Returns whether there was one."""
        found = [one for one in self._queue if agent_id in (None, one.agent.agent_id)]
        for one in found:
            self._interrupt(one, reason)
        return bool(found)

    def _interrupt(self, one: _Verification, reason: str) -> None:
        self._queue.remove(one)
        one.job.fail(VerifyInterrupted(one.agent.agent_id, reason))

"""IdleBuilder: while the fleet is idle, computes KV of agents that went on with another model."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass

from keepwarm.core.errors import InvariantBroken
from keepwarm.engine.agents.book import AgentBook
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.engine.prompt.reader_threads import Readers, ReadingJob
from keepwarm.engine.turn.building import BuildPlan

IDLE_S = 1.0
"""How many seconds without a request pass before it begins."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reading:
    """A conversation that is being read for a model."""

    model: str
    plan: BuildPlan
    job: ReadingJob[tuple[int, ...]]


class IdleBuilder:
    """Decides which agent's KV is built on which of the models in memory, one at a time.

    An agent that talks to one model and has talked to another gets its new turns computed there as
    well, so that it finds them when it returns. The agent that was used last comes first.
    """

    def __init__(
        self,
        engines: Mapping[str, BlockPoolBatchEngine],
        book: AgentBook,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engines = engines
        self._book = book
        self._clock = clock
        self._idle_since_s: float | None = None
        self._built: dict[tuple[str, str], int] = {}
        self._latest: tuple[str, str] | None = None
        self._readers = Readers(1)
        self._reading: Reading | None = None

    def __repr__(self) -> str:
        return f"IdleBuilder({len(self._built)} built)"

    def stop(self) -> None:
        """End it, for a request: what is computed by now stays."""
        self._idle_since_s = None
        is_stopped = self._reading is not None
        if self._reading is not None:
            self._reading.job.cancel()
            self._reading = None
        for engine in self._engines.values():
            if engine.building.is_computing:
                engine.building.cancel()
                is_stopped = True
        if is_stopped and self._latest is not None:
            self._built.pop(self._latest, None)

    def wait(self, timeout_s: float) -> None:
        """Wait until `look` can go on with the conversation that is being read, if there is one."""
        if self._reading is not None:
            wait([self._reading.job.answer], timeout_s)

    def forget(self, agent_id: str) -> None:
        """Drop what is known of an agent that was deleted."""
        for key in [key for key in self._built if key[1] == agent_id]:
            del self._built[key]

    def look(self) -> None:
        """Begin to build, if nothing has gone on for a while. Called while nothing does."""
        now = self._clock()
        if self._idle_since_s is None:
            self._idle_since_s = now
        if self._reading is not None:
            self._go_on(self._reading)
        elif now - self._idle_since_s >= IDLE_S:
            self._begin_one()

    def _begin_one(self) -> None:
        """Make one attempt: before the next one, a request may have come."""
        lagging = max(self._lagging(), default=None)
        if lagging is None:
            return
        last_used, name, agent_id = lagging
        self._latest = name, agent_id
        self._built[self._latest] = last_used
        with self._errors_logged():
            plan = self._engines[name].building.begin(self._book.get(agent_id))
            if plan is not None:
                self._reading = Reading(name, plan, self._readers.begin(plan.read))

    def _go_on(self, reading: Reading) -> None:
        """Build, if the conversation has been read by now."""
        if not reading.job.answer.done():
            return
        self._reading = None
        with self._errors_logged():
            token_ids = reading.job.answer.result()
            if (
                not self._engines[reading.model].building.build(reading.plan, token_ids)
                and self._latest
            ):
                # Its room went while it was read: once more after another rest.
                self._built.pop(self._latest, None)
                self._idle_since_s = None

    @contextmanager
    def _errors_logged(self) -> Iterator[None]:
        """Log what a template, a tokenizer or a full memory raises: no request waits for the KV."""
        try:
            yield
        except InvariantBroken:
            raise
        except Exception as error:  # noqa: BLE001 - of foreign code; no request waits for it
            _log.info("no KV in advance: %r", error)

    def _lagging(self) -> Iterator[tuple[int, str, str]]:
        """Yield when it was last used, the model and the agent, of each that went on elsewhere."""
        for name, engine in self._engines.items():
            for agent in () if engine.is_suspended else self._book:
                last_used = agent.main.blocks.last_used
                if (
                    agent.place is not engine.place
                    and not agent.in_use
                    and engine.place in agent.answered
                    and self._built.get((name, agent.agent_id)) != last_used
                    and engine.building.has_room_for(agent.main.transcript.num_tokens)
                ):
                    yield last_used, name, agent.agent_id

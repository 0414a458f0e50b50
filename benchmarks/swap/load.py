"""Clients of two models that do not fit together, and whether each gets its own model's answers."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import methodcaller

from keepwarm.bench.prompts import passages
from keepwarm.bench.report import Figure
from keepwarm.bench.requiring import require
from keepwarm.core.errors import KeepwarmError
from keepwarm.core.events import Completed, Delta, Failed, FinishReason
from keepwarm.engine.requests import GenerateRequest
from keepwarm.service.async_engine import AsyncEngine

HANG_S = 120.0
"""How many seconds a request may take before it is lost."""
WORDS_PER_MESSAGE = 24
MAX_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """`num_clients` on each model; the n-th of them asks for n times `reply_tokens`.

    compares_replies: every reply must be the one that the same client got while its model was there
    alone; only where equal bits are promised, since two runs may differ in ties elsewhere.
    """

    seconds: float
    num_clients: int
    num_turns: int
    reply_tokens: int
    compares_replies: bool


@dataclass(slots=True)
class _Tally:
    """What came of the requests. `turns`: how many turns each agent was told that it has."""

    num_requests: int = 0
    num_interrupted: int = 0
    turns: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


async def load_figure(
    engine: AsyncEngine, models: Sequence[str], plan: LoadPlan
) -> tuple[Figure, tuple[str, ...]]:
    """Run the load. Returns the figure, and what was wrong with the first wrong answers."""
    clients = await _clients_with_answers(engine, models, plan)
    tally = _Tally()
    loads_before = _num_loads(engine)
    until_s = time.monotonic() + plan.seconds
    await asyncio.gather(*(client.talk(until_s, tally) for client in clients))
    num_swaps = _num_loads(engine) - loads_before
    require(num_swaps > 1, "the models were not swapped")
    await _look_for_lost_turns(engine, tally)
    await engine.call(lambda fleet: fleet.check())
    figure = Figure(
        f"requests lost or answered wrongly in {plan.seconds:,.0f} s of {len(clients)} clients on "
        f"{len(models)} models that do not fit together",
        float(len(tally.problems)),
        0.0,
        unit="",
        facts={
            "requests": tally.num_requests,
            "swaps": num_swaps,
            "interrupted": tally.num_interrupted,
            "agents": len(tally.turns),
        },
    )
    return figure, tuple(tally.problems[:MAX_SHOWN])


async def reply_of(engine: AsyncEngine, request: GenerateRequest) -> Completed:
    """Read a reply to its end. Raises what the request failed with."""
    stream = await engine.submit(request)
    text = "".join([event.text async for event in stream if isinstance(event, Delta)])
    end = await stream.end
    if isinstance(end, Failed):
        raise end.error
    require(text == end.text, f"{request.agent_id} was sent {text!r} of {end.text!r}")
    return end


class _Client:
    """Talks to one model, with one agent after another, which all hear the same messages."""

    def __init__(
        self, engine: AsyncEngine, model: str, name: str, number: int, plan: LoadPlan
    ) -> None:
        self._engine = engine
        self._model = model
        self._name = name
        self._max_tokens = number * plan.reply_tokens
        self._messages = _messages(number, plan.num_turns)
        self._compares = plan.compares_replies
        self.expected: list[str] = []

    async def learn(self) -> None:
        """Ask for the model's answers while no swap can disturb them."""
        agent_id = await self._new_agent(0)
        replies = [await self._ask(agent_id, message) for message in self._messages]
        self.expected = [reply.text for reply in replies]

    async def talk(self, until_s: float, tally: _Tally) -> None:
        number = 0
        while time.monotonic() < until_s:
            number += 1
            agent_id = await self._new_agent(number)
            while time.monotonic() < until_s and tally.turns[agent_id] < len(self._messages):
                problem = await self._say_next(agent_id, tally)
                if problem:
                    tally.problems.append(
                        f"{agent_id}, turn {tally.turns[agent_id] + 1}: {problem}"
                    )
                    break

    async def _new_agent(self, number: int) -> str:
        agent_id = f"{self._name}-{number}"
        await self._engine.call_at(agent_id, lambda engine: engine.create(agent_id))
        return agent_id

    async def _say_next(self, agent_id: str, tally: _Tally) -> str:
        """Say the next message. Returns what is wrong with the answer; empty when it is right."""
        num_turns = tally.turns[agent_id]
        tally.num_requests += 1
        try:
            async with asyncio.timeout(HANG_S):
                reply = await self._ask(agent_id, self._messages[num_turns])
                at = await self._engine.call(lambda fleet: fleet.model_of(agent_id))
        except (KeepwarmError, TimeoutError) as error:
            return f"lost: {error!r}"
        tally.num_interrupted += reply.timing.num_preemptions > 0
        problem = self._problem_of(reply, num_turns, at)
        if not problem:
            tally.turns[agent_id] += 1
        return problem

    async def _ask(self, agent_id: str, message: str) -> Completed:
        request = GenerateRequest(
            model=self._model,
            agent_id=agent_id,
            append=[{"role": "user", "content": message}],
            max_tokens=self._max_tokens,
        )
        return await reply_of(self._engine, request)

    def _problem_of(self, reply: Completed, num_turns: int, at: str) -> str:
        checks = {
            f"it is at {at!r} and not at {self._model!r}": at == self._model,
            f"it was told that this was turn {reply.turn}": reply.turn == num_turns + 1,
            "its reply was cut off": reply.finish_reason is not FinishReason.CANCELLED,
            "its turn is not on disk": reply.durable,
        }
        if self._compares:
            expected = self.expected[num_turns]
            checks[f"it said {reply.text!r} and not {expected!r}"] = reply.text == expected
        return "; ".join(problem for problem, is_right in checks.items() if not is_right)


async def _clients_with_answers(
    engine: AsyncEngine, models: Sequence[str], plan: LoadPlan
) -> list[_Client]:
    """Make clients that know what their models say; the models must not say the same."""
    numbers = range(1, plan.num_clients + 1)
    by_model: list[list[_Client]] = []
    for letter, model in zip("abcdefgh", models, strict=False):
        clients = [_Client(engine, model, f"{letter}{n}", n, plan) for n in numbers]
        await asyncio.gather(*(client.learn() for client in clients))
        by_model.append(clients)
    said = {tuple(reply for client in some for reply in client.expected) for some in by_model}
    require(len(said) == len(models), "the models say the same: answers cannot be told apart")
    return [client for some in by_model for client in some]


async def _look_for_lost_turns(engine: AsyncEngine, tally: _Tally) -> None:
    """Compare the turns of every agent with those that its client was told of."""
    for agent_id, num_told in tally.turns.items():
        turns = await engine.call_at(agent_id, methodcaller("turns", agent_id))
        # A turn that was answered wrongly has been counted, and is not told.
        if len(turns) < num_told:
            tally.problems.append(f"{agent_id} has {len(turns)} turns and had {num_told}")


def _messages(number: int, num_turns: int) -> list[str]:
    words = " ".join(passages()).split()
    starts = (WORDS_PER_MESSAGE * (number * num_turns + turn) for turn in range(num_turns))
    spread = len(words) - WORDS_PER_MESSAGE
    return [" ".join(words[start % spread :][:WORDS_PER_MESSAGE]) for start in starts]


def _num_loads(engine: AsyncEngine) -> int:
    return sum(model.num_loads for model in engine.models.registry) if engine.models else 0

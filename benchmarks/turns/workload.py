"""Agents that talk to a server, each its next turn as soon as it has the last reply."""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.server.wire import streamed
from keepwarm.bench.prompts import passages

CHARACTERS_PER_TOKEN = 3.86
"""How long a token of SmolLM2 is on average in the passages."""
_EVENT = re.compile(rb"data: (\{.*\})\r?\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`num_agents` agents that begin at once and take `num_turns` turns each.

    About `first_tokens` are new in the first turn and `new_tokens` in each later one; replies have
    at most `reply_tokens`.
    """

    num_agents: int
    num_turns: int = 1
    first_tokens: int
    new_tokens: int = 0
    reply_tokens: int = 32


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds to the first token of the first turns and of the later ones, and in all.

    `num_tokens` is how many tokens all replies had together.
    """

    first_s: tuple[float, ...]
    later_s: tuple[float, ...]
    total_s: float
    num_tokens: int

    @property
    def spread(self) -> float:
        """The median time to a first turn's first token, over the time until all have theirs."""
        return median(self.first_s) / max(self.first_s)


@dataclass(slots=True)
class _Turn:
    ttft_s: float
    text: str
    num_tokens: int


def run_workload(port: int, model: str, workload: Workload) -> Timings:
    """Let the agents talk to the server at this port. Raises PathNotTaken for a broken stream."""
    return asyncio.run(_run(port, model, workload))


async def _run(port: int, model: str, workload: Workload) -> Timings:
    started = time.perf_counter()
    talks = [_talk(port, model, workload, number) for number in range(workload.num_agents)]
    turns = await asyncio.gather(*talks)
    total_s = time.perf_counter() - started
    return Timings(
        first_s=tuple(own[0].ttft_s for own in turns),
        later_s=tuple(turn.ttft_s for own in turns for turn in own[1:]),
        total_s=total_s,
        num_tokens=sum(turn.num_tokens for own in turns for turn in own),
    )


async def _talk(port: int, model: str, workload: Workload, number: int) -> list[_Turn]:
    """Take an agent's turns, one after the other."""
    messages: list[dict[str, str]] = []
    turns: list[_Turn] = []
    for turn in range(workload.num_turns):
        num_tokens = workload.new_tokens if turn else workload.first_tokens
        text = _text(num_tokens, start=31 * number + 7 * turn)
        messages.append({"role": "user", "content": f"Agent {number}, {turn}. {text}"})
        body = {
            "model": model,
            "user": f"agent-{number}",
            "messages": messages,
            "max_tokens": workload.reply_tokens,
            "temperature": 0,
            "stream": True,
        }
        turns.append(await _take_turn(port, body))
        messages.append({"role": "assistant", "content": turns[-1].text})
    return turns


async def _take_turn(port: int, body: dict[str, Any]) -> _Turn:
    """Read a streamed chat completion; its first token is the first event with text."""
    sent_s = time.perf_counter()
    turn = _Turn(0.0, "", 0)
    rest = b""
    async for data in streamed(port, "/v1/chat/completions", body):
        *lines, rest = (rest + data).splitlines(keepends=True)
        if rest.endswith(b"\n"):
            lines, rest = [*lines, rest], b""
        for piece in _pieces(lines):
            turn.ttft_s = turn.ttft_s or time.perf_counter() - sent_s
            turn.text += piece
            turn.num_tokens += 1
    turn.ttft_s = turn.ttft_s or time.perf_counter() - sent_s
    return turn


def _pieces(lines: Sequence[bytes]) -> list[str]:
    """Return the text of each event that has any."""
    events = [json.loads(found[1]) for line in lines if (found := _EVENT.fullmatch(line))]
    choices = [choice for event in events for choice in event.get("choices", ())]
    texts = [choice.get("delta", {}).get("content") for choice in choices]
    return [text for text in texts if text]


def _text(num_tokens: int, *, start: int) -> str:
    """Return about `num_tokens` tokens of the passages, from another place for each `start`."""
    whole = " ".join(passages())
    begin = 97 * start % len(whole)
    repeated = whole[begin:] + whole * (1 + int(num_tokens * CHARACTERS_PER_TOKEN) // len(whole))
    return repeated[: int(num_tokens * CHARACTERS_PER_TOKEN)]

"""Requests under an idempotency key, which may be sent twice and run once."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from keepwarm.core.agent import Tier
from keepwarm.core.errors import KeyReused
from keepwarm.core.events import CacheReport, Completed, Failed, FinishReason, Timing, Usage
from keepwarm.core.transcript import Turn
from keepwarm.engine.requests import GenerateRequest, ReceiptKey
from keepwarm.fleet.fleet import Fleet
from keepwarm.service.engine_thread import EngineThread
from keepwarm.service.event_stream import EventStream, replayed

Beginning = asyncio.Task[EventStream]


class Receipts:
    """Owns the keys of the requests that run. Belongs to the event loop's thread.

    A key whose request has ended is in the agent's turn, on disk, and is looked up there.
    """

    def __init__(
        self, thread: EngineThread, submit: Callable[[GenerateRequest], Awaitable[EventStream]]
    ) -> None:
        self._thread = thread
        self._submit = submit
        self._running: dict[tuple[str | None, str], tuple[ReceiptKey, Beginning]] = {}

    def __repr__(self) -> str:
        return f"Receipts({len(self)} running)"

    def __len__(self) -> int:
        return len(self._running)

    async def submit(self, request: GenerateRequest, key: ReceiptKey) -> EventStream:
        """Submit the request, or repeat the reply that it got when it was first sent.

        It runs to its end whether or not its caller goes on reading. Raises what `submit` raises,
        and KeyReused for another request under the same key.
        """
        name = (request.agent_id, key.key)
        if name in self._running:
            known, beginning = self._running[name]
            if known.digest != key.digest:
                raise KeyReused(key.key)
            first = await asyncio.shield(beginning)
            return _repeat(await asyncio.shield(first.end))
        beginning = asyncio.ensure_future(self._find_or_submit(request, key))
        self._running[name] = (key, beginning)
        beginning.add_done_callback(lambda _: self._forget_at_end(name, beginning))
        return await asyncio.shield(beginning)

    async def _find_or_submit(self, request: GenerateRequest, key: ReceiptKey) -> EventStream:
        agent_id = request.agent_id
        if agent_id is not None:
            found = await self._thread.call(lambda fleet: _find(fleet, agent_id, key))
            if found is not None:
                turn, durable = found
                return _replay(turn, key, durable=durable)
        return await self._submit(replace(request, receipt_key=key))

    def _forget_at_end(self, name: tuple[str | None, str], begun: Beginning) -> None:
        """Free the key when its request has ended, or was refused."""
        if begun.cancelled() or begun.exception() is not None:
            self._running.pop(name, None)
        else:
            begun.result().end.add_done_callback(lambda _: self._running.pop(name, None))


def _find(fleet: Fleet, agent_id: str, key: ReceiptKey) -> tuple[Turn, bool] | None:
    """Find the turn that a request with this key ended with, and whether it is on disk."""
    engine = fleet.of(agent_id)
    turn = engine.receipt(agent_id, key.key)
    return None if turn is None else (turn, engine.is_durable(agent_id))


def _repeat(end: Completed | Failed) -> EventStream:
    if isinstance(end, Failed):
        raise end.error
    return replayed(end.text, end)


def _replay(turn: Turn, key: ReceiptKey, *, durable: bool) -> EventStream:
    """Make a stream of the turn's reply, with the figures that were reported then."""
    receipt = turn.receipt
    if receipt is None or receipt.digest != key.digest:
        raise KeyReused(key.key)
    text = str(turn.messages[-1]["content"]) if turn.messages else ""
    usage = Usage(receipt.prompt_tokens, receipt.cached_tokens, receipt.completion_tokens)
    cache = CacheReport(
        Tier.NONE, usage.cached_tokens, usage.prompt_tokens, usage.prompt_tokens, "repeated", 0.0
    )
    completed = Completed(
        request_id=key.key,
        agent_id=None,
        text=text,
        token_ids=(),
        finish_reason=FinishReason(receipt.finish_reason),
        usage=usage,
        cache=cache,
        timing=Timing(queued_s=0.0, first_token_s=0.0, total_s=0.0, num_preemptions=0),
        durable=durable,
    )
    return replayed(text, completed)

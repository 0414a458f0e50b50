"""An engine with a recorder in it, and short words for what a path does."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from keepwarm.bench.recording import Recorder, Recording, recording_generator
from keepwarm.bench.requiring import require
from keepwarm.core.agent import Tier
from keepwarm.core.agent_store import AgentStore
from keepwarm.core.events import Completed, Event, Failed
from keepwarm.core.policies import EngineConfig
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import LoadedModel
from keepwarm.engine.batch_engine import BlockPoolBatchEngine

ROOMY_BYTES = 4 << 30
SETTLE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt and how many tokens to reply. `script` None: the reply is the engine's own."""

    prompt: tuple[int, ...]
    num_tokens: int
    script: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A request that was submitted."""

    request_id: str
    seed: int
    num_prompt_tokens: int


class Lab:
    """Owns an engine whose tokens are recorded, or given by a script.

    `checked`: the engine's invariants are checked after every step, which would disturb a
    measurement of speed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        deterministic: bool = False,
        config: EngineConfig | None = None,
        budget_bytes: int = ROOMY_BYTES,
        checked: bool = True,
        store: AgentStore | None = None,
    ) -> None:
        self._checked = checked
        self.recorder = Recorder(loaded.tokenizer.eos_token_ids)
        self.loaded = loaded

        self.engine = BlockPoolBatchEngine(
            loaded,
            pool=BlockPool(budget_bytes),
            store=store,
            config=config,
            batch_gen_factory=partial(recording_generator, loaded, self.recorder),
            deterministic=deterministic,
        )
        self._completed: dict[str, Completed] = {}

    # -- turns -----------------------------------------------------------------------------------

    def start(
        self,
        agent_id: str,
        prompt: Sequence[int],
        num_tokens: int,
        *,
        script: Sequence[int] | None = None,
        stop: str | None = None,
        keep: bool = False,
    ) -> Turn:
        """Submit a prompt, whose reply is recorded where `keep` says so."""
        seed = self.recorder.register(script=script, keep=keep)
        request_id = self.engine.submit(
            agent_id=agent_id, token_ids=prompt, max_tokens=num_tokens, stop=stop, seed=seed
        )
        return Turn(request_id, seed, len(prompt))

    def say(self, agent_id: str, prompt: Sequence[int], reply: Sequence[int]) -> Turn:
        """Run a whole turn with a given reply."""
        turn = self.start(agent_id, prompt, len(reply), script=reply)
        self.finish(turn)
        return turn

    def start_case(self, agent_id: str, case: Case) -> Turn:
        return self.start(agent_id, case.prompt, case.num_tokens, script=case.script, keep=True)

    def run_case(self, agent_id: str, case: Case) -> Turn:
        turn = self.start_case(agent_id, case)
        self.finish(turn)
        return turn

    def step(self) -> list[Event]:
        events = self.engine.step()
        for event in events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Completed):
                self._completed[event.request_id] = event
        if self._checked:
            self.engine.check()
        return events

    def finish(self, *turns: Turn) -> None:
        """Step until all of these have completed. Raises what a request failed with."""
        while not all(turn.request_id in self._completed for turn in turns):
            self.step()

    def settle(self) -> None:
        """Step until the store has taken all that was for it."""
        until = time.monotonic() + SETTLE_TIMEOUT_S
        while len(self.engine.tiers.saves):
            require(time.monotonic() < until, f"{self.engine.tiers.saves!r} after a minute")
            time.sleep(0.001)
            self.step()
        self.step()

    def has_finished(self, turn: Turn) -> bool:
        return turn.request_id in self._completed

    def num_draws(self, turn: Turn) -> int:
        return self.recorder.num_draws[turn.seed]

    # -- results ---------------------------------------------------------------------------------

    def completed(self, turn: Turn) -> Completed:
        return self._completed[turn.request_id]

    def recording(self, turn: Turn) -> Recording:
        completed = self.completed(turn)
        require(
            len(completed.token_ids) == completed.usage.completion_tokens,
            f"{completed.usage.completion_tokens} tokens were sampled, {completed.token_ids} sent",
        )
        return self.recorder.recording(
            turn.seed,
            num_prompt_tokens=turn.num_prompt_tokens,
            tokens=completed.token_ids,
            text=completed.text,
        )

    def require_reuse(self, turn: Turn, tier: Tier, cached_tokens: int) -> None:
        """Raise PathNotTaken unless at least `cached_tokens` tokens of this tier were reused."""
        cache = self.completed(turn).cache
        require(
            cache.tier is tier and cache.cached_tokens >= cached_tokens,
            f"{cached_tokens} {tier} tokens were expected to be reused: {cache}",
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """A model and a way of computing, of which every path makes labs of its own."""

    loaded: LoadedModel
    deterministic: bool
    seed: int = 0

    def lab(
        self,
        *,
        config: EngineConfig | None = None,
        budget_bytes: int = ROOMY_BYTES,
        store: AgentStore | None = None,
    ) -> Lab:
        return Lab(
            self.loaded,
            deterministic=self.deterministic,
            config=config,
            budget_bytes=budget_bytes,
            store=store,
        )

    def slab_bytes(self, capacity_tokens: int) -> int:
        generator = self.loaded.batch_gen_factory(deterministic=self.deterministic)
        return generator.slab_bytes(capacity_tokens)

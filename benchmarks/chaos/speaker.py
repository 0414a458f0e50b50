"""What agents are told: drawn from a seed, in lengths around the ends of blocks."""

import random
from dataclasses import dataclass
from typing import Any

from benchmarks.chaos.state import State
from benchmarks.chaos.world import FAKE
from keepwarm.core.layout import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long prompts (in tokens or letters) and replies are, and an agent at most."""

    short: int
    long: int
    reply: int
    agent: int
    num_agents: int


FAKE_SIZES = Sizes(short=40, long=900, reply=30, agent=2200, num_agents=6)
MODEL_SIZES = Sizes(short=20, long=280, reply=6, agent=600, num_agents=2)


def sizes_of(world: str) -> Sizes:
    """Return the sizes for the fake, or for a model."""
    return FAKE_SIZES if world == FAKE else MODEL_SIZES


class Speaker:
    """Draws what agents are told. Agents whose names begin with `chat` are told messages."""

    def __init__(self, seed: int, sizes: Sizes, vocab_size: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - a seeded campaign, not a secret
        self._sizes = sizes
        self._vocab_size = min(vocab_size, 10_000)

    def new_name(self) -> str:
        kind = self.random.choice(("chat", "ids"))
        return f"{kind}-{self.random.getrandbits(48):012x}"

    def request(self, name: str, state: State | None) -> dict[str, Any]:
        """Return what continues the agent, as arguments of `submit`."""
        if name.startswith("chat"):
            message = {"role": "user", "content": self._words()}
            return {"append" if state and state["messages"] else "messages": [message]}
        known = state["ids"] if state else []
        return {"token_ids": [*known, *self.ids(self._num_new(len(known)))]}

    def ids(self, num_tokens: int) -> list[int]:
        return [self.random.randrange(self._vocab_size) for _ in range(num_tokens)]

    def num_reply(self) -> int:
        """Draw `max_tokens`; one in twenty is eight times as long."""
        if self.random.random() < 0.05:
            return 8 * self._sizes.reply
        return self.random.randint(1, self._sizes.reply)

    def _num_new(self, num_known: int) -> int:
        drawn = self._length()
        if self.random.random() < 0.2:  # to the end of a block, or one token off
            return drawn - (num_known + drawn) % BLOCK_TOKENS + BLOCK_TOKENS
        return drawn

    def _words(self) -> str:
        letters = "abcdefgh ijklmnop qrstuvwxyz ü\n"
        return "".join(self.random.choice(letters) for _ in range(self._length()))

    def _length(self) -> int:
        if self.random.random() < 0.5:
            return self.random.randint(1, self._sizes.short)
        return self.random.randint(self._sizes.short, self._sizes.long)

"""Which kills a campaign makes: everything about each follows from the seed and its number."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks.chaos.traps import VISITS, Phase
from benchmarks.chaos.world import FAKE

KILLS_PER_HOME = 10
SMALL_RAM_BLOCKS = 24
LARGE_RAM_BLOCKS = 400
MODEL_PHASES = (
    *(Phase.DECODE, Phase.COMMIT, Phase.RESTORE, Phase.WRITE, Phase.AFTER_RENAME),
    *(Phase.PREFILL, Phase.COMMITTED, Phase.DEMOTION, Phase.RANDOM, Phase.QUEUED),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosPlan:
    """`num_model_kills` of the kills are on the model, the others on the fake generator.

    Kills have numbers from `first_kill` on; a home's first number is a multiple of ten.
    """

    num_kills: int = 200
    num_model_kills: int = 10
    seed: int = 0
    first_kill: int = 0
    model: str = "smollm2"


QUICK = partial(ChaosPlan, num_kills=20, num_model_kills=0)
"""Small sizes, to see that it works."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill of a campaign: everything about it follows from the campaign's seed and its number.

    `seed` is what the child draws from.
    """

    number: int
    world: str
    phase: Phase
    seed: int
    visit: int
    ram_blocks: int
    delay_s: float

    @property
    def home_number(self) -> int:
        return self.number // KILLS_PER_HOME


def kills_of(plan: ChaosPlan) -> Iterator[Kill]:
    """Yield the plan's kills in order."""
    num_fake = plan.num_kills - plan.num_model_kills
    for number in range(plan.first_kill, plan.first_kill + num_fake):
        yield _kill(plan.seed, FAKE, number)
    for number in range(plan.num_model_kills):
        yield _kill(plan.seed, plan.model, number)


def _kill(campaign_seed: int, world: str, number: int) -> Kill:
    phases = list(Phase) if world == FAKE else list(MODEL_PHASES)
    turn, place = divmod(number, len(phases))
    _random(campaign_seed, world, "phases", turn).shuffle(phases)
    phase = phases[place]
    draw = _random(campaign_seed, world, "kill", number)
    visits = VISITS[phase].fake if world == FAKE else VISITS[phase].model
    return Kill(
        number,
        world,
        phase,
        seed=draw.getrandbits(32),
        visit=draw.randint(1, visits),
        ram_blocks=draw.choice((SMALL_RAM_BLOCKS, LARGE_RAM_BLOCKS)),
        delay_s=draw.random() * (0.6 if world == FAKE else 6.0),
    )


def _random(*key: object) -> random.Random:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return random.Random(digest)  # noqa: S311 - a seeded campaign, not a secret

"""Draws that depend on their seed and their place alone, from the distribution that was asked."""

import threading
from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import pytest

from keepwarm.core.ports import GREEDY, Draw, Sampling
from keepwarm.mlx_backend.compute.sampling import sample

PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.04, 0.01]
LOGITS = mx.log(mx.array(PROBABILITIES))
NUM_DRAWS = 4000


def draw_all(settings: Sequence[Sampling], indices: Sequence[int]) -> list[int]:
    """One token for each, in one call, from LOGITS."""
    draws = [Draw(*pair) for pair in zip(settings, indices, strict=True)]
    logits = mx.broadcast_to(LOGITS[None], (len(draws), LOGITS.size))
    return [int(token) for token in sample(logits, draws).tolist()]  # type: ignore[union-attr]


def counts(settings: Sampling) -> Counter[int]:
    """What one seed draws at many places of a reply."""
    return Counter(draw_all([settings] * NUM_DRAWS, range(NUM_DRAWS)))


def chi_square(observed: Counter[int], probabilities: Sequence[float]) -> float:
    total = sum(probabilities)
    expected = [NUM_DRAWS * p / total for p in probabilities]
    return sum((observed[i] - e) ** 2 / e for i, e in enumerate(expected))


@pytest.mark.parametrize("seed", [0, 1, 12345, (1 << 64) - 1])
def test_the_draws_follow_the_distribution(seed: int) -> None:
    # The 99.9th percentile of chi-square with 5 degrees of freedom is 20.5.
    assert chi_square(counts(Sampling(temperature=1.0, seed=seed)), PROBABILITIES) < 20.5


def test_different_seeds_at_the_same_place_follow_it_too() -> None:
    settings = [Sampling(temperature=1.0, seed=seed) for seed in range(NUM_DRAWS)]
    assert chi_square(Counter(draw_all(settings, [0] * NUM_DRAWS)), PROBABILITIES) < 20.5


def test_temperature_sharpens() -> None:
    squared = [p**2 for p in PROBABILITIES]
    assert chi_square(counts(Sampling(temperature=0.5, seed=3)), squared) < 20.5


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        (Sampling(temperature=1.0, top_k=1), {0}),
        (Sampling(temperature=1.0, top_k=3), {0, 1, 2}),
        (Sampling(temperature=1.0, top_k=100), set(range(6))),
        (Sampling(temperature=1.0, top_p=0.65), {0, 1}),
        (Sampling(temperature=1.0, top_p=1.0), set(range(6))),
        (Sampling(temperature=1.0, min_p=0.3), {0, 1, 2}),
        (Sampling(temperature=1.0, min_p=1.0), {0}),
        (Sampling(temperature=1.0, top_k=2, min_p=0.05, top_p=0.9), {0, 1}),
        (Sampling(temperature=5.0, top_k=2), {0, 1}),
    ],
    ids=repr,
)
def test_what_is_ruled_out_is_never_drawn(settings: Sampling, allowed: set[int]) -> None:
    assert set(counts(settings)) == allowed


def test_what_is_left_keeps_its_proportions() -> None:
    observed = counts(Sampling(temperature=1.0, top_k=3, seed=9))
    # Two degrees of freedom: 13.8.
    assert chi_square(observed, PROBABILITIES[:3]) < 13.8


@pytest.mark.parametrize("num_others", [1, 2, 7])
@pytest.mark.parametrize("other", [GREEDY, Sampling(temperature=1.0, seed=5, top_k=3)], ids=repr)
def test_a_draw_does_not_depend_on_the_batch(num_others: int, other: Sampling) -> None:
    mine = Sampling(temperature=1.0, seed=77)
    for draw in range(20):
        alone = draw_all([mine], [draw])[0]
        together = draw_all([other] * num_others + [mine], [3] * num_others + [draw])
        assert together[-1] == alone


def test_a_seed_draws_anew_at_every_place() -> None:
    mine = Sampling(temperature=1.0, seed=1)
    assert draw_all([mine] * 50, range(50)) == draw_all([mine] * 50, range(50))
    assert len(set(draw_all([mine] * 50, range(50)))) > 2


def test_neighbouring_seeds_and_places_are_unrelated() -> None:
    seeds = [Sampling(temperature=1.0, seed=seed) for seed in range(200)]
    one = draw_all(seeds[:-1], [1] * 199)
    other = draw_all(seeds[1:], [0] * 199)
    agree = sum(a == b for a, b in zip(one, other, strict=True))
    assert agree < 100


def test_greedy_rows_are_greedy_beside_others() -> None:
    settings = [GREEDY, Sampling(temperature=2.0, seed=1), GREEDY, Sampling(temperature=1.0)]
    tokens = draw_all(settings, [0, 1, 2, 3])
    assert (tokens[0], tokens[2]) == (0, 0)


def test_rows_get_the_tokens_of_their_own_logits() -> None:
    logits = mx.array([[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0], [0, 9.0, 0]])
    cold = Sampling(temperature=0.01, seed=4)
    draws = [Draw(settings, n) for n, settings in enumerate([GREEDY, cold, GREEDY, cold])]
    assert sample(logits, draws).tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits_are_drawn_from_in_full(dtype: mx.Dtype) -> None:
    logits = LOGITS.astype(dtype)[None]
    token = sample(logits, [Draw(Sampling(temperature=1.0, top_p=0.65, seed=2), 0)])
    assert token.tolist()[0] in (0, 1)  # type: ignore[index]


def test_another_thread_draws_the_same() -> None:
    mine = Sampling(temperature=1.0, seed=21)
    seen: list[list[int]] = []

    def draw() -> None:
        with mx.stream(mx.new_stream(mx.default_device())):
            logits = mx.log(mx.array([PROBABILITIES] * 20))
            draws = [Draw(mine, index) for index in range(20)]
            seen.append(sample(logits, draws).tolist())  # type: ignore[arg-type]

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert seen == [draw_all([mine] * 20, range(20))]

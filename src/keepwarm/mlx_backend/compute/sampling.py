"""Samples the next tokens of a batch: each row by its own settings and its own draw.

A row's draw depends on its seed and on the ordinal of the token alone (Gumbel-max with a key for
each token), so it is the same whatever else is in the batch and after any preemption. A grammar's
mask over the vocabulary will be one more filter, before temperature.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from keepwarm.core.ports import Draw, Sampling

Sampler = Callable[[mx.array, Sequence[Draw]], mx.array]
"""Chooses a token for each draw from its row of the logits, (draws, vocabulary)."""

_MASK = (1 << 64) - 1


def sample(logits: mx.array, draws: Sequence[Draw]) -> mx.array:
    """Sample a token for each draw from its row of `logits` (draws, vocabulary).

    Draws of equal settings are sampled in one call. Filters are mlx-lm's (0.32.2), in its order:
    top_p, min_p, top_k on log-probabilities, then temperature.
    """
    groups = _groups(draws)
    if len(groups) == 1:
        (settings,) = groups
        return _sample_alike(logits, settings, draws)
    tokens: list[mx.array] = [logits] * len(draws)
    for settings, rows in groups.items():
        chosen = _sample_alike(logits[mx.array(rows)], settings, [draws[row] for row in rows])
        for position, row in enumerate(rows):
            tokens[row] = chosen[position : position + 1]
    return mx.concatenate(tokens)


def _groups(draws: Sequence[Draw]) -> dict[Sampling, list[int]]:
    """Return the rows of the logits by their settings, without the seed."""
    groups: dict[Sampling, list[int]] = {}
    for row, draw in enumerate(draws):
        groups.setdefault(replace(draw.sampling, seed=0), []).append(row)
    return groups


def _sample_alike(logits: mx.array, settings: Sampling, draws: Sequence[Draw]) -> mx.array:
    if settings.temperature == 0.0:
        return mx.argmax(logits, axis=-1)
    scores = _filtered(logits.astype(mx.float32), settings) * (1.0 / settings.temperature)
    noise = mx.stack([_noise(draw, logits.shape[-1]) for draw in draws])
    return mx.argmax(scores + noise, axis=-1)


def _filtered(logits: mx.array, settings: Sampling) -> mx.array:
    """Log-probabilities, minus infinity for each token that the settings rule out."""
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if 0.0 < settings.top_p < 1.0:
        scores = apply_top_p(scores, settings.top_p)
    if settings.min_p > 0.0:
        scores = apply_min_p(scores, settings.min_p)
    if 0 < settings.top_k < logits.shape[-1]:
        scores = apply_top_k(scores, settings.top_k)
    return scores


def _noise(draw: Draw, vocab_size: int) -> mx.array:
    key = mx.random.key(_mix(draw.sampling.seed ^ _mix(draw.index)))
    return mx.random.gumbel((vocab_size,), key=key)


def _mix(value: int) -> int:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014): neighbours become unrelated."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)

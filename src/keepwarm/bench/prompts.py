"""Seeded prompts of an exact length, made of the passages that ship with Keepwarm."""

from functools import cache
from importlib import resources

import numpy as np

from keepwarm.core.ports import Tokenizer


@cache
def passages() -> tuple[str, ...]:
    """Return the passages of prose and code."""
    text = resources.files("keepwarm.bench").joinpath("passages.txt").read_text("utf-8")
    return tuple(text.strip().split("\n\n"))


def prompt_ids(tokenizer: Tokenizer, num_tokens: int, *, seed: int) -> tuple[int, ...]:
    """Return the first `num_tokens` ids of the passages in the seed's order, repeated as needed.

    Another seed or length begins with another passage, so that prompts share no block by chance.
    """
    shuffler = np.random.default_rng([seed, num_tokens])
    ids: list[int] = tokenizer.encode(f"Notebook {seed}, {num_tokens}.\n\n")
    while len(ids) < num_tokens:
        for index in shuffler.permutation(len(passages())):
            ids += tokenizer.encode(passages()[index] + "\n\n")
    return tuple(ids[:num_tokens])

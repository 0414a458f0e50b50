"""The comparison itself: what it calls the same, a tie, a flip, other bits."""

from dataclasses import replace

import numpy as np
import pytest

from keepwarm.bench.compare import (
    FLOAT32_BOUNDS,
    Difference,
    as_floats,
    bounds_from,
    difference,
    why_not_identical,
)
from keepwarm.bench.recording import Recording

PROMPT_TOKENS = 3
VOCAB = 8


@pytest.fixture
def recording() -> Recording:
    random = np.random.default_rng(0)
    logits = random.normal(size=(4, VOCAB)).astype(np.float32)
    kv = tuple(random.normal(size=(2, 6, 4)).astype(np.float32).view(np.uint32) for _ in range(4))
    tokens = tuple(int(token) for token in logits.argmax(axis=1))
    return Recording(PROMPT_TOKENS, tokens, logits, kv, "text")


def found(reference: Recording, other: Recording) -> Difference:
    return difference(
        reference, other, dtype="float32", bounds=FLOAT32_BOUNDS, forbidden=frozenset()
    )


def changed_logits(recording: Recording, step: int, token: int, value: float) -> Recording:
    logits = recording.logits.copy()
    logits[step, token] = value
    return replace(recording, logits=logits)


def test_a_recording_is_itself(recording: Recording) -> None:
    same = found(recording, recording)

    assert same.is_within(FLOAT32_BOUNDS)
    assert (same.num_steps, same.max_logits, same.max_kv, same.num_ties) == (4, 0.0, 0.0, 0)
    assert why_not_identical(recording, recording) is None


def test_logits_beyond_the_bound_are_not_within(recording: Recording) -> None:
    worst = int(recording.logits[1].argmin())
    other = changed_logits(recording, 1, worst, recording.logits[1, worst] - 2e-3)

    assert not found(recording, other).is_within(FLOAT32_BOUNDS)


def test_another_best_token_is_a_tie_only_where_the_two_best_are_close(
    recording: Recording,
) -> None:
    best = int(recording.logits[2].argmax())
    close = (best + 1) % VOCAB
    reference = changed_logits(recording, 2, close, recording.logits[2, best] - 5e-4)
    tie = found(reference, changed_logits(reference, 2, close, reference.logits[2, best] + 1e-4))
    flip = found(recording, changed_logits(recording, 2, close, recording.logits[2, best] + 1e-4))

    assert (tie.num_ties, tie.num_flips) == (1, 0)
    assert tie.is_within(FLOAT32_BOUNDS)
    assert (flip.num_ties, flip.num_flips) == (0, 1)
    assert not flip.is_within(FLOAT32_BOUNDS)


def test_nothing_is_compared_behind_the_first_other_token(recording: Recording) -> None:
    tokens = (recording.tokens[0], (recording.tokens[1] + 1) % VOCAB, *recording.tokens[2:])
    kv = tuple(array.copy() for array in recording.kv)
    kv[0][:, PROMPT_TOKENS + 1 :] = 0

    forked = found(recording, replace(recording, tokens=tokens, kv=kv))

    assert (forked.num_steps, forked.max_kv) == (2, 0.0)


def test_a_nan_is_never_within_bounds(recording: Recording) -> None:
    kv = tuple(array.copy() for array in recording.kv)
    kv[2][0, 0, 0] = 0x7FC00000

    assert not found(recording, replace(recording, kv=kv)).is_within(FLOAT32_BOUNDS)
    assert not found(recording, changed_logits(recording, 0, 0, np.nan)).is_within(FLOAT32_BOUNDS)


@pytest.mark.parametrize("what", ["logits", "tokens", "KV", "text"])
def test_one_other_bit_is_named(recording: Recording, what: str) -> None:
    kv = tuple(array.copy() for array in recording.kv)
    kv[1][0, 0, 0] ^= 1
    others = {
        "logits": changed_logits(
            recording, 3, 0, np.nextafter(recording.logits[3, 0], np.float32(9))
        ),
        "tokens": replace(recording, tokens=(*recording.tokens[:-1], -1)),
        "KV": replace(recording, kv=kv),
        "text": replace(recording, text="other"),
    }

    assert (why_not_identical(recording, others[what]) or "").startswith(what)


def test_a_shorter_recording_is_compared_with_the_beginning(recording: Recording) -> None:
    shorter = Recording(
        PROMPT_TOKENS,
        recording.tokens[:2],
        recording.logits[:2],
        tuple(array[:, : PROMPT_TOKENS + 1] for array in recording.kv),
        "te",
    )

    assert why_not_identical(recording, shorter) is None
    assert found(recording, shorter).num_steps == 2


def test_other_dtypes_have_bounds_from_the_references_own_differences(
    recording: Recording,
) -> None:
    other = replace(recording, logits=recording.logits + np.float32(0.25))

    bounds = bounds_from([recording, other, recording], "float32")

    assert bounds.logits == pytest.approx(1.0)
    assert bounds.kv == 0.0


def test_bfloat16_bits_are_read_as_numbers() -> None:
    bits = np.array([0x3F80, 0xC000], np.uint16)

    assert as_floats(bits, "bfloat16").tolist() == [1.0, -2.0]

"""Which line a request continues: a pure choice over values, on any thread."""

from collections.abc import Sequence
from dataclasses import dataclass

from keepwarm.core.transcript import EMPTY, Transcript
from keepwarm.engine.prompt.continuation import Continuation, Prompt
from keepwarm.engine.prompt.messages import Conversation

ANONYMOUS_SLACK_TOKENS = 8
"""How many tokens of its line an anonymous request may drop (a reply's end that a template
trims) and still continue it."""


@dataclass(frozen=True, slots=True)
class KnownLine:
    """A line as it stood when the request came; safe to hand to another thread."""

    transcript: Transcript
    messages: Conversation | None
    in_use: bool


def choose_line(
    lines: Sequence[KnownLine], continuation: Continuation, *, named: bool
) -> tuple[int | None, Prompt]:
    """Return the index of the idle line with the longest shared prefix, and the prompt continued
    from it.

    None when the request needs a line of its own, because it would throw away most of that line or
    no line is idle. Its prompt still takes over the ids that it shares with the most similar line,
    so that their blocks are found. `named`: the request names an agent.
    """
    idle = [index for index, line in enumerate(lines) if not line.in_use]
    best = _most_similar(lines, idle, continuation)
    if best is not None:
        index, num_shared = best
        if _continues(lines[index], num_shared, named=named):
            return index, continuation.prompt_from(lines[index].transcript)
    if len(idle) < len(lines):
        best = _most_similar(lines, range(len(lines)), continuation)
    return None, continuation.prompt_from(EMPTY if best is None else lines[best[0]].transcript)


def _most_similar(
    lines: Sequence[KnownLine], indices: Sequence[int], continuation: Continuation
) -> tuple[int, int] | None:
    """Return the first of the lines that share most with the prompt, by its index, and how many
    ids.

    Most bounds first: a line that cannot share more than the best one so far is not compared to the
    end, which would encode text for it.
    """
    bounds = {index: continuation.most_shared(lines[index].transcript) for index in indices}
    best: tuple[int, int] | None = None
    for index in sorted(indices, key=lambda index: -bounds[index]):
        if best is not None and bounds[index] < best[1]:
            break
        num_shared = continuation.num_shared(lines[index].transcript)
        if best is None or (num_shared, -index) > (best[1], -best[0]):
            best = index, num_shared
    return best


def _continues(line: KnownLine, num_shared: int, *, named: bool) -> bool:
    """Whether the request keeps enough of the line to go on with it."""
    num_lost = line.transcript.num_tokens - num_shared
    if not named:
        return num_lost <= ANONYMOUS_SLACK_TOKENS and num_shared > num_lost
    return num_shared >= num_lost

"""In which message of a conversation a token of its prompt lies."""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from keepwarm.core.errors import InvalidRequest
from keepwarm.core.ports import Message, Piece
from keepwarm.core.transcript import Transcript, take_turns
from keepwarm.engine.prompt.continuation import Prompt
from keepwarm.engine.prompt.divergence import Reason

Render = Callable[[Sequence[Message]], Sequence[Piece]]


def message_at(
    token_index: int,
    prompt: Prompt,
    conversation: Sequence[Message],
    known: Sequence[Message] | None,
    render: Render,
) -> int | None:
    """Return the index of the message that a prompt's token lies in; None behind the last message.

    `known` are the line's messages; `render` is the template without its generation prompt. Where
    the conversation only goes on, the token belongs to its first new message, although the template
    may have closed the message before it there. Otherwise renders a logarithmic number of the
    conversation's beginnings, and returns None where the template refuses one of them.
    """
    divergence = prompt.divergence
    if token_index >= len(prompt.token_ids) or token_index == 0:
        return None if token_index else 0
    if (
        divergence is not None
        and divergence.reason is Reason.NEW_MESSAGE
        and token_index == divergence.token_index
        and _begins_with(conversation, known)
    ):
        return len(known or ())
    span = _span_at(prompt.transcript, token_index)

    def reaches(num_messages: int) -> bool:
        return len(tuple(take_turns(render(conversation[:num_messages])))) > span

    try:
        index = bisect_left(range(1, len(conversation) + 1), True, key=reaches)
    except InvalidRequest:  # a template may want more of a conversation than its beginning
        return None
    return index if index < len(conversation) else None


def _begins_with(conversation: Sequence[Message], known: Sequence[Message] | None) -> bool:
    return bool(known) and list(conversation[: len(known or ())]) == list(known or ())


def _span_at(transcript: Transcript, token_index: int) -> int:
    end = 0
    for index, span in enumerate(transcript.spans):
        end += len(span.token_ids)
        if token_index < end:
            return index
    return len(transcript.spans) - 1

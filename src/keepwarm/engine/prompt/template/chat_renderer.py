"""Renders conversations by the model's chat template, in the form that the template takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from keepwarm.core.errors import TemplateRefused
from keepwarm.core.ports import Message, Piece, Tokenizer
from keepwarm.engine.prompt.template.adaptation import JOINT, Adapted, adapt
from keepwarm.engine.prompt.template.traits import Traits, traits_of

_MARK = "8c1e5a07f3b24d69"
"""Stands where the reply will; the last one in a prompt is ours, whatever was said before."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt's text, and what was changed in its messages; see `Adapted`."""

    pieces: tuple[Piece, ...]
    notes: tuple[str, ...] = ()


class ChatRenderer:
    """Renders conversations by the tokenizer's template. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def traits(self) -> Traits:
        """What the template takes, asked at the first rendering."""
        return traits_of(self._tokenizer.render)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> Rendered:
        """Render the conversation; system messages move to the front only where nothing else helps.

        Raises InvalidRequest where the template refuses the messages in every form.
        """
        adapted = adapt(messages, self.traits)
        try:
            return self._rendered(adapted, add_generation_prompt)
        except TemplateRefused:
            moved = adapt(messages, self.traits, moves_systems=True)
            if moved == adapted:
                raise
            return self._rendered(moved, add_generation_prompt)

    def pieces(self, messages: Sequence[Message]) -> tuple[Piece, ...]:
        """Render the conversation without a generation prompt."""
        return self.render(messages, add_generation_prompt=False).pieces

    def _rendered(self, adapted: Adapted, add_generation_prompt: bool) -> Rendered:
        messages = adapted.messages
        if add_generation_prompt and _would_join_reply(messages, self.traits):
            note = "the reply goes on with the assistant's last message"
            return Rendered(self._begun(messages), (*adapted.notes, note))
        pieces = self._tokenizer.render(messages, add_generation_prompt=add_generation_prompt)
        return Rendered(pieces, adapted.notes)

    def _begun(self, messages: Sequence[Message]) -> tuple[Piece, ...]:
        """Return the last message as the template writes it, up to where another would be joined to
        it.
        """
        *said, last = messages
        content = f"{last['content']}{JOINT if last['content'] else ''}"
        marked = [*said, {**last, "content": content + _MARK}]
        pieces = self._tokenizer.render(marked, add_generation_prompt=False)
        for number in reversed(range(len(pieces))):
            text = pieces[number].text
            if _MARK in text:
                return (*pieces[:number], Piece(text[: text.rindex(_MARK)]))
        return (*self._tokenizer.render(said), Piece(content))


def _would_join_reply(messages: Sequence[Message], traits: Traits) -> bool:
    """Whether the reply could not come back as a message of its own."""
    last = messages[-1]
    is_text = last["role"] == "assistant" and not last.get("tool_calls")
    return is_text and len(messages) > 1 and not traits.assistants_in_a_row

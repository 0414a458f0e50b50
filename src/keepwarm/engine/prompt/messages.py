"""Messages as a request gives them, and as the engine keeps them: content as plain text."""

from collections.abc import Mapping, Sequence

from keepwarm.core.errors import InvalidRequest
from keepwarm.core.plain import NotPlain, plain_object
from keepwarm.core.ports import ROLES, Message

Conversation = tuple[Message, ...]


def validate_messages(messages: object) -> Conversation:
    """Return the messages with content as plain text. Raises InvalidRequest, which names the wrong
    one.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InvalidRequest("messages", f"must be a list of messages, not {_kind(messages)}")
    if not messages:
        raise InvalidRequest("messages", "is empty; there must be at least one message")
    return tuple(_valid_message(index, message) for index, message in enumerate(messages))


def opening(messages: Sequence[Message] | None) -> Conversation:
    """Return the system and developer messages that a conversation begins with."""
    spoken = (n for n, m in enumerate(messages or ()) if m["role"] not in ("system", "developer"))
    return tuple(messages or ())[: next(spoken, None)]


def _valid_message(index: int, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidRequest("messages", f"message {index} is a {_kind(message)}, not an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        problem = f"message {index} has the role {role!r}; expected one of {sorted(ROLES)}"
        raise InvalidRequest("messages", problem)
    return _plain(index, {**message, "content": _text_of_content(index, message.get("content"))})


def _plain(index: int, message: Message) -> Message:
    """Copy the message, refusing what could not be written: every field is kept with its turn."""
    try:
        return plain_object(message)
    except NotPlain as error:
        raise InvalidRequest("messages", f"message {index} {error}") from error


def _text_of_content(index: int, content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        return "".join(_text_of_part(index, part) for part in content)
    problem = f"message {index} has a {_kind(content)} as content; expected text or text parts"
    raise InvalidRequest("messages", problem)


def _text_of_part(index: int, part: object) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    what = part.get("type") if isinstance(part, Mapping) else _kind(part)
    problem = f"message {index} has a content part {what!r}; only text parts are supported"
    raise InvalidRequest("messages", problem)


def _kind(value: object) -> str:
    return type(value).__name__

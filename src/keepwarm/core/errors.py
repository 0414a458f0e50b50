"""The errors that Keepwarm raises on purpose. Each carries the facts it was decided on.

A miss is a value, not an error. A bug is an `InvariantBroken` or a plain Python exception and is
never caught on the way.
"""

from collections.abc import Sequence
from pathlib import Path

from keepwarm.core.plain import NotPlain, check_text

MAX_QUOTED = 300
"""Characters of what others say."""


class KeepwarmError(Exception):
    """Base of every error that a caller may want to handle."""


class InvalidRequest(KeepwarmError):
    """The request can never be served as it stands; `field` names what to change."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


def check_unicode(text: str) -> None:
    """Raise InvalidRequest when the text has half of a surrogate pair: no tokenizer takes it."""
    try:
        check_text(text)
    except NotPlain as error:
        raise InvalidRequest("prompt", str(error)) from error


class TemplateRefused(InvalidRequest):
    """The model's chat template cannot write these messages; `reason` is what it said."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            "messages", f"the model's chat template refuses them: {_shortened(reason)}"
        )
        self.reason = reason


class PromptTooLong(InvalidRequest):
    """The prompt is longer than any prompt may be here.

    Clients that shorten their conversations know it by its first words, which are Anthropic's.
    """

    def __init__(
        self, num_tokens: int, max_tokens: int, facts: str, *, unit: str = "tokens"
    ) -> None:
        problem = f"prompt is too long: {num_tokens} {unit} > {max_tokens} maximum; {facts}"
        super().__init__("prompt", problem)

    def __str__(self) -> str:
        return self.problem


class TooManyMessages(PromptTooLong):
    """More messages, or parts of messages, than a request may have."""

    def __init__(self, *, num_messages: int, max_messages: int) -> None:
        facts = "the parts of a message's content count as well"
        super().__init__(num_messages, max_messages, facts, unit="messages")
        self.num_messages = num_messages
        self.max_messages = max_messages


class ContextTooLong(PromptTooLong):
    """Prompt and reply together exceed what the model was trained on.

    `num_prompt_tokens` is the least that the prompt can have, where it was not counted.
    """

    def __init__(self, *, num_prompt_tokens: int, max_context_tokens: int) -> None:
        super().__init__(
            num_prompt_tokens,
            max_context_tokens - 1,
            f"this model's maximum context length is {max_context_tokens} tokens with the reply; "
            "shorten the conversation",
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_context_tokens = max_context_tokens


class NeverFits(PromptTooLong):
    """The request needs more memory than the whole budget, whoever else leaves.

    `num_prompt_tokens` as above; `max_prompt_tokens` is what the budget holds.
    """

    def __init__(
        self,
        *,
        num_prompt_tokens: int,
        max_prompt_tokens: int,
        needed_bytes: int,
        budget_bytes: int,
    ) -> None:
        super().__init__(
            num_prompt_tokens,
            max_prompt_tokens,
            f"its KV cache needs {needed_bytes:,} bytes and the budget is {budget_bytes:,}; "
            "raise the memory budget or shorten the conversation",
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_prompt_tokens = max_prompt_tokens
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes


class UnknownAgent(KeepwarmError):
    """No agent of that name has spoken or been forked here."""

    def __init__(self, agent_id: str) -> None:
        super().__init__(f"no agent is named {agent_id!r}")
        self.agent_id = agent_id


class CalledOff(KeepwarmError):
    """Work beside the requests gave way to one of them; what it had found out by then holds."""

    def __init__(self, agent_id: str, reason: str) -> None:
        super().__init__(
            f"verifying {agent_id!r} was called off, because {reason}; verify it again"
        )
        self.agent_id = agent_id
        self.reason = reason


class AgentExists(KeepwarmError):
    """A fork or a creation would overwrite an agent."""

    def __init__(self, agent_id: str) -> None:
        super().__init__(f"an agent named {agent_id!r} exists already; delete it or choose a name")
        self.agent_id = agent_id


class DamagedAgent(KeepwarmError):
    """What is on disk of the agent cannot be read whole. Others are not affected."""

    def __init__(self, agent_id: str, problem: str) -> None:
        super().__init__(
            f"agent {agent_id!r} is damaged on the disk and set aside: {problem}; export what can "
            "be read of it, delete it, or use another name"
        )
        self.agent_id = agent_id
        self.problem = problem


class AgentBusy(KeepwarmError):
    """The agent has a request running, and what was asked for needs its main line at rest."""

    def __init__(self, agent_id: str, action: str) -> None:
        super().__init__(f"agent {agent_id!r} is running a request; {action} when it has finished")
        self.agent_id = agent_id


class AgentLeaving(AgentBusy):
    """The agent is being deleted, and the disk has not answered yet."""

    def __init__(self, agent_id: str) -> None:
        KeepwarmError.__init__(self, f"agent {agent_id!r} is being deleted; try again in a moment")
        self.agent_id = agent_id


class DeletionRefused(KeepwarmError):
    """The disk did not take the deletion of an agent, which is as it was."""

    def __init__(self, agent_id: str, fault: str | None) -> None:
        cause = f": {fault}" if fault else ""
        super().__init__(
            f"agent {agent_id!r} was not deleted and is as it was, because the disk refuses"
            f"{cause}; make room on it and delete the agent again"
        )
        self.agent_id = agent_id
        self.fault = fault


class QueueFull(KeepwarmError):
    """As many requests wait as may wait. Trying again later helps."""

    def __init__(self, *, num_waiting: int) -> None:
        super().__init__(f"{num_waiting} requests are waiting already; try again later")
        self.num_waiting = num_waiting


class PoolExhausted(KeepwarmError):
    """Fewer bytes are free than were asked for. Nothing was taken."""

    def __init__(self, *, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{needed_bytes:,} bytes were asked for and {free_bytes:,} are free")
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class ConfigError(KeepwarmError):
    """A setting has a value it cannot have; `key` names the setting."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem


class ModelLoadError(KeepwarmError):
    """A model could not be loaded; says which file, what is wrong and what to do."""

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}. {remedy}")
        self.path = path
        self.problem = problem
        self.remedy = remedy


class UnsupportedModel(ModelLoadError):
    """The model is sound but Keepwarm cannot keep its cache yet."""


class UnknownModel(KeepwarmError):
    """The request names a model that is not served here."""

    def __init__(self, model: str, known: Sequence[str]) -> None:
        others = ", ".join(map(repr, known))
        super().__init__(f"the model {model!r} is not served here; this server has {others}")
        self.model = model


class OtherWeights(KeepwarmError):
    """A model came back with other weights: what was computed with the old ones cannot go on."""

    def __init__(self, model: str) -> None:
        super().__init__(f"the model {model!r} has other weights than before; send it again")
        self.model = model


class ModelTooLarge(KeepwarmError):
    """There is not enough memory for a model, whatever else goes."""

    def __init__(self, model: str, *, needed_bytes: int, free_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"the model {model!r} needs {needed_bytes:,} bytes of memory; of {limit_bytes:,} for "
            f"models {free_bytes:,} can be had"
        )
        self.model = model
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.limit_bytes = limit_bytes


class NoRoomForModel(ModelTooLarge):
    """There would be memory for a model if others went that are pinned."""


class ModelNotLoaded(KeepwarmError):
    """The model is not in memory, and requests may not load models here."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"the model {model!r} is not loaded, and requests do not load models here; load it "
            "first, or set model.auto_load"
        )
        self.model = model


class ModelUnavailable(KeepwarmError):
    """A model could not be loaded; `cause` says why. It is tried again after `retry_s`."""

    def __init__(self, model: str, cause: Exception, *, retry_s: float) -> None:
        super().__init__(f"the model {model!r} cannot be loaded: {cause}")
        self.model = model
        self.cause = cause
        self.retry_s = retry_s


class InvariantBroken(Exception):
    """A `check()` found bookkeeping that contradicts itself: a bug in Keepwarm, never bad input."""


class NoAgentStore(KeepwarmError):
    """Agents live in memory only, so there is nothing to read or write one from."""

    def __init__(self, action: str) -> None:
        super().__init__(f"there is no store: {action} needs one; give the engine a store")
        self.action = action


class BadBundle(KeepwarmError):
    """A file that is no agent, or not one that can be trusted to be whole. Nothing was kept."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} cannot be imported: {problem}")
        self.path = path
        self.problem = problem


class BundleFailed(KeepwarmError):
    """The disk, or the agent's size, stood in the way of writing or reading a bundle."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class EngineStopped(KeepwarmError):
    """The engine takes nothing any more, because the server is going down or could not go on."""

    def __init__(self) -> None:
        super().__init__("the server is stopping; send it again when it is back")


class EngineBroke(KeepwarmError):
    """A bug ended every running request. What agents had on disk is read again."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"the engine broke and is being started again: {cause!r}; send it again")
        self.cause = cause


class QueueTimeout(KeepwarmError):
    """The request waited for its turn as long as it was allowed to."""

    def __init__(self, *, waited_s: float) -> None:
        super().__init__(f"no place became free within {waited_s:g} s; try again later")
        self.waited_s = waited_s


class DeadlineExceeded(KeepwarmError):
    """The reply was not complete in time; what was computed is kept."""

    def __init__(self, *, deadline_s: float) -> None:
        super().__init__(f"the reply was not complete within {deadline_s:g} s")
        self.deadline_s = deadline_s


class KeyReused(KeepwarmError):
    """An idempotency key came with another request than the first time."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the idempotency key {key!r} was used for another request; use a new one")
        self.key = key


class GeneratorFailed(KeepwarmError):
    """The model raised while this request's row was in the batch. Other requests are served on."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"the model failed in the middle of a step: {cause!r}; send it again")
        self.cause = cause


class RequestBroke(KeepwarmError):
    """A bug, in Keepwarm or in what came with the model, ended this request and no other."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"the reply could not be taken: {_shortened(repr(cause))}")
        self.cause = cause


def _shortened(text: str) -> str:
    """What foreign code says may quote a whole conversation."""
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."

"""The errors that Keepwarm raises on purpose, each with the facts behind the decision.

A cache miss is a value, not an error. A bug is an `InvariantBroken` or a plain Python exception,
and only the top of a thread or the HTTP edge catches it.
"""

from collections.abc import Sequence
from pathlib import Path

from keepwarm.core.plain import NotPlain, check_text

MAX_QUOTED = 300
"""How many characters of a foreign error message are quoted: it may hold a whole conversation."""


class KeepwarmError(Exception):
    """The base of every error that a caller may want to handle."""


class InvalidRequest(KeepwarmError):
    """The request can never be served as it stands; `field` names what to change."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


def check_unicode(text: str) -> None:
    """Raise InvalidRequest when `text` has half of a surrogate pair, which no tokenizer accepts."""
    try:
        check_text(text)
    except NotPlain as error:
        raise InvalidRequest("prompt", str(error)) from error


class TemplateRefused(InvalidRequest):
    """The model's chat template rejects these messages; `reason` is its own message."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            "messages", f"the model's chat template refuses them: {_shortened(reason)}"
        )
        self.reason = reason


class PromptTooLong(InvalidRequest):
    """The prompt is longer than the context, the memory budget or the server's limits allow.

    The message begins with Anthropic's words: clients recognise them and shorten the conversation.
    """

    def __init__(
        self, num_tokens: int, max_tokens: int, facts: str, *, unit: str = "tokens"
    ) -> None:
        problem = f"prompt is too long: {num_tokens} {unit} > {max_tokens} maximum; {facts}"
        super().__init__("prompt", problem)

    def __str__(self) -> str:
        return self.problem


class TooManyMessages(PromptTooLong):
    """The request has more messages, counting the parts of their contents, than are allowed."""

    def __init__(self, *, num_messages: int, max_messages: int) -> None:
        facts = "the parts of a message's content count as well"
        super().__init__(num_messages, max_messages, facts, unit="messages")
        self.num_messages = num_messages
        self.max_messages = max_messages


class ContextTooLong(PromptTooLong):
    """Prompt and reply together exceed the model's context.

    `num_prompt_tokens` is a lower bound where the prompt was refused before it was tokenised.
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
    """The request needs more memory than the whole budget, even when everything else is freed.

    `num_prompt_tokens` is a lower bound where the prompt was not tokenised; `max_prompt_tokens` is
    the longest prompt that fits the budget.
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
    """No agent has this name."""

    def __init__(self, agent_id: str) -> None:
        super().__init__(f"no agent is named {agent_id!r}")
        self.agent_id = agent_id


class VerifyInterrupted(KeepwarmError):
    """A verification gave way to a request. Blocks that it found wrong by then are dropped."""

    def __init__(self, agent_id: str, reason: str) -> None:
        super().__init__(
            f"verifying {agent_id!r} was interrupted, because {reason}; verify it again"
        )
        self.agent_id = agent_id
        self.reason = reason


class AgentExists(KeepwarmError):
    """A fork, a creation or an import would overwrite an agent."""

    def __init__(self, agent_id: str) -> None:
        super().__init__(f"an agent named {agent_id!r} exists already; delete it or choose a name")
        self.agent_id = agent_id


class DamagedAgent(KeepwarmError):
    """The agent's data on disk cannot be read completely. Other agents are not affected."""

    def __init__(self, agent_id: str, problem: str) -> None:
        super().__init__(
            f"agent {agent_id!r} is damaged on the disk and set aside: {problem}; export what can "
            "be read of it, delete it, or use another name"
        )
        self.agent_id = agent_id
        self.problem = problem


class AgentBusy(KeepwarmError):
    """The agent is answering a request, and the action needs its main line at rest."""

    def __init__(self, agent_id: str, action: str) -> None:
        super().__init__(f"agent {agent_id!r} is running a request; {action} when it has finished")
        self.agent_id = agent_id


class AgentLeaving(AgentBusy):
    """The agent is being deleted: the disk has not confirmed it yet."""

    def __init__(self, agent_id: str) -> None:
        KeepwarmError.__init__(self, f"agent {agent_id!r} is being deleted; try again in a moment")
        self.agent_id = agent_id


class DeletionRefused(KeepwarmError):
    """The disk refused to delete an agent, which stays unchanged."""

    def __init__(self, agent_id: str, fault: str | None) -> None:
        cause = f": {fault}" if fault else ""
        super().__init__(
            f"agent {agent_id!r} was not deleted and is unchanged, because the disk refuses"
            f"{cause}; make room on it and delete the agent again"
        )
        self.agent_id = agent_id
        self.fault = fault


class QueueFull(KeepwarmError):
    """The queue is full. Trying again later helps."""

    def __init__(self, *, num_waiting: int) -> None:
        super().__init__(f"{num_waiting} requests are waiting already; try again later")
        self.num_waiting = num_waiting


class PoolExhausted(KeepwarmError):
    """Fewer bytes are free than are needed. Nothing was allocated."""

    def __init__(self, *, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{needed_bytes:,} bytes are needed and {free_bytes:,} are free")
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class ConfigError(KeepwarmError):
    """A setting is unknown or has an invalid value; `key` names it."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem


class ModelLoadError(KeepwarmError):
    """A model could not be loaded: `path` is the file, `remedy` what to do about `problem`."""

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}. {remedy}")
        self.path = path
        self.problem = problem
        self.remedy = remedy


class UnsupportedModel(ModelLoadError):
    """The model is sound, but Keepwarm does not support its kind of cache yet."""


class UnknownModel(KeepwarmError):
    """The request names a model that this server does not know."""

    def __init__(self, model: str, known: Sequence[str]) -> None:
        others = ", ".join(map(repr, known))
        super().__init__(f"the model {model!r} is not served here; this server has {others}")
        self.model = model


class OtherWeights(KeepwarmError):
    """A model came back with other weights, so a reply begun on the old ones cannot continue."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"the model {model!r} has other weights than before; send the request again"
        )
        self.model = model


class ModelTooLarge(KeepwarmError):
    """There is not enough memory for a model, even when every other one is unloaded."""

    def __init__(self, model: str, *, needed_bytes: int, free_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"the model {model!r} needs {needed_bytes:,} bytes of memory; {free_bytes:,} of the "
            f"{limit_bytes:,} for models can be made free"
        )
        self.model = model
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.limit_bytes = limit_bytes


class NoRoomForModel(ModelTooLarge):
    """The model would fit if pinned models were unloaded."""


class ModelNotLoaded(KeepwarmError):
    """The model is not in memory, and `model.auto_load` does not let requests load it."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"the model {model!r} is not loaded, and requests do not load models here; load it "
            "first, or set model.auto_load"
        )
        self.model = model


class ModelUnavailable(KeepwarmError):
    """A model could not be loaded because of `cause`; loading is tried again after `retry_s`."""

    def __init__(self, model: str, cause: Exception, *, retry_s: float) -> None:
        super().__init__(f"the model {model!r} cannot be loaded: {cause}")
        self.model = model
        self.cause = cause
        self.retry_s = retry_s


class InvariantBroken(Exception):
    """A `check()` found inconsistent bookkeeping: a bug in Keepwarm, never bad input."""


class NoAgentStore(KeepwarmError):
    """The action needs a store, and this engine keeps its agents in memory only."""

    def __init__(self, action: str) -> None:
        super().__init__(f"there is no store: {action} needs one; give the engine a store")
        self.action = action


class BadBundle(KeepwarmError):
    """The file is not an agent, or is damaged or not valid. Nothing of it was kept."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} cannot be imported: {problem}")
        self.path = path
        self.problem = problem


class BundleFailed(KeepwarmError):
    """A bundle could not be written or read, because of the disk or the agent's size."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class EngineStopped(KeepwarmError):
    """The engine accepts no more requests: the server is stopping or has failed for good."""

    def __init__(self) -> None:
        super().__init__("the server is stopping; send the request again when it is back")


class EngineBroke(KeepwarmError):
    """A bug ended every running request. The engine restarts with the agents that are on disk."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(
            f"the engine failed and is starting again: {cause!r}; send the request again"
        )
        self.cause = cause


class QueueTimeout(KeepwarmError):
    """The request waited for its turn longer than `server.queue_timeout_s`."""

    def __init__(self, *, waited_s: float) -> None:
        super().__init__(f"no place became free within {waited_s:g} s; try again later")
        self.waited_s = waited_s


class DeadlineExceeded(KeepwarmError):
    """The reply was not complete within `server.deadline_s`; its KV so far is kept."""

    def __init__(self, *, deadline_s: float) -> None:
        super().__init__(f"the reply was not complete within {deadline_s:g} s")
        self.deadline_s = deadline_s


class KeyReused(KeepwarmError):
    """An idempotency key was sent again with a different request."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the idempotency key {key!r} was used for another request; use a new one")
        self.key = key


class GeneratorFailed(KeepwarmError):
    """The model raised while this request was in the batch. Other requests continue."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(
            f"the model failed in the middle of a step: {cause!r}; send the request again"
        )
        self.cause = cause


class RequestBroke(KeepwarmError):
    """A bug in Keepwarm or in the model's own files ended this request and no other."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"an internal error ended this request: {_shortened(repr(cause))}")
        self.cause = cause


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."

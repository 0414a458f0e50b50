"""Models as the API shows them, to people and to the clients of two dialects."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from keepwarm.server.edge.caller import Caller
from keepwarm.service.model_registry import Model, ModelState


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model at one moment.

    `fingerprint`, memory, context and `computed_by` are known once it has been loaded.
    `computed_by`: which way it is computed here, and why. `requests` and `loads` count all
    callers', and are null for a user's key. `problem`: why it could not be loaded.
    """

    id: str
    state: ModelState
    source: str
    fingerprint: str | None
    memory_bytes: int | None
    context_length: int | None
    computed_by: str | None
    pinned: bool
    requests: int | None
    loads: int | None
    problem: str | None

    @classmethod
    def of(cls, model: Model, caller: Caller) -> "ModelCard":
        facts, is_admin = model.facts, caller.role.is_admin
        return ModelCard(
            id=model.name,
            state=model.state,
            source=model.source,
            fingerprint=facts.fingerprint if facts else None,
            memory_bytes=facts.weight_bytes if facts else None,
            context_length=facts.max_context_tokens if facts else None,
            computed_by=facts.computed_by if facts else None,
            pinned=model.settings.pinned,
            requests=model.num_requests if is_admin else None,
            loads=model.num_loads if is_admin else None,
            problem=None if model.problem is None else str(model.problem),
        )


@dataclass(frozen=True, slots=True)
class ServedModel(ModelCard):
    """A model as OpenAI's clients expect it; `agents`: how many of the caller's used it last."""

    object: str
    created: int
    owned_by: str
    agents: int

    @staticmethod
    def of_model(model: Model, caller: Caller, *, created: int, num_agents: int) -> "ServedModel":
        card = ModelCard.of(model, caller)
        return ServedModel(
            **{field.name: getattr(card, field.name) for field in fields(card)},
            object="model",
            created=created,
            owned_by="keepwarm",
            agents=num_agents,
        )


@dataclass(frozen=True, slots=True)
class ModelList:
    """All models that may be asked for."""

    data: Sequence[ServedModel]
    object: str = "list"


@dataclass(frozen=True, slots=True)
class AnthropicModel:
    """A model as Anthropic's clients expect it."""

    id: str
    display_name: str
    created_at: str
    type: str = "model"


@dataclass(frozen=True, slots=True)
class AnthropicModelPage:
    """All models, on one page."""

    data: Sequence[AnthropicModel]
    first_id: str
    last_id: str
    has_more: bool = False

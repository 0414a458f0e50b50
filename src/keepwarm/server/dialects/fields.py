"""Fields that dialects share, and the values by which clients leave a field out."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from keepwarm.engine.prompt.old_messages import placeholder
from keepwarm.server.problems import Unsupported
from keepwarm.server.settings import ServerConfig

NO_LIMIT = -1
ANY_SEED = -1


class Lenient(BaseModel):
    """A body or a part of one; unknown fields are kept, so that the answer can name them."""

    model_config = ConfigDict(extra="allow")


def _not_zero(limit: int) -> int:
    if limit == 0:
        raise ValueError(f"must be at least 1, or {NO_LIMIT} for no limit")
    return limit


Limit = Annotated[
    int, Field(ge=NO_LIMIT, json_schema_extra={"not": {"const": 0}}), AfterValidator(_not_zero)
]
"""The longest reply in tokens; -1 is no limit, as in llama.cpp and LM Studio."""

Stop = str | list[str | None]


def limit_of(*limits: int | None) -> int | None:
    """Choose the first limit that is given; None is no limit."""
    limit = next((limit for limit in limits if limit is not None), None)
    return None if limit == NO_LIMIT else limit


def seed_of(seed: int | None) -> int | None:
    """Return the seed; None, which draws one, also stands for the -1 of many clients."""
    return None if seed == ANY_SEED else seed


def stops_of(stop: str | Sequence[str | None] | None) -> list[str] | None:
    """List the stop strings without empty ones, by which clients leave the field out."""
    given = [stop] if isinstance(stop, str) else stop or ()
    return [item for item in given if item] or None


def temperature_of(temperature: float | None, top_p: float | None, config: ServerConfig) -> float:
    """Choose the temperature: a `top_p` of 0 leaves one token to choose from, which is greedy."""
    if top_p == 0.0:
        return 0.0
    return config.default_temperature if temperature is None else temperature


def time_limits(config: ServerConfig) -> dict[str, Any]:
    """Give the fields of a GenerateRequest that say how long it may wait and run."""
    return {"queue_timeout_s": config.queue_timeout_s, "deadline_s": config.deadline_s or None}


def leave_out(where: str, kind: str, left_out: list[str] | None) -> str:
    """Replace a part that is not text with words, and note its place in `left_out`.

    None instead of a list: the part is in a new message, and Unsupported is raised.
    """
    if left_out is None:
        raise Unsupported(where, f"has the type {kind!r}; this model takes text only")
    left_out.append(where)
    return placeholder(kind)

"""Fields that all dialects have, and the values by which clients say that they want nothing."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

NO_LIMIT = -1
ANY_SEED = -1


def _not_zero(limit: int) -> int:
    if limit == 0:
        raise ValueError(f"must be at least 1, or {NO_LIMIT} for no limit")
    return limit


Limit = Annotated[
    int, Field(ge=NO_LIMIT, json_schema_extra={"not": {"const": 0}}), AfterValidator(_not_zero)
]
"""Of a reply's tokens; -1 is none, as llama.cpp and LM Studio have it."""

Stop = str | list[str | None]


def limit_of(*limits: int | None) -> int | None:
    """The first that is given."""
    limit = next((limit for limit in limits if limit is not None), None)
    return None if limit == NO_LIMIT else limit


def seed_of(seed: int | None) -> int | None:
    """None draws one, as -1 does in many clients."""
    return None if seed == ANY_SEED else seed


def stops_of(stop: str | Sequence[str | None] | None) -> list[str] | None:
    """Without the empty ones, by which clients leave the field out."""
    given = [stop] if isinstance(stop, str) else stop or ()
    return [item for item in given if item] or None

"""The device that MLX computes on."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Device:
    """A device by its kind, its name for people, and its memory."""

    kind: str
    """`metal`, `cuda` or `cpu`."""
    name: str
    memory_bytes: int | None
    """The device's own (or unified) memory; None where MLX does not say it."""


def current_device() -> Device:
    """MLX's default device."""
    facts: dict[str, Any] = dict(mx.device_info())
    memory = facts.get("memory_size") or facts.get("total_memory")
    return Device(
        kind=_kind(),
        name=str(facts.get("device_name") or facts.get("architecture") or mx.default_device()),
        memory_bytes=int(memory) if memory else None,
    )


def _kind() -> str:
    if mx.default_device() != mx.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"

"""A source of models that are there already, in place of folders and weights."""

from typing import Protocol

from keepwarm.core.ports import LoadedModel

ROOM_BYTES = 1 << 62
"""More memory than any test's models need."""


class _Named(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...


class FixedSource:
    """Implements the swapper's `ModelSource` over loaded models.

    Promises that `load` returns at once: the model of that name, or the first one for any other
    name. `sizes`: what each is measured as, in bytes; 0 for others. `room`: bytes of memory.
    """

    def __init__(
        self, *models: LoadedModel, sizes: dict[str, int] | None = None, room: int = ROOM_BYTES
    ) -> None:
        self._models = {model.name: model for model in models}
        self._first = models[0]
        self._sizes = sizes or {}
        self._room = room

    def measure(self, model: _Named) -> int:
        return self._sizes.get(model.name, 0)

    def load(self, model: _Named) -> LoadedModel:
        return self._models.get(model.source, self._first)

    def memory_bytes(self) -> int:
        return self._room

    def leave_thread(self) -> None:
        pass

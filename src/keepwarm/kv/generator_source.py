"""The place of the weights in an engine: taken, empty, and taken again by the same ones."""

from dataclasses import replace

from keepwarm.core.errors import InvariantBroken, OtherWeights
from keepwarm.core.ports import BatchGenerator, BatchGenFactory, LoadedModel


class GeneratorSource:
    """Owns the way to the weights; `facts` is what is known of the model without them."""

    def __init__(
        self, loaded: LoadedModel, factory: BatchGenFactory | None, *, deterministic: bool
    ) -> None:
        self.facts = replace(loaded, model=None, batch_gen_factory=_no_weights, close=lambda: None)
        self._replacement = factory
        self._deterministic = deterministic
        self._factory: BatchGenFactory | None = factory or loaded.batch_gen_factory

    def __repr__(self) -> str:
        return f"GeneratorSource({self.facts.name}, {'taken' if self._factory else 'empty'})"

    def new_generator(self) -> BatchGenerator:
        if self._factory is None:
            raise InvariantBroken(f"{self!r}: nothing computes without weights")
        return self._factory(deterministic=self._deterministic)

    def leave(self) -> None:
        """Nothing here holds the weights any more."""
        self._factory = None

    def take(self, loaded: LoadedModel) -> None:
        """Raises OtherWeights unless they are the same."""
        if loaded.fingerprint != self.facts.fingerprint:
            raise OtherWeights(self.facts.name)
        self._factory = self._replacement or loaded.batch_gen_factory


def _no_weights(*, deterministic: bool) -> BatchGenerator:
    raise InvariantBroken("the engine asks its seat for generators")

"""The model's generator: made of its weights, replaced after a failure, emptied and refilled.

The generator is the port to the tensors (`core/ports.py`): it moves KV and runs the model.
"""

from dataclasses import replace

from keepwarm.core.errors import InvariantBroken, OtherWeights
from keepwarm.core.ports import BatchGenerator, BatchGenFactory, LoadedModel


class GeneratorSource:
    """Owns the generator of one model; `facts` is what is known of the model without its weights.

    Ask for `generator` with every call and keep no reference to it: after a failure it is another
    object. Slabs and payloads of an earlier generator are values that a later one can move.
    `replacement` makes the generators instead of the model's own factory.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        replacement: BatchGenFactory | None = None,
        *,
        deterministic: bool = False,
    ) -> None:
        self.facts = replace(
            loaded, batch_gen_factory=_no_weights, bare=lambda: None, close=lambda: None
        )
        self._replacement = replacement
        self._deterministic = deterministic
        self._factory: BatchGenFactory | None = replacement or loaded.batch_gen_factory
        self._generator = self._factory(deterministic=deterministic)

    def __repr__(self) -> str:
        return f"GeneratorSource({self.facts.name}, {'filled' if self._factory else 'empty'})"

    @property
    def generator(self) -> BatchGenerator:
        """The generator as it is now; without weights it moves KV and computes nothing."""
        return self._generator

    def replace_failed(self) -> None:
        """Make a new generator: a call has raised, and the old one's rows are given up."""
        if self._factory is None:
            raise InvariantBroken(f"{self!r}: nothing computes without weights")
        self._generator = self._factory(deterministic=self._deterministic)

    def release_weights(self) -> None:
        """Let go of the weights; every row must be closed."""
        self._generator.release_model()
        self._factory = None

    def take_weights(self, loaded: LoadedModel) -> None:
        """Make a generator from weights that were loaded anew. Raises OtherWeights."""
        if loaded.fingerprint != self.facts.fingerprint:
            raise OtherWeights(self.facts.name)
        self._factory = self._replacement or loaded.batch_gen_factory
        self._generator = self._factory(deterministic=self._deterministic)


def _no_weights(*, deterministic: bool) -> BatchGenerator:
    raise InvariantBroken("generators come from the engine's GeneratorSource")

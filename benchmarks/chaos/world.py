"""What chaos runs on: the fake generator with KV of a model's size, or a model."""

from array import array

from keepwarm.core.errors import InvariantBroken
from keepwarm.core.layout import CacheLayout, LayerLayout
from keepwarm.core.policies import EngineConfig
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import LoadedModel, Payload
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.store.agent_cache_store import AgentCacheStore, StoreConfig
from keepwarm.testing.generator import FakeBatchGenerator, FakePayload
from keepwarm.testing.tokenizer import FakeTokenizer

FAKE = "fake"
NUM_FAKE_LAYERS = 32
FAKE_VOCABULARY = 256


class WideFakeGenerator(FakeBatchGenerator):
    """The fake with KV of a model's size: every layer holds the same, and must still when read."""

    def __init__(self, *, deterministic: bool) -> None:
        super().__init__(
            layout=CacheLayout((LayerLayout(1, 1, 1),) * NUM_FAKE_LAYERS, "float32"),
            vocab_size=FAKE_VOCABULARY,
            deterministic=deterministic,
        )

    @property
    def layout(self) -> CacheLayout:
        return self._layout

    def pack(self, payload: Payload) -> tuple[memoryview, ...]:
        if not isinstance(payload, FakePayload):
            raise InvariantBroken(f"{payload!r} is no payload of this generator")
        layer = memoryview(array("Q", payload.values).tobytes())
        half = layer.nbytes // 2
        return (layer[:half], layer[half:]) * NUM_FAKE_LAYERS

    def unpack(self, num_tokens: int, data: memoryview) -> Payload:
        layer_bytes = 8 * num_tokens
        layer = bytes(data[:layer_bytes])
        if data != layer * NUM_FAKE_LAYERS:
            raise InvariantBroken("the layers of a payload differ")
        return super().unpack(num_tokens, memoryview(layer))


def load_world(world: str) -> LoadedModel:
    """Load the fake, or a model by its name."""
    if world != FAKE:
        from keepwarm.mlx_backend.loading.loader import load_model

        return load_model(world)
    return LoadedModel(
        name=FAKE,
        fingerprint="chaos",
        layout=WideFakeGenerator(deterministic=True).layout,
        max_context_tokens=100_000,
        vocab_size=FakeTokenizer().vocab_size,
        tokenizer=FakeTokenizer(),
        batch_gen_factory=WideFakeGenerator,
    )


def new_engine(
    loaded: LoadedModel, store: AgentCacheStore | None, ram_blocks: int
) -> BlockPoolBatchEngine:
    """Make a deterministic engine that reads from the disk even what it could compute as fast."""
    return BlockPoolBatchEngine(
        loaded,
        pool=BlockPool(ram_blocks * loaded.layout.block_bytes),
        store=store,
        config=EngineConfig(always_restore=True),
        deterministic=True,
    )


def open_store(home: str, disk_budget_bytes: int) -> AgentCacheStore:
    """Open a store that may fill its disk to the last byte."""
    config = StoreConfig(disk_budget_bytes=disk_budget_bytes, free_floor_bytes=0)
    return AgentCacheStore(home, config=config)

"""Which way a model is computed, and what is said of it: the native step, or MLX and the reason."""

import logging
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from engines import run, user
from keepwarm import AgentCacheStore, BlockPool, BlockPoolBatchEngine
from keepwarm.core.errors import ConfigError, UnsupportedModel
from keepwarm.core.events import Completed
from keepwarm.core.ports import LoadedModel
from keepwarm.mlx_backend.loading import computation, memory_estimate, native
from keepwarm.mlx_backend.loading.loader import load_model
from keepwarm.mlx_backend.loading.memory_estimate import estimate_bytes
from keepwarm.mlx_backend.loading.model_folder import ModelFolder
from keepwarm.mlx_backend.loading.weights import open_model
from keepwarm.native.library import Missing
from native_steps import require_native
from tiny_models import write_tiny_model


@pytest.fixture(autouse=True, scope="module")
def there_is_a_native_step() -> None:
    require_native()
    if mx.default_device() != mx.cpu:
        pytest.skip("a GPU computes here")


KNOWN = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "llama, four bits": {"quantise_bits": 4, "dtype": mx.float16},
    "llama, eight bits": {"quantise_bits": 8, "dtype": mx.bfloat16},
    "llama, bfloat16": {"dtype": mx.bfloat16},
    "llama, own head": {"tie_word_embeddings": False},
    "llama, scaled positions": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        }
    },
}
UNKNOWN = {
    "gemma": ({}, "norm"),
    "phi3": ({}, "parts"),
    "olmo2": ({}, "parts"),
    "llama, three bits": ({"quantise_bits": 3}, "3 bits"),
    "llama, traditional positions": ({"rope_traditional": True}, "positions"),
    "llama, an odd vocabulary": ({"vocab_size": 321}, "321 x 128"),
}


def tiny(folder: Path, kind: str, **changes: object) -> Path:
    return write_tiny_model(folder / "tiny", kind.partition(",")[0], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KNOWN)
def test_the_native_step_computes_what_it_knows(tmp_path: Path, kind: str) -> None:
    loaded = load_model(tiny(tmp_path, kind, **KNOWN[kind]), home=tmp_path)

    assert loaded.computed_by.startswith("the native step (")
    assert loaded.computed_by.endswith(", KV in float16")
    assert (loaded.layout.dtype, loaded.is_reproducible) == ("float16", True)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_mlx_computes_what_the_native_step_does_not_know(tmp_path: Path, kind: str) -> None:
    changes, reason = UNKNOWN[kind]
    loaded = load_model(tiny(tmp_path, kind, **changes), home=tmp_path)

    assert loaded.computed_by.startswith("MLX in float32, KV in float32; no native step: ")
    assert reason in loaded.computed_by
    assert not loaded.is_reproducible


def test_an_activation_that_modules_do_not_show_is_found_by_its_logits(tmp_path: Path) -> None:
    changes = {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.2,
        "attention_bias": False,
        "mlp_bias": False,
    }
    loaded = load_model(tiny(tmp_path, "granite", **changes), home=tmp_path)

    assert "logits differ from MLX's by" in loaded.computed_by


def test_weights_that_are_no_numbers_are_left_to_mlx(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "llama")
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = mx.array(mx.nan)
    mx.save_safetensors(str(file), weights, {"format": "mlx"})

    step = native.native_step(
        open_model(ModelFolder.open(folder)),
        require_native(),
        max_context_tokens=512,
        kv_dtype="float16",
    )

    assert step == Missing("a weight is not a finite number")


def test_a_setting_leaves_it_to_mlx(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "llama")

    assert (
        "switched off by the setting" in load_model(folder, native=False, home=tmp_path).computed_by
    )
    asked = load_model(folder, dtype="float32", home=tmp_path)
    assert asked.computed_by.startswith("MLX in float32")
    assert "float32 was asked for" in asked.computed_by


def test_without_a_library_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Missing("it was not compiled", "Install g++")
    monkeypatch.setattr(computation, "usable_library", lambda: gone)

    loaded = load_model(tiny(tmp_path, "llama"), home=tmp_path)

    assert loaded.computed_by.endswith("no native step: it was not compiled. Install g++")


def test_kv_in_float32_on_request(tmp_path: Path) -> None:
    loaded = load_model(tiny(tmp_path, "llama"), kv_dtype="float32", home=tmp_path)

    assert loaded.computed_by.endswith("KV in float32")
    assert loaded.layout.dtype == "float32"


def test_a_dtype_of_kv_that_mlx_does_not_give_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_model(tiny(tmp_path, "llama"), kv_dtype="float16", native=False, home=tmp_path)

    assert "KV in float16 was asked for, and MLX keeps it in float32" in caplog.text


def test_an_unknown_dtype_of_kv_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_dtype: 'bfloat16' is not one of .*float32"):
        load_model(tmp_path, kv_dtype="bfloat16", home=tmp_path)


def test_what_neither_can_compute_is_refused(tmp_path: Path) -> None:
    sliding = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    with pytest.raises(UnsupportedModel, match="keep RotatingKVCache"):
        load_model(tiny(tmp_path, "llama", **sliding), home=tmp_path)


def test_the_model_to_compare_with_is_mlx_lms_own(tmp_path: Path) -> None:
    loaded: LoadedModel = load_model(
        tiny(tmp_path, "llama", quantise_bits=4, dtype=mx.float16), home=tmp_path
    )
    model = loaded.bare()

    assert model is loaded.bare()
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.float32}  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KNOWN)
def test_packed_weights_are_estimated_as_they_are_packed(tmp_path: Path, kind: str) -> None:
    folder = tiny(tmp_path, kind, **KNOWN[kind])
    loaded = load_model(folder, home=tmp_path)
    packed = loaded.batch_gen_factory(deterministic=False)._model  # type: ignore[attr-defined]
    held = sum(getattr(array, "nbytes", 0) for array in packed.memory)

    assert held - 4096 < estimate_bytes(folder) - working_bytes(folder) <= held


def working_bytes(folder: Path) -> int:
    """Return the estimate of what a chunk needs besides the weights."""
    config = ModelFolder.open(folder).config
    return memory_estimate._working_bytes(config, 4, is_fused=True)


def test_a_home_written_with_kv_of_another_kind_goes_on(tmp_path: Path) -> None:
    """Turns stay, and KV of another fingerprint is computed again."""
    folder = tiny(tmp_path, "llama")
    before = load_model(folder, native=False, home=tmp_path)
    now = load_model(folder, home=tmp_path)
    first = reply(before, tmp_path, messages=[user("x" * 600)])
    again = reply(now, tmp_path, append=[user("y")])
    third = reply(now, tmp_path, append=[user("z")])

    assert again.usage.prompt_tokens > first.usage.prompt_tokens
    assert again.usage.cached_tokens == 0
    assert third.usage.cached_tokens >= again.usage.prompt_tokens
    assert third.usage.prompt_tokens > again.usage.prompt_tokens


def reply(loaded: LoadedModel, home: Path, **prompt: object) -> Completed:
    """Answer ada in an engine and a store of its own."""
    with AgentCacheStore(home / "agents") as store:
        engine = BlockPoolBatchEngine(loaded, pool=BlockPool(64 << 20), store=store)
        completed = run(engine, agent_id="ada", max_tokens=8, **prompt)
        assert engine.close()
    return completed

"""`load_model` over folders, and one clear error for each way in which a folder can be wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from keepwarm.core.errors import ConfigError, ModelLoadError, UnsupportedModel
from keepwarm.core.layout import LayerLayout
from keepwarm.core.ports import LoadedModel
from keepwarm.mlx_backend.loading.fingerprint import DigestCache
from keepwarm.mlx_backend.loading.loader import load_model
from tiny_models import change_config, tiny_config, write_json, write_tiny_model

TINY_LAYER = LayerLayout(num_kv_heads=2, key_dim=32, value_dim=32)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def weights_of(loaded: LoadedModel) -> dict[str, mx.array]:
    model: Any = loaded.bare()
    return dict(tree_flatten(model.parameters()))


def dtypes_of(loaded: LoadedModel) -> set[mx.Dtype]:
    return {array.dtype for array in weights_of(loaded).values()}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_local_folder_loads(tmp_path: Path, home: Path, model_type: str) -> None:
    loaded = load_model(write_tiny_model(tmp_path / "tiny", model_type), native=False, home=home)

    assert loaded.layout.layers == (TINY_LAYER, TINY_LAYER)
    assert loaded.layout.dtype == "float32"
    assert loaded.max_context_tokens == 2048
    assert loaded.vocab_size == 320
    assert loaded.tokenizer.eos_token_ids == frozenset({2})


def test_a_path_may_be_given_as_text(folder: Path, home: Path) -> None:
    assert load_model(str(folder), home=home).name == str(folder)


def test_the_embedded_model_loads(smollm2: LoadedModel) -> None:
    assert smollm2.name == "smollm2"
    assert smollm2.layout.layers == (LayerLayout(3, 64, 64),) * 30
    assert smollm2.layout.block_bytes == 256 * 30 * 3 * 128 * 2
    assert (smollm2.max_context_tokens, smollm2.vocab_size) == (8192, 49152)


def test_a_hub_id_loads_from_the_hubs_cache_when_offline(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "models--acme--tiny"
    write_tiny_model(cached / "snapshots" / "0123abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    assert load_model("acme/tiny", home=home).layout.layers == (TINY_LAYER, TINY_LAYER)


def test_a_hub_id_that_is_nowhere_is_one_clear_error(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    with pytest.raises(ModelLoadError, match="acme/absent: .*hub did not give it.*local folder"):
        load_model("acme/absent", home=home)


# What it computes in


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_the_cpu_computes_in_float32(tmp_path: Path, home: Path, dtype: mx.Dtype) -> None:
    loaded = load_model(write_tiny_model(tmp_path / "tiny", dtype=dtype), native=False, home=home)

    assert dtypes_of(loaded) == {mx.float32}


def test_the_cpu_dequantises_without_rounding(tmp_path: Path, home: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", dtype=mx.float16, quantise_bits=4)
    stored = mx.load(str(folder / "model.safetensors"))
    prefix = "model.layers.0.mlp.up_proj"
    exact = mx.dequantize(
        stored[f"{prefix}.weight"],
        stored[f"{prefix}.scales"].astype(mx.float32),
        stored[f"{prefix}.biases"].astype(mx.float32),
        group_size=32,
        bits=4,
    )

    loaded = load_model(folder, native=False, home=home)

    assert dtypes_of(loaded) == {mx.float32}
    weight = weights_of(loaded)[f"{prefix}.weight"]
    assert mx.array_equal(weight, exact)


def test_a_dtype_can_be_asked_for(folder: Path, home: Path) -> None:
    loaded = load_model(folder, dtype="bfloat16", home=home)

    assert (dtypes_of(loaded), loaded.layout.dtype) == ({mx.bfloat16}, "bfloat16")


def test_an_unknown_dtype_names_the_known_ones(folder: Path, home: Path) -> None:
    with pytest.raises(ConfigError, match="dtype: 'int3' is not one of .*float32"):
        load_model(folder, dtype="int3", home=home)


# The fingerprint


def fingerprint(folder: Path, home: Path, dtype: str | None = None) -> str:
    return load_model(folder, dtype=dtype, home=home).fingerprint


def test_the_fingerprint_does_not_know_the_name(folder: Path, home: Path, tmp_path: Path) -> None:
    before = fingerprint(folder, home)
    change_config(folder, _name_or_path="acme/renamed")

    assert fingerprint(folder.rename(tmp_path / "renamed"), home) == before


def test_the_fingerprint_knows_the_weights(tmp_path: Path, home: Path) -> None:
    one = write_tiny_model(tmp_path / "one", seed=1)
    other = write_tiny_model(tmp_path / "other", seed=2)

    assert fingerprint(one, home) != fingerprint(other, home)


def test_the_fingerprint_knows_weights_that_were_replaced(folder: Path, home: Path) -> None:
    before = fingerprint(folder, home)
    write_tiny_model(folder, seed=9)

    assert fingerprint(folder, home) != before


def test_the_fingerprint_knows_the_config(folder: Path, home: Path) -> None:
    before = fingerprint(folder, home)
    change_config(folder, rope_theta=20000.0)

    assert fingerprint(folder, home) != before


def test_the_fingerprint_knows_the_dtype(folder: Path, home: Path) -> None:
    assert fingerprint(folder, home) != fingerprint(folder, home, dtype="bfloat16")


def test_the_fingerprint_knows_how_and_with_which_kv_it_is_computed(
    folder: Path, home: Path
) -> None:
    prints = [
        load_model(folder, home=home, **given).fingerprint
        for given in ({}, {"kv_dtype": "float16"}, {"kv_dtype": "float32"}, {"native": False})
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_digest_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def counting(path: Path) -> str:
        hashed.append(path)
        return "digest"

    monkeypatch.setattr("keepwarm.mlx_backend.loading.fingerprint.sha256_of", counting)
    weights = tmp_path / "weights"
    weights.write_bytes(b"one")
    cache = DigestCache(tmp_path / "home" / "digests.json")

    assert [cache.digest(weights), cache.digest(weights)] == ["digest", "digest"]
    assert len(hashed) == 1

    os.utime(weights, ns=(1, 1))
    cache.digest(weights)
    assert len(hashed) == 2


def test_a_damaged_digest_cache_is_an_empty_one(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"one")
    cache = DigestCache(tmp_path / "digests.json")
    digest = cache.digest(weights)
    for damage in ("", "[]", "{", json.dumps({str(weights): 3})):
        cache.path.write_text(damage)
        assert cache.digest(weights) == digest


# What can be wrong with a folder


def truncate(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def reconfigure(**changes: object) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **changes)


def lose_a_shard(folder: Path) -> None:
    weight_map = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


WRONG_FOLDERS = {
    "no config": (remove("config.json"), "config.json", "missing"),
    "config cut": (truncate("config.json"), "config.json", "damaged"),
    "config no object": (overwrite("config.json", b"[]"), "config.json", "not a JSON object"),
    "config not text": (overwrite("config.json", b"\xff\xfe\x00"), "config.json", "damaged"),
    "no model type": (reconfigure(model_type=None), "config.json", "model_type"),
    "no context length": (
        reconfigure(max_position_embeddings=None),
        "config.json",
        "max_position_embeddings",
    ),
    "too few heads": (reconfigure(hidden_size=64), "tiny", "mlx-lm cannot build"),
    "missing argument": (reconfigure(hidden_size=None), "tiny", "mlx-lm cannot build"),
    "too many layers": (reconfigure(num_hidden_layers=3), "tiny", "mlx-lm cannot build"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json", "no tokenizer"),
    "tokenizer cut": (truncate("tokenizer.json"), "tokenizer.json", "damaged"),
    "tokenizer empty": (overwrite("tokenizer.json", b"{}"), "tokenizer.json", "cannot be loaded"),
    "no weights": (remove("model.safetensors"), "model.safetensors", "no weights"),
    "weights cut": (truncate("model.safetensors"), "model.safetensors", "truncated"),
    "weights empty": (overwrite("model.safetensors", b""), "model.safetensors", "truncated"),
    "weights no header": (
        overwrite("model.safetensors", b"\x08" + bytes(7) + b"nonsense"),
        "model.safetensors",
        "header cannot be read",
    ),
    "a pointer instead of weights": (
        overwrite("model.safetensors", b"version https://example.org/spec\nsize 1\n"),
        "model.safetensors",
        "header does not fit",
    ),
    "a shard is missing": (lose_a_shard, "model-00002-of-00002.safetensors", "missing"),
    "unknown quantisation": (
        reconfigure(quantization_config={"quant_method": "compressed-tensors", "format": "odd"}),
        "tiny",
        "unsupported compressed-tensors",
    ),
}


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_a_wrong_folder_is_one_clear_error(folder: Path, home: Path, case: str) -> None:
    damage, file, problem = WRONG_FOLDERS[case]
    damage(folder)

    with pytest.raises(ModelLoadError, match=problem) as caught:
        load_model(folder, home=home)

    assert Path(caught.value.path).name == file
    assert caught.value.remedy


def test_a_path_that_is_not_there(tmp_path: Path, home: Path) -> None:
    for missing in (tmp_path / "absent", str(tmp_path / "absent"), "./absent", "absent"):
        with pytest.raises(ModelLoadError, match="no such folder.*smollm2"):
            load_model(missing, home=home)


def test_a_file_is_not_a_folder(tmp_path: Path, home: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")

    with pytest.raises(ModelLoadError, match="not a model's folder.*GGUF"):
        load_model(file, home=home)


@pytest.mark.parametrize("model_type", ["made_up", "../cache", "made.up"])
def test_an_unknown_architecture_is_named(folder: Path, home: Path, model_type: str) -> None:
    change_config(folder, model_type=model_type)

    with pytest.raises(UnsupportedModel, match=f"architecture '{model_type}'"):
        load_model(folder, home=home)


def test_a_cache_that_is_not_plain_kv_is_named(tmp_path: Path, home: Path) -> None:
    sliding = write_tiny_model(
        tmp_path / "tiny",
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=64,
    )

    with pytest.raises(UnsupportedModel, match="keep RotatingKVCache"):
        load_model(sliding, home=home)


def test_a_quantisation_that_cannot_be_undone_is_named(tmp_path: Path, home: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    weights = mx.load(str(folder / "model.safetensors"))
    bitnet = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    for name, weight in list(weights.items()):
        if name.endswith("_proj.weight"):
            weights[name] = mx.zeros((weight.shape[0] // 4, weight.shape[1]), mx.uint8)
            weights[f"{name}_scale"] = mx.ones((1,))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    write_json(folder / "config.json", tiny_config(quantization_config=bitnet))

    with pytest.raises(ModelLoadError, match=r"quantisation \(bitnet\) cannot be undone"):
        load_model(folder, home=home)

"""`load_model`: from a name or a folder to a model that the engine can run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, dequantize_model, load_tokenizer
from mlx_lm.utils import load_model as load_mlx_model

from keepwarm.core.errors import ConfigError, ModelLoadError, UnsupportedModel
from keepwarm.core.layout import CacheLayout, LayerLayout
from keepwarm.core.ports import LoadedModel
from keepwarm.home import keepwarm_home
from keepwarm.mlx_backend.compute.row_batch import RowBatchGenerator
from keepwarm.mlx_backend.compute.seam_probe import check_seam
from keepwarm.mlx_backend.loading.fingerprint import DigestCache, KVIdentity
from keepwarm.mlx_backend.loading.gguf import EMBEDDED_NAME, embedded_model
from keepwarm.mlx_backend.loading.model_folder import ModelFolder
from keepwarm.mlx_backend.metal import raise_metal_limits
from keepwarm.mlx_backend.text.tokenizer import HFTokenizer

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


@dataclass(frozen=True, slots=True)
class _Weights:
    """The model as it will compute."""

    model: nn.Module
    config: Mapping[str, Any]
    compute_dtype: str
    dequantised: bool


@dataclass(frozen=True, slots=True)
class _Probe:
    """What one token through the model shows."""

    layout: CacheLayout
    vocab_size: int


def load_model(
    name_or_path: str | Path, *, dtype: str | None = None, home: Path | None = None
) -> LoadedModel:
    """Load "smollm2" (embedded), a folder that mlx-lm can load, or a hub id.

    Any thread may run the model: nothing of it is lazy any more. On the CPU device weights are
    dequantised and float32 unless `dtype` says otherwise.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError("dtype", f"{dtype!r} is not one of {sorted(_DTYPES)}")
    home = home or keepwarm_home()
    folder = ModelFolder.open(resolve(name_or_path, home))
    restore_limits = raise_metal_limits()
    try:
        return _load(str(name_or_path), folder, dtype, home, restore_limits)
    except BaseException:
        restore_limits()
        raise


def resolve(name_or_path: str | Path, home: Path) -> Path:
    """The local folder of a model; fetched or converted when it is not there yet."""
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = str(name_or_path)
    if name == EMBEDDED_NAME:
        return embedded_model(home)
    if isinstance(name_or_path, Path) or not _looks_like_hub_id(name):
        raise ModelLoadError(
            name,
            "there is no such folder",
            f"Give a folder, a hub id like owner/name, or {EMBEDDED_NAME!r}",
        )
    return _fetch(name)


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and name[0] not in "./~" and not name.endswith("/")


def _fetch(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=DEFAULT_ALLOW_PATTERNS))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, ConnectionError) as error:
        raise ModelLoadError(
            hub_id,
            f"it is no folder here and the hub did not give it ({_first_line(error)})",
            "Check the name and the network, log in for a gated model, or give a local folder",
        ) from error


def _load(
    name: str,
    folder: ModelFolder,
    dtype: str | None,
    home: Path,
    restore_limits: Callable[[], None],
) -> LoadedModel:
    tokenizer = _load_tokenizer(folder)
    weights = _load_weights(folder, dtype)
    probe = _probe(folder, weights)
    check_seam(weights.model, probe.layout, str(folder.path))
    return LoadedModel(
        name=name,
        fingerprint=_fingerprint(folder, weights, probe, home),
        layout=probe.layout,
        max_context_tokens=_context_tokens(folder, weights.config),
        vocab_size=probe.vocab_size,
        tokenizer=HFTokenizer(tokenizer, set(tokenizer.eos_token_ids)),
        batch_gen_factory=partial(RowBatchGenerator, weights.model, probe.layout),
        model=weights.model,
        close=restore_limits,
    )


def _load_tokenizer(folder: ModelFolder) -> TokenizerWrapper:
    try:
        wrapper: TokenizerWrapper = load_tokenizer(folder.path, eos_token_ids=folder.eos_token_ids)
    # tokenizers and transformers raise bare Exception for files that they cannot make sense of.
    except Exception as error:
        raise ModelLoadError(
            str(folder.path / "tokenizer.json"),
            f"the tokenizer cannot be loaded ({_first_line(error)})",
            "Fetch the model's tokenizer files again",
        ) from error
    return wrapper


def _load_weights(folder: ModelFolder, dtype: str | None) -> _Weights:
    try:
        model, config = load_mlx_model(folder.path, lazy=True)
    # What mlx-lm and MLX raise for a config or for weights that do not belong together.
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(
            str(folder.path),
            f"mlx-lm cannot build the model ({type(error).__name__}: {_first_line(error)})",
            "Check that config.json belongs to these weights, or fetch the model again",
        ) from error
    dequantised = mx.default_device() == mx.cpu and _is_quantised(model)
    if dequantised:
        _dequantise(folder, model, dtype or "float32")
    elif mx.default_device() == mx.cpu or dtype is not None:
        model.set_dtype(_DTYPES[dtype or "float32"])
    _materialise(folder, model)
    # mlx-lm draws random weights that are never computed, and each draw makes the chain of lazy
    # keys behind this state longer: 1.4 MB for every load of SmolLM2, measured with MLX 0.32.4.
    mx.eval(mx.random.state)
    return _Weights(model, config, _compute_dtype(model), dequantised)


def _is_quantised(model: nn.Module) -> bool:
    return not all(map(_is_floating, _parameters(model)))


def _parameters(model: nn.Module) -> list[mx.array]:
    return [
        array for _, array in cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    ]


def _dequantise(folder: ModelFolder, model: nn.Module, dtype: str) -> None:
    # The scales first: float16 scales would round the weights once more.
    model.set_dtype(mx.float32)
    if not any("global_scale" in module for _, module in model.named_modules()):
        dequantize_model(model)
    if _is_quantised(model):
        raise ModelLoadError(
            str(folder.path / "config.json"),
            f"its quantisation ({folder.quantisation}) cannot be undone, and the CPU device is "
            "too slow for quantised weights",
            "Use an unquantised or an MLX affine-quantised copy of the model, or a GPU",
        )
    model.set_dtype(_DTYPES[dtype])


def _is_floating(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def _materialise(folder: ModelFolder, model: nn.Module) -> None:
    try:
        mx.eval(model.parameters())
    except RuntimeError as error:
        raise ModelLoadError(
            str(folder.path),
            f"the weights cannot be read ({_first_line(error)})",
            "Fetch the model's safetensors files again",
        ) from error


def _compute_dtype(model: nn.Module) -> str:
    """The dtypes of the floating-point parameters, in a fixed order: one, as a rule."""
    dtypes = {_dtype_name(array) for array in _parameters(model) if _is_floating(array)}
    return "+".join(sorted(dtypes))


def _dtype_name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _probe(folder: ModelFolder, weights: _Weights) -> _Probe:
    cache = make_prompt_cache(weights.model)
    _require_plain_kv(folder, cache)
    try:
        logits = weights.model(mx.array([[0]]), cache=cache)
        mx.eval(logits)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ModelLoadError(
            str(folder.path / "config.json"),
            f"the model fails on its first token ({_first_line(error)})",
            "Check that config.json belongs to these weights",
        ) from error
    return _Probe(_layout(folder, cache), int(logits.shape[-1]))


def _require_plain_kv(folder: ModelFolder, cache: list[Any]) -> None:
    kinds = sorted({type(layer).__name__ for layer in cache if type(layer) is not KVCache})
    if kinds:
        raise UnsupportedModel(
            str(folder.path / "config.json"),
            f"its layers keep {', '.join(kinds)}, and only full attention (KVCache) is supported",
            "Use a model with full attention in every layer",
        )


def _layout(folder: ModelFolder, cache: list[KVCache]) -> CacheLayout:
    filled = [
        (layer.keys, layer.values)
        for layer in cache
        if layer.keys is not None and layer.values is not None
    ]
    if len(filled) < len(cache):
        raise UnsupportedModel(
            str(folder.path / "config.json"),
            "some of its layers keep no KV of their own",
            "Use a model whose layers do not share KV",
        )
    dtypes = sorted({_dtype_name(array) for pair in filled for array in pair})
    if len(dtypes) > 1 or dtypes[0] not in _DTYPES:
        raise UnsupportedModel(
            str(folder.path / "config.json"),
            f"its KV has the dtypes {', '.join(dtypes)}, and one of {sorted(_DTYPES)} is supported",
            "Load it with dtype='float32'",
        )
    return CacheLayout(layers=tuple(_layer(*pair) for pair in filled), dtype=dtypes[0])


def _layer(keys: mx.array, values: mx.array) -> LayerLayout:
    return LayerLayout(num_kv_heads=keys.shape[1], key_dim=keys.shape[3], value_dim=values.shape[3])


def _fingerprint(folder: ModelFolder, weights: _Weights, probe: _Probe, home: Path) -> str:
    digests = DigestCache(home / "weight-digests.json")
    identity = KVIdentity(
        weight_digests=tuple(digests.digest(file) for file in folder.weight_files),
        config=folder.config,
        compute_dtype=weights.compute_dtype,
        kv_dtype=probe.layout.dtype,
        dequantised=weights.dequantised,
        mlx_lm_version=metadata.version("mlx-lm"),
    )
    return identity.fingerprint()


def _context_tokens(folder: ModelFolder, config: Mapping[str, Any]) -> int:
    for section in (config, config.get("text_config") or {}):
        for key in _CONTEXT_KEYS:
            if isinstance(section.get(key), int):
                return int(section[key])
    raise ModelLoadError(
        str(folder.path / "config.json"),
        "it does not say how many tokens of context the model was trained on",
        "Add max_position_embeddings to it",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""`load_model`: from a name or a folder to a model that the engine can run."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, load_tokenizer

from keepwarm.core.errors import ConfigError, ModelLoadError
from keepwarm.core.layout import CacheLayout
from keepwarm.core.ports import LoadedModel
from keepwarm.home import keepwarm_home
from keepwarm.mlx_backend.compute.row_batch import RowBatchGenerator
from keepwarm.mlx_backend.compute.seam_probe import check_seam
from keepwarm.mlx_backend.compute.slab import MX_DTYPES
from keepwarm.mlx_backend.loading.embedded_model import EMBEDDED_NAME, embedded_model
from keepwarm.mlx_backend.loading.fingerprint import DigestCache, KVIdentity
from keepwarm.mlx_backend.loading.kv_layout import feed_one_token
from keepwarm.mlx_backend.loading.model_folder import ModelFolder, first_line
from keepwarm.mlx_backend.loading.weights import LoadedWeights, load_weights
from keepwarm.mlx_backend.memory import raise_metal_limits
from keepwarm.mlx_backend.text.tokenizer import HFTokenizer

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def load_model(
    name_or_path: str | Path, *, dtype: str | None = None, home: Path | None = None
) -> LoadedModel:
    """Load "smollm2" (embedded), a folder that mlx-lm can load, or a hub id.

    Fetches or converts the model where it is not there yet, which may take long. On the CPU device
    weights are dequantised, and float32 unless `dtype` says otherwise. Any thread may run the
    model: nothing of it is lazy any more, and lazy arrays would belong to the thread that made them
    (MLX 0.32.4). Raises ConfigError, ModelLoadError and UnsupportedModel.
    """
    if dtype is not None and dtype not in MX_DTYPES:
        raise ConfigError("dtype", f"{dtype!r} is not one of {sorted(MX_DTYPES)}")
    home = home or keepwarm_home()
    folder = ModelFolder.open(resolve(name_or_path, home))
    restore_limits = raise_metal_limits()
    try:
        return _load(str(name_or_path), folder, dtype, home, restore_limits)
    except BaseException:
        restore_limits()
        raise


def resolve(name_or_path: str | Path, home: Path) -> Path:
    """Return a model's local folder, fetched or converted if need be. Raises ModelLoadError."""
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
            f"it is no folder here and the hub did not give it ({first_line(error)})",
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
    weights = load_weights(folder, dtype)
    first = feed_one_token(folder, weights.model)
    check_seam(weights.model, first.layout, str(folder.path))
    return LoadedModel(
        name=name,
        fingerprint=_fingerprint(folder, weights, first.layout, home),
        layout=first.layout,
        max_context_tokens=_context_tokens(folder, weights.config),
        vocab_size=first.vocab_size,
        tokenizer=HFTokenizer(tokenizer, set(tokenizer.eos_token_ids)),
        batch_gen_factory=partial(RowBatchGenerator, weights.model, first.layout),
        model=weights.model,
        close=restore_limits,
    )


def _load_tokenizer(folder: ModelFolder) -> TokenizerWrapper:
    try:
        wrapper: TokenizerWrapper = load_tokenizer(folder.path, eos_token_ids=folder.eos_token_ids)
    # tokenizers 0.23.3 and transformers 5.23.0 raise bare Exception for files that they cannot
    # make sense of.
    except Exception as error:
        raise ModelLoadError(
            str(folder.path / "tokenizer.json"),
            f"the tokenizer cannot be loaded ({first_line(error)})",
            "Fetch the model's tokenizer files again",
        ) from error
    return wrapper


def _fingerprint(
    folder: ModelFolder, weights: LoadedWeights, layout: CacheLayout, home: Path
) -> str:
    digests = DigestCache(home / "weight-digests.json")
    identity = KVIdentity(
        weight_digests=tuple(digests.digest(file) for file in folder.weight_files),
        config=folder.config,
        compute_dtype=weights.compute_dtype,
        kv_dtype=layout.dtype,
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

"""`load_model`: from a name or a folder to a model that the engine can run."""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, load_tokenizer

from keepwarm.core.errors import ModelLoadError
from keepwarm.core.ports import LoadedModel
from keepwarm.home import keepwarm_home
from keepwarm.mlx_backend.loading.computation import Computation, Wanted, computation_of
from keepwarm.mlx_backend.loading.embedded_model import (
    EMBEDDED_NAME,
    converted_folder,
    embedded_model,
    embedded_source,
    is_intact,
)
from keepwarm.mlx_backend.loading.fingerprint import DigestCache, KVIdentity
from keepwarm.mlx_backend.loading.model_folder import ModelFolder, first_line
from keepwarm.mlx_backend.memory import raise_metal_limits
from keepwarm.mlx_backend.text.tokenizer import HFTokenizer


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    native: bool = True,
    home: Path | None = None,
) -> LoadedModel:
    """Load "smollm2" (embedded), a folder that mlx-lm can load, or a hub id.

    Fetches or converts the model where it is not there yet, which may take long. On Linux's CPUs
    the native step computes the models that it knows, with KV in `kv_dtype` (float16 by default, or
    float32), unless `native` is false. MLX computes the others, and any that is loaded with a
    `dtype`: on the CPU device with weights that are dequantised, and float32 unless `dtype` says
    otherwise. Any thread may run the model: nothing of it is lazy any more, and lazy arrays would
    belong to the thread that made them (MLX 0.32.4). Raises ConfigError, ModelLoadError and
    UnsupportedModel.
    """
    wanted = Wanted(dtype, kv_dtype, native)
    home = home or keepwarm_home()
    folder = ModelFolder.open(resolve(name_or_path, home))
    restore_limits = raise_metal_limits()
    try:
        return _load(str(name_or_path), folder, wanted, home, restore_limits)
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


def local_folder(source: str, home: Path) -> Path | None:
    """Find the folder of a model that is here already; None where it would have to be made."""
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    try:
        if source == EMBEDDED_NAME:
            folder = converted_folder(home, embedded_source())
            return folder if is_intact(folder) else None
        return Path(snapshot_download(source, local_files_only=True))
    except (ModelLoadError, LocalEntryNotFoundError, HFValidationError):
        return None


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
    wanted: Wanted,
    home: Path,
    restore_limits: Callable[[], None],
) -> LoadedModel:
    tokenizer = _load_tokenizer(folder)
    way = computation_of(folder, wanted)
    return LoadedModel(
        name=name,
        fingerprint=_fingerprint(folder, way, home),
        layout=way.layout,
        max_context_tokens=folder.max_context_tokens,
        vocab_size=way.vocab_size,
        tokenizer=HFTokenizer(tokenizer, set(tokenizer.eos_token_ids)),
        batch_gen_factory=way.factory,
        computed_by=way.by,
        is_reproducible=way.is_native,
        bare=way.bare,
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


def _fingerprint(folder: ModelFolder, way: Computation, home: Path) -> str:
    digests = DigestCache(home / "weight-digests.json")
    identity = KVIdentity(
        weight_digests=tuple(digests.digest(file) for file in folder.weight_files),
        config=folder.config,
        compute_dtype=way.compute_dtype,
        kv_dtype=way.layout.dtype,
        dequantised=way.dequantised,
        mlx_lm_version=metadata.version("mlx-lm"),
    )
    return identity.fingerprint()

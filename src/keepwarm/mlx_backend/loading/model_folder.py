"""A model's folder, checked before mlx-lm sees it, so that errors name the file at fault."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING

from keepwarm.core.errors import ModelLoadError, UnsupportedModel
from keepwarm.mlx_backend.loading.files import read_json_object
from keepwarm.mlx_backend.loading.weight_file import problem_with

_INDEX_NAME = "model.safetensors.index.json"
_TOKENIZER_PATTERNS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_FETCH_AGAIN = "Fetch or convert the model again"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder whose files are there, whole, and of a kind that mlx-lm knows."""

    path: Path
    config: dict[str, Any]
    weight_files: tuple[Path, ...]

    @classmethod
    def open(cls, path: Path) -> "ModelFolder":
        """Check the folder. Raises ModelLoadError and UnsupportedModel."""
        if not path.is_dir():
            raise ModelLoadError(
                str(path), "it is a file, not a model's folder", _remedy_for_file(path)
            )
        config = _read_config(path / "config.json")
        _require_known_architecture(path / "config.json", config)
        _require_tokenizer(path)
        return cls(path, config, _sound_weight_files(path))

    @property
    def eos_token_ids(self) -> list[int] | int | None:
        """The ids that end a reply; generation_config.json wins over config.json, as in mlx-lm."""
        generation = self.path / "generation_config.json"
        if generation.exists():
            ids = _read_json(generation).get("eos_token_id")
            if ids:
                return _as_ids(ids)
        return _as_ids(self.config.get("eos_token_id"))

    @property
    def max_context_tokens(self) -> int:
        """How many tokens of context the model was trained on. Raises ModelLoadError."""
        for section in (self.config, self.config.get("text_config") or {}):
            for key in _CONTEXT_KEYS:
                if isinstance(section.get(key), int):
                    return int(section[key])
        raise ModelLoadError(
            str(self.path / "config.json"),
            "it does not say how many tokens of context the model was trained on",
            "Add max_position_embeddings to it",
        )

    @property
    def quantisation(self) -> str:
        """The quantisation's name in config.json, for messages."""
        section = self._quantisation
        return str(section.get("quant_method") or section.get("mode") or "affine")

    def bits_of(self, tensor: str) -> int:
        """Return how many bits a quantised weight has; one layer may differ from the others."""
        section = self._quantisation
        own = section.get(tensor.removesuffix(".weight"))
        bits = own.get("bits") if isinstance(own, dict) else None
        return int(bits or section.get("bits") or 4)

    @property
    def _quantisation(self) -> dict[str, Any]:
        return self.config.get("quantization") or self.config.get("quantization_config") or {}


def first_line(error: BaseException) -> str:
    """Return what an error says, short enough to stand in another one."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _as_ids(ids: Any) -> list[int] | int | None:
    return ids if ids is None or isinstance(ids, int) else [int(token_id) for token_id in ids]


def _remedy_for_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return "GGUF files are not loaded directly; give a folder in mlx-lm's format"
    return "Give the folder that holds config.json and the safetensors files"


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ModelLoadError(
            str(path), "the file is missing", "Give a model's folder in mlx-lm's format"
        )
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ModelLoadError(str(path), f"the file is damaged ({error})", _FETCH_AGAIN) from error


def _require_known_architecture(path: Path, config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelLoadError(str(path), "it names no model_type", _FETCH_AGAIN)
    module = MODEL_REMAPPING.get(model_type, model_type)
    if not module.isidentifier() or find_spec(f"mlx_lm.models.{module}") is None:
        raise UnsupportedModel(
            str(path),
            f"this version of mlx-lm does not know the architecture {model_type!r}",
            "Upgrade mlx-lm, or use another model",
        )


def _require_tokenizer(path: Path) -> None:
    if not any(file for pattern in _TOKENIZER_PATTERNS for file in path.glob(pattern)):
        raise ModelLoadError(
            str(path / "tokenizer.json"), "the model has no tokenizer", _FETCH_AGAIN
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (path / name).exists():
            _read_json(path / name)


def _sound_weight_files(path: Path) -> tuple[Path, ...]:
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise ModelLoadError(
            str(path / "model.safetensors"),
            "the folder holds no weights in safetensors format",
            "Convert the model with `mlx_lm.convert`, or fetch a copy in mlx-lm's format",
        )
    _require_all_shards(path, files)
    for file in files:
        problem = problem_with(file)
        if problem is not None:
            raise ModelLoadError(str(file), problem, _FETCH_AGAIN)
    return tuple(files)


def _require_all_shards(path: Path, files: list[Path]) -> None:
    index = path / _INDEX_NAME
    if not index.exists():
        return
    shards = _read_json(index).get("weight_map", {}).values()
    missing = sorted(set(shards) - {file.name for file in files})
    if missing:
        raise ModelLoadError(
            str(path / missing[0]),
            f"the file is missing ({len(missing)} of the {len(set(shards))} that {_INDEX_NAME} "
            "names are)",
            _FETCH_AGAIN,
        )

"""What a model will need of the device's memory, from its files' headers alone."""

import math
from pathlib import Path
from typing import Any

from keepwarm.mlx_backend.device import current_device
from keepwarm.mlx_backend.loading.model_folder import ModelFolder
from keepwarm.mlx_backend.loading.weight_file import TensorHeader, tensors_in

CHUNK_TOKENS = 512
"""The working set is that of a prefill chunk of this many tokens."""

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_DTYPE_BYTES = {"F64": 8, "F32": 4, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}


def estimate_bytes(path: Path, dtype: str = "") -> int:
    """Return the bytes of weights and working set of the model in this folder.

    On the CPU device quantised weights count as they will compute: dequantised, in `dtype` or
    float32. Raises ModelLoadError for a folder that is no sound model.
    """
    folder = ModelFolder.open(path)
    on_cpu = current_device().kind == "cpu"
    wanted = _ITEM_BYTES.get(dtype) or (4 if on_cpu else None)
    weights = sum(
        _tensor_bytes(tensor, folder, wanted, dequantised=on_cpu)
        for file in folder.weight_files
        for tensor in tensors_in(file)
    )
    return weights + _working_bytes(folder.config, wanted or 2, fused=not on_cpu)


def _tensor_bytes(
    tensor: TensorHeader, folder: ModelFolder, item_bytes: int | None, *, dequantised: bool
) -> int:
    """Return the bytes of a loaded tensor; `item_bytes` None leaves floats as they are."""
    count = math.prod(tensor.shape)
    stored = count * _DTYPE_BYTES.get(tensor.dtype, 1)
    if tensor.dtype == "U32":  # packed by MLX
        bits = folder.bits_of(tensor.name)
        return count * 32 // bits * (item_bytes or 4) if dequantised else stored
    if dequantised and tensor.name.endswith((".scales", ".biases")):
        return 0
    is_float = tensor.dtype in ("F64", "F32", "F16", "BF16")
    return count * item_bytes if is_float and item_bytes else stored


def _working_bytes(config: dict[str, Any], item_bytes: int, *, fused: bool) -> int:
    """Return what a prefill chunk needs besides KV: a layer's activations, logits and attention
    scores.

    The scores count where attention is not fused, at the model's whole context.
    """
    section = config.get("text_config") or config
    hidden, inner = int(section.get("hidden_size", 0)), int(section.get("intermediate_size", 0))
    heads = int(section.get("num_attention_heads", 0))
    vocabulary = int(section.get("vocab_size", 0))
    context = int(section.get("max_position_embeddings", 0))
    activations = CHUNK_TOKENS * (8 * hidden + 4 * inner) * item_bytes
    scores = 0 if fused else 2 * CHUNK_TOKENS * heads * context * item_bytes
    return activations + scores + 64 * vocabulary * 4

"""What a model will need of the device's memory, from its files' headers alone."""

import math
from pathlib import Path
from typing import Any

from keepwarm.mlx_backend.device import current_device
from keepwarm.mlx_backend.loading.computation import Wanted, native_outlook
from keepwarm.mlx_backend.loading.model_folder import ModelFolder
from keepwarm.mlx_backend.loading.weight_file import TensorHeader, tensors_in
from keepwarm.native.library import Missing

CHUNK_TOKENS = 512
"""The working set is that of a prefill chunk of this many tokens."""

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_DTYPE_BYTES = {"F64": 8, "F32": 4, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}


def estimate_bytes(path: Path, wanted: Wanted | None = None) -> int:
    """Return the bytes of weights and working set of the model in this folder.

    Weights count as they will compute: packed where the native step will; on the CPU device
    otherwise dequantised, in the wanted dtype or float32. Raises ModelLoadError for a folder that
    is no sound model.
    """
    wanted = wanted or Wanted()
    folder = ModelFolder.open(path)
    packed = _packed_bytes(folder, wanted)
    if packed is not None:
        return packed + _working_bytes(folder.config, 4, is_fused=True)
    on_cpu = current_device().kind == "cpu"
    item_bytes = _ITEM_BYTES.get(wanted.dtype or "") or (4 if on_cpu else None)
    weights = sum(
        _tensor_bytes(tensor, folder, item_bytes, dequantised=on_cpu)
        for file in folder.weight_files
        for tensor in tensors_in(file)
    )
    return weights + _working_bytes(folder.config, item_bytes or 2, is_fused=not on_cpu)


def _packed_bytes(folder: ModelFolder, wanted: Wanted) -> int | None:
    """Return the bytes of the weights as the native step packs them; None where MLX computes."""
    outlook = native_outlook(folder, wanted)
    if isinstance(outlook, Missing):
        return None
    parts, library = outlook
    return parts.nbytes(library, folder.max_context_tokens)


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


def _working_bytes(config: dict[str, Any], item_bytes: int, *, is_fused: bool) -> int:
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
    scores = 0 if is_fused else 2 * CHUNK_TOKENS * heads * context * item_bytes
    return activations + scores + 64 * vocabulary * 4

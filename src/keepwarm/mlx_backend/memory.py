"""What a model will need of the device's memory, what that has, and giving it back."""

import ctypes
import gc
import json
import math
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from keepwarm.mlx_backend.device import current_device
from keepwarm.mlx_backend.loading.model_folder import ModelFolder

CHUNK_TOKENS = 512
"""The working set is that of a prefill chunk of so many tokens."""
SHARE_OF_RAM = 0.9
"""Of the machine's memory, where the device has none of its own and recommends nothing."""

_LENGTH_BYTES = 8
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_DTYPE_BYTES = {"F64": 8, "F32": 4, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def estimate_bytes(path: Path, dtype: str = "") -> int:
    """Weights and working set of the model in this folder, from its files' headers alone.

    On the CPU device quantised weights count as they will compute: dequantised, in `dtype` or
    float32. Raises ModelLoadError for a folder that is no sound model.
    """
    folder = ModelFolder.open(path)
    on_cpu = current_device().kind == "cpu"
    wanted = _ITEM_BYTES.get(dtype) or (4 if on_cpu else None)
    weights = sum(
        _tensor_bytes(name, tensor, folder, wanted, dequantised=on_cpu)
        for file in folder.weight_files
        for name, tensor in _tensors(file)
    )
    return weights + _working_bytes(folder.config, wanted or 2, fused=not on_cpu)


def device_bytes() -> int:
    """What weights and KV together may take on this device.

    Metal's recommended working set, a CUDA device's own memory, or most of the RAM that the machine
    or its control group gives this process.
    """
    facts: dict[str, Any] = dict(mx.device_info())
    device = current_device()
    if device.kind == "metal":
        return int(facts["max_recommended_working_set_size"])
    if device.kind == "cuda" and device.memory_bytes:
        return int(facts.get("free_memory") or device.memory_bytes)
    return int(SHARE_OF_RAM * _ram_bytes())


def release_memory() -> None:
    """After a model has gone: free its arrays, MLX's cache of buffers, and the allocator's."""
    gc.collect()
    mx.clear_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _ram_bytes() -> int:
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # "max", or no such file
        sizes.append(int(_CGROUP_LIMIT.read_text()))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        sizes.append(soft)
    return min(sizes)


def _tensors(file: Path) -> list[tuple[str, dict[str, Any]]]:
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(_LENGTH_BYTES), "little")))
    return [(name, tensor) for name, tensor in header.items() if name != "__metadata__"]


def _tensor_bytes(
    name: str,
    tensor: dict[str, Any],
    folder: ModelFolder,
    item_bytes: int | None,
    *,
    dequantised: bool,
) -> int:
    count = int(math.prod(tensor["shape"]))
    stored = count * _DTYPE_BYTES.get(tensor["dtype"], 1)
    if tensor["dtype"] == "U32":  # packed by MLX
        return count * 32 // _bits(folder, name) * (item_bytes or 4) if dequantised else stored
    if dequantised and name.endswith((".scales", ".biases")):
        return 0
    is_float = tensor["dtype"] in ("F64", "F32", "F16", "BF16")
    return count * item_bytes if is_float and item_bytes else stored


def _bits(folder: ModelFolder, tensor: str) -> int:
    """How many bits a weight has; one layer may differ from the others."""
    section = folder.config.get("quantization") or folder.config.get("quantization_config") or {}
    own = section.get(tensor.removesuffix(".weight"))
    bits = own.get("bits") if isinstance(own, dict) else None
    return int(bits or section.get("bits") or 4)


def _working_bytes(config: dict[str, Any], item_bytes: int, *, fused: bool) -> int:
    """What a chunk makes besides KV: activations of a layer, logits, and scores of attention.

    The scores count where attention is not fused, at the model's whole context.
    """
    section = config.get("text_config") or config
    hidden, inner = int(section.get("hidden_size", 0)), int(section.get("intermediate_size", 0))
    heads, vocabulary = (
        int(section.get("num_attention_heads", 0)),
        int(section.get("vocab_size", 0)),
    )
    context = int(section.get("max_position_embeddings", 0))
    activations = CHUNK_TOKENS * (8 * hidden + 4 * inner) * item_bytes
    scores = 0 if fused else 2 * CHUNK_TOKENS * heads * context * item_bytes
    return activations + scores + 64 * vocabulary * 4

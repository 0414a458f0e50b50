"""The embedded model's weights as llama.cpp reads them: the packaged Q4_1 file, and a Q8_0 of it.

Needs the wheel `gguf`, which is no dependency of Keepwarm.
"""

import importlib
from pathlib import Path
from typing import Any


def requantise_to_q8_0(source: Path, target: Path) -> None:
    """Write a GGUF whose matrices are Q8_0, out of one with any quantisation; unless it is there.

    Raises ImportError without `gguf`.
    """
    if target.exists():
        return
    gguf: Any = importlib.import_module("gguf")
    reader = gguf.GGUFReader(source)
    unfinished = target.with_suffix(".tmp")
    writer = gguf.GGUFWriter(unfinished, reader.fields["general.architecture"].contents())
    _copy_fields(gguf, reader, writer)
    for tensor in reader.tensors:
        plain = tensor.tensor_type == gguf.GGMLQuantizationType.F32
        numbers = tensor.data if plain else gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = gguf.GGMLQuantizationType.F32 if plain else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(tensor.name, gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(target)


def _copy_fields(gguf: Any, reader: Any, writer: Any) -> None:
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":  # the writer's own
            continue
        kind, *_, item_kind = (*field.types, None) if len(field.types) == 1 else field.types
        value = field.contents()
        if key == "general.file_type":
            value = int(gguf.LlamaFileType.MOSTLY_Q8_0)
        writer.add_key_value(key, value, kind, sub_type=item_kind)

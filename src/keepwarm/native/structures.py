"""The structures of `src/abi.h`, for ctypes. A change there raises ABI in both files."""

import ctypes
from enum import IntEnum

ABI = 2

_int32 = ctypes.c_int32
_pointer = ctypes.c_void_p


class Kind(IntEnum):
    """How the numbers of a weight are kept; affine: a value is code * scale + bias."""

    AFFINE4 = 0
    AFFINE8 = 1
    FLOAT32 = 2
    FLOAT16 = 3
    BFLOAT16 = 4


class Scale(IntEnum):
    """The type of an affine weight's scales and biases."""

    FLOAT16 = 0
    BFLOAT16 = 1


class Weight(ctypes.Structure):
    """A packed matrix of `num_outputs` x `num_inputs`."""

    _fields_ = (
        ("kind", _int32),
        ("group", _int32),
        ("scale", _int32),
        ("num_outputs", _int32),
        ("num_inputs", _int32),
        ("data", _pointer),
        ("bias", _pointer),
    )


class Layer(ctypes.Structure):
    """The weights of one layer; `q_norm` and `k_norm` may be null."""

    _fields_ = (
        *((name, Weight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _pointer) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
    )


class Model(ctypes.Structure):
    """A model: its sizes, its layers, and what stands before and behind them."""

    _fields_ = (
        ("num_layers", _int32),
        ("dim", _int32),
        ("mlp_dim", _int32),
        ("vocabulary", _int32),
        ("num_heads", _int32),
        ("num_kv_heads", _int32),
        ("head_dim", _int32),
        ("is_kv_float16", _int32),
        ("num_positions", _int32),
        ("norm_epsilon", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
        ("layers", ctypes.POINTER(Layer)),
        ("embedding", Weight),
        ("head", Weight),
        ("final_norm", _pointer),
        ("cosines", _pointer),
        ("sines", _pointer),
    )


class Row(ctypes.Structure):
    """One sequence in a step."""

    _fields_ = (
        ("ids", _pointer),
        ("kv", _pointer),
        ("capacity", ctypes.c_int64),
        ("num_tokens", _int32),
        ("start", _int32),
        ("num_logits", _int32),
    )

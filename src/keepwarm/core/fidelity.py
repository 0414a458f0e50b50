"""How far two honest computations of the same KV may differ."""

_KV_BOUNDS = {"float32": 5e-4, "float16": 0.5, "bfloat16": 4.0}
"""float32: measured between legitimate paths 1.0e-4, with float16-rounded KV 7e-3 (EXP-005).

The others are 32 units in the last place of values from 16 to 32, the largest that SmolLM2's keys
have: not measured, because MLX's CPU device computes a token's row in bfloat16 alike in any chunk.
"""


def kv_bound(dtype: str, *, deterministic: bool) -> float:
    """Return how far the KV of legitimate paths may differ; not at all in canonical shapes."""
    return 0.0 if deterministic else _KV_BOUNDS[dtype]

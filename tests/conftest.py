"""Shared by all tests."""

from importlib.util import find_spec

if find_spec("mlx") is not None:
    # Sorted imports put `mlx` before `keepwarm`; the CPU has to be prepared before either.
    import keepwarm.mlx_backend  # noqa: F401

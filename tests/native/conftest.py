"""Whole steps are compared with mlx-lm's; the library itself needs no MLX."""

from importlib.util import find_spec

if find_spec("mlx") is None:
    collect_ignore = ["test_step.py"]

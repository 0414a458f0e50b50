"""These tests need MLX; `make test` installs it."""

from importlib.util import find_spec

if find_spec("mlx") is None:
    collect_ignore_glob = ["*"]

"""The experiments and benchmarks, as a library that `keepwarm bench` and the tests call."""

# Before any of these modules imports MLX: the CPU has to be prepared first.
import keepwarm.mlx_backend  # noqa: F401

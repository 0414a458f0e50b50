"""What users measure: the experiments, resuming, and agents beside agents."""

# Before any of these modules imports MLX: the CPU has to be prepared first.
import keepwarm.mlx_backend  # noqa: F401

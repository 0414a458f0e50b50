"""What maintainers measure: attacks, kills, the store, the server and swaps; not in the wheel."""

# Before any of these modules imports MLX: the CPU has to be prepared first.
import keepwarm.mlx_backend  # noqa: F401

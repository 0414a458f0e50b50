"""The native CPU step's speed beside llama.cpp's and MLX's."""

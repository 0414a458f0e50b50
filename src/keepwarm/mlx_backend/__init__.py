"""Tensors: the only package that imports mlx, mlx_lm and transformers.

Whichever of its modules is imported first, the CPU is prepared before MLX is loaded.
"""

from keepwarm.mlx_backend.cpu import prepare_cpu

CPU_SETUP = prepare_cpu()

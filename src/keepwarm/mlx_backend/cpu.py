"""Makes MLX fast on Linux's CPU device: an optimised BLAS and a malloc that keeps its pages.

Both must be in place before the first `import mlx.core`, so `keepwarm.mlx_backend` calls this
before anything else, and this module never imports MLX. MLX 0.32.4 takes the BLAS functions that
the process has already loaded; its own are a slow reference.
"""

import ctypes
import ctypes.util
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

BLAS_VARIABLE = "KEEPWARM_BLAS"

MKL_REPRODUCIBLE = "AUTO,STRICT"
"""Makes MKL's sums independent of alignment and of the number of threads, at no measurable cost
(docs/adr/0001-blas-on-the-cpu.md)."""

# glibc's malloc.h. Fresh pages are slow, so freed memory stays with the process (at most
# _TRIM_BYTES at the top of the heap). One arena: the others are mmapped whatever M_MMAP_MAX says.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_TRIM_BYTES = 1 << 30
_TOP_PAD_BYTES = 64 << 20
_MALLOC_SETTINGS = {
    _M_MMAP_MAX: 0,
    _M_TRIM_THRESHOLD: _TRIM_BYTES,
    _M_TOP_PAD: _TOP_PAD_BYTES,
    _M_ARENA_MAX: 1,
}

# Distribution, and how its library's name begins. Best first; see the ADR.
_PACKAGED_BLAS = (("mkl", "libmkl_rt.so"), ("cmeel-openblas", "libopenblas.so"))
_CUDA_DISTS = ("mlx-cuda-13", "mlx-cuda-12")


@dataclass(frozen=True, slots=True)
class CpuSetup:
    """What was found and done for the CPU device, as `doctor` shows it."""

    needed: bool
    """False where MLX computes elsewhere or brings its own BLAS (macOS, CUDA)."""
    blas: str | None = None
    """The library that MLX's matrix products use; None is MLX's slow reference BLAS."""
    num_threads: int = 0
    mkl_cbwr: str | None = None
    malloc_tuned: bool = False
    too_late: bool = False
    """Whether `mlx.core` had been imported before, so that nothing was changed."""
    problems: tuple[str, ...] = ()

    @property
    def reproducible(self) -> bool:
        """Whether equal products give equal bits, whatever runs beside them."""
        return self.mkl_cbwr is not None


@dataclass(frozen=True, slots=True)
class _LoadedBlas:
    path: str | None
    problems: tuple[str, ...]


def prepare_cpu() -> CpuSetup:
    """Load a BLAS for MLX to find, and tune malloc. Warns when it is too late or none is found."""
    if platform.system() != "Linux" or _has_cuda_device():
        return CpuSetup(needed=False)
    if "mlx.core" in sys.modules:
        return _too_late()
    malloc_tuned = _tune_malloc()
    num_threads = len(os.sched_getaffinity(0))
    _set_defaults(num_threads)
    blas = _load_first(_candidates())
    if blas.path is None:
        warnings.warn(
            "no optimised BLAS was found, so MLX runs some 30 times slower than it could on this "
            "CPU; run `pip install 'keepwarm[cpu]'`",
            RuntimeWarning,
            stacklevel=2,
        )
    is_mkl = blas.path is not None and "mkl" in Path(blas.path).name
    return CpuSetup(
        needed=True,
        blas=blas.path,
        num_threads=_threads_in_use(num_threads, is_mkl=is_mkl),
        mkl_cbwr=os.environ["MKL_CBWR"] if is_mkl else None,
        malloc_tuned=malloc_tuned,
        problems=blas.problems,
    )


def _has_cuda_device() -> bool:
    return Path("/dev/nvidiactl").exists() and any(map(_is_installed, _CUDA_DISTS))


def _is_installed(dist: str) -> bool:
    try:
        metadata.distribution(dist)
    except metadata.PackageNotFoundError:
        return False
    return True


def _too_late() -> CpuSetup:
    problem = "mlx.core was imported before keepwarm, so MLX keeps its slow reference BLAS"
    warnings.warn(
        f"{problem}; import keepwarm.mlx_backend (or call keepwarm.load_model) first",
        RuntimeWarning,
        stacklevel=3,
    )
    return CpuSetup(needed=True, too_late=True, problems=(problem,))


def _tune_malloc() -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(option, value) for option, value in _MALLOC_SETTINGS.items())


def _set_defaults(num_threads: int) -> None:
    """Set the variables that BLAS libraries read when they are loaded, unless the user has."""
    os.environ.setdefault("MKL_CBWR", MKL_REPRODUCIBLE)
    os.environ.setdefault("MKL_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(num_threads)))
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(num_threads))
    )


def _threads_in_use(default: int, *, is_mkl: bool) -> int:
    value = os.environ["MKL_NUM_THREADS" if is_mkl else "OPENBLAS_NUM_THREADS"]
    return int(value) if value.isdigit() else default


def _candidates() -> Iterator[str]:
    """Paths or names for dlopen, best first. `KEEPWARM_BLAS` replaces them all, or is `none`."""
    chosen = os.environ.get(BLAS_VARIABLE)
    if chosen is not None:
        if chosen != "none":
            yield chosen
        return
    for dist, prefix in _PACKAGED_BLAS:
        yield from _packaged_libraries(dist, prefix)
    system_wide = ctypes.util.find_library("openblas")
    if system_wide is not None:
        yield system_wide


def _packaged_libraries(dist: str, prefix: str) -> list[str]:
    try:
        files = metadata.files(dist) or []
    except metadata.PackageNotFoundError:
        return []
    return sorted(
        str(Path(str(file.locate())).resolve()) for file in files if file.name.startswith(prefix)
    )


def _load_first(candidates: Iterator[str]) -> _LoadedBlas:
    problems: list[str] = []
    for candidate in candidates:
        try:
            library = ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            problems.append(f"{candidate}: {error}")
            continue
        if hasattr(library, "cblas_sgemm"):
            return _LoadedBlas(candidate, tuple(problems))
        problems.append(f"{candidate}: has no cblas_sgemm")
    return _LoadedBlas(None, tuple(problems))

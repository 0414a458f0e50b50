"""The compiled library: which build fits this CPU, and its functions as methods."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keepwarm.native.build import sources_digest
from keepwarm.native.elf import why_not_loadable
from keepwarm.native.structures import ABI, Kind, Model, Row, Weight

LIBRARY_VARIABLE = "KEEPWARM_NATIVE"
"""A path to another build of the library, or "off"."""
BUILDS = Path(__file__).parent / "builds"
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
"""The control group's limit: microseconds of CPU, or `max`, in a period of microseconds."""

_X86_V3 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_X86_V4 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"})
_HOW_TO_COMPILE = (
    "Install g++ (or run `pip install ziglang`) and install Keepwarm again: "
    "models then decode 5 to 10 times as fast"
)
_RESULTS = {-1: "out of memory", -2: "shapes that do not belong together"}


class NativeError(RuntimeError):
    """The library refused a call."""


@dataclass(frozen=True, slots=True)
class Missing:
    """Why there is no library for this machine, and what would bring one; for people."""

    reason: str
    remedy: str = ""


class Threads:
    """The library's threads and the memory of its steps; the caller is one of them.

    Steps take turns. `close` ends the threads; it is called when the object goes as well.
    """

    def __init__(self, library: "Library", num_threads: int) -> None:
        self._library = library
        self._pointer = library.dll.kw_threads_new(num_threads)
        if not self._pointer:
            raise MemoryError("no memory for the native step's threads")

    def __repr__(self) -> str:
        return f"Threads({self.count})"

    @property
    def count(self) -> int:
        return int(self._library.dll.kw_threads_count(self._pointer))

    def step(self, model: Model, rows: "ctypes.Array[Row]", logits: NDArray[np.float32]) -> None:
        """Compute all rows' tokens; `logits` is (sum of `num_logits`, vocabulary).

        Lets go of the interpreter's lock meanwhile. Raises NativeError.
        """
        self._library.check(
            self._library.dll.kw_step(
                self._pointer, ctypes.byref(model), rows, len(rows), logits.ctypes.data
            )
        )

    def product(self, weight: Weight, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Multiply `x` (rows, num_inputs) with the weight, into (rows, num_outputs); no bias is
        added. Raises NativeError.
        """
        y = np.empty((len(x), weight.num_outputs), np.float32)
        x = np.ascontiguousarray(x, np.float32)
        self._library.check(
            self._library.dll.kw_product(
                self._pointer, ctypes.byref(weight), x.ctypes.data, y.ctypes.data, len(x)
            )
        )
        return y

    def close(self) -> None:
        if self._pointer:
            self._library.dll.kw_threads_free(self._pointer)
            self._pointer = None

    def __del__(self) -> None:
        if getattr(self, "_pointer", None):
            self.close()


class Library:
    """A loaded build. Raises OSError when it cannot be loaded, NativeError for another ABI."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dll = ctypes.CDLL(str(path))
        if (abi := self.dll.kw_abi()) != ABI:
            raise NativeError(f"{path} has ABI {abi}, and {ABI} is needed")
        _declare(self.dll)
        self.target = str(self.dll.kw_target().decode())
        self.sources = str(self.dll.kw_sources().decode())

    def __repr__(self) -> str:
        return f"Library({self.target})"

    def packed_bytes(self, kind: Kind, group: int, num_outputs: int, num_inputs: int) -> int:
        """Return the size of a packed weight. Raises NativeError for a shape it cannot have."""
        size = int(self.dll.kw_packed_bytes(kind, group, num_outputs, num_inputs))
        self.check(min(size, 0))
        return size

    def pack(
        self,
        kind: Kind,
        group: int,
        num_inputs: int,
        arrays: Sequence[NDArray[np.generic]],
        packed: NDArray[np.uint8],
    ) -> None:
        """Pack (num_outputs, ...) arrays: the words, and the scales and biases where affine."""
        words, *rest = [np.ascontiguousarray(array) for array in arrays]
        scales, biases = (array.ctypes.data for array in rest) if rest else (None, None)
        self.check(
            self.dll.kw_pack(
                kind,
                group,
                len(words),
                num_inputs,
                words.ctypes.data,
                scales,
                biases,
                packed.ctypes.data,
            )
        )

    def check(self, result: int) -> None:
        """Raise NativeError for a result that is no success."""
        if result:
            raise NativeError(_RESULTS.get(result, f"result {result}"))


@cache
def library() -> Library | Missing:
    """Return the best build that this CPU can run, loaded once; or why there is none."""
    chosen = os.environ.get(LIBRARY_VARIABLE, "")
    if chosen == "off":
        return Missing(f"it is switched off ({LIBRARY_VARIABLE}=off)")
    if chosen:
        return load_build(Path(chosen))
    if sys.platform != "linux":
        return Missing("it is for CPUs under Linux")
    targets = cpu_targets()
    if not targets:
        return Missing(f"this CPU ({platform.machine()}) has neither AVX2 nor NEON")
    return best_of(BUILDS / f"{target}.so" for target in targets)


def best_of(paths: Iterable[Path]) -> Library | Missing:
    """Load the first build that can be used; else say what is wrong with the first that exists.

    One of other sources than those beside it cannot: it may compute other bits than it is said to.
    """
    problem: Missing | None = None
    for path in filter(Path.exists, paths):
        found = load_build(path)
        if isinstance(found, Library) and found.sources != sources_digest():
            found = Missing(f"{path} was compiled from other sources", _HOW_TO_COMPILE)
        if isinstance(found, Library):
            return found
        problem = problem or found
    return problem or Missing("it was not compiled when Keepwarm was installed", _HOW_TO_COMPILE)


def load_build(path: Path) -> Library | Missing:
    """Load one build, after a look at the file: a damaged library may end the process."""
    try:
        if problem := why_not_loadable(path):
            return Missing(f"{path} cannot be used: {problem}", _HOW_TO_COMPILE)
        found = Library(path)
    except (OSError, NativeError, AttributeError) as error:
        return Missing(f"{path} cannot be used: {error}", _HOW_TO_COMPILE)
    if found.target not in cpu_targets():
        return Missing(f"{path} is for {found.target}, which this CPU is not")
    return found


def cpu_targets() -> list[str]:
    """Name the builds that this CPU can run, best first."""
    machine = platform.machine()
    if machine == "aarch64":
        return ["aarch64"]
    if machine != "x86_64":
        return []
    flags = _cpu_flags()
    levels = [("x86-64-v4", _X86_V3 | _X86_V4), ("x86-64-v3", _X86_V3)]
    return [name for name, needed in levels if needed <= flags]


def num_cores() -> int:
    """Count the cores that this process may use, by its affinity and its control group's limit."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = CPU_LIMIT.read_text().split()
        limit = -(-int(quota) // int(period))
    except (OSError, ValueError):  # "max", or no such file
        return cores
    return max(1, min(cores, limit))


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _declare(dll: ctypes.CDLL) -> None:
    int32, pointer = ctypes.c_int32, ctypes.c_void_p
    dll.kw_target.restype = dll.kw_sources.restype = ctypes.c_char_p
    dll.kw_threads_new.restype = pointer
    dll.kw_threads_new.argtypes = [int32]
    dll.kw_threads_count.argtypes = [pointer]
    dll.kw_threads_free.argtypes = [pointer]
    dll.kw_packed_bytes.restype = ctypes.c_int64
    dll.kw_packed_bytes.argtypes = [int32] * 4
    dll.kw_pack.argtypes = [*[int32] * 4, *[pointer] * 4]
    dll.kw_product.argtypes = [pointer, ctypes.POINTER(Weight), pointer, pointer, int32]
    dll.kw_step.argtypes = [
        pointer,
        ctypes.POINTER(Model),
        ctypes.POINTER(Row),
        int32,
        pointer,
    ]

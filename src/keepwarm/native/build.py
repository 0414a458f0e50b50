"""Compiles the library: the package's own build calls it, and so can anyone.

`python -m keepwarm.native.build` compiles what this machine can run into `builds/`. It imports
nothing of Keepwarm: the build of the package runs it before there is one.
"""

import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "src" / "native.cpp"
TARGETS = {
    "x86_64": ("x86-64-v3", "x86-64-v4"),
    "aarch64": ("aarch64",),
}
# -ffp-contract=off: what is fused says so, so that compilers agree in every bit. The code uses
# nothing of C++'s standard library at run time; both compilers are asked to link none.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
)
_ARCH = {
    "x86-64-v3": "-march=x86-64-v3",
    "x86-64-v4": "-march=x86-64-v4",
    "aarch64": "-march=armv8-a",
}
_ZIG = {
    "x86-64-v3": ("-target", "x86_64-linux-gnu.2.27", "-mcpu=x86_64_v3"),
    "x86-64-v4": ("-target", "x86_64-linux-gnu.2.27", "-mcpu=x86_64_v4"),
    "aarch64": ("-target", "aarch64-linux-gnu.2.27"),
}


class NoCompiler(RuntimeError):
    """Neither a system compiler nor the `ziglang` wheel is there."""


def build(
    targets: Iterable[str], folder: Path, *, compiler: Sequence[str] | None = None
) -> list[Path]:
    """Compile each target into `folder` and return the files.

    Raises NoCompiler, and CalledProcessError with the compiler's words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_build_one(target, folder, compiler) for target in targets]


def _build_one(target: str, folder: Path, compiler: Sequence[str] | None) -> Path:
    command = [*(compiler or command_for(target)), *FLAGS, f'-DKW_SOURCES="{sources_digest()}"']
    path = folder / f"{target}.so"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / path.name
        subprocess.run(
            [
                *command,
                f'-DKW_SOURCES="{sources_digest()}"',
                str(SOURCE),
                "-o",
                str(made),
                "-lpthread",
            ],
            check=True,
            capture_output=True,
            text=True,
        )
        made.replace(path)  # a running process keeps the file that it has loaded
    return path


def sources_digest() -> str:
    """Return a digest of the sources, by which a build from others is told."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE.parent.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def command_for(target: str) -> list[str]:
    """Return the compiler, and what makes it compile for this target. Raises NoCompiler."""
    is_native = target in TARGETS.get(platform.machine(), ())
    for name in system_compilers():
        if is_native:
            return [name, "-x", "c++", _ARCH[target]]
    return zig_command_for(target)


def zig_command_for(target: str) -> list[str]:
    """Return the ziglang wheel as the compiler, for glibc 2.27 and later. Raises NoCompiler."""
    if find_spec("ziglang") is None:
        raise NoCompiler("no g++, no clang++ and no ziglang wheel: install g++ or ziglang")
    return [sys.executable, "-m", "ziglang", "cc", "-x", "c++", *_ZIG[target]]


def system_compilers() -> list[str]:
    """Return the system's C compilers that can also compile C++: they link no library of C++."""
    pairs = (("gcc", "g++"), ("clang", "clang++"))
    return [name for name, with_cpp in pairs if shutil.which(name) and shutil.which(with_cpp)]


def main() -> None:
    if sys.platform != "linux":
        raise SystemExit("the native step is for Linux's CPUs")
    for path in build(TARGETS.get(platform.machine(), ()), HERE / "builds"):
        print(path)  # noqa: T201 - this is a command


if __name__ == "__main__":
    main()

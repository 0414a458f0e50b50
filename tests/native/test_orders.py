"""One order of summation for all instruction sets: random models have the same logits everywhere.

AVX-512's code is compiled for AVX2 too, with each vector as two halves, so that its order is tested
on every CPU. AArch64's is compiled by clang and runs under qemu-user where both are there.
"""

import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from keepwarm.native import build
from keepwarm.native.library import cpu_targets
from native_steps import report_missing

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).parent / "drive.cpp"
SEED, ROUNDS = "1", "4"
AARCH64_LIBRARIES = "/usr/aarch64-linux-gnu"


def _digest(folder: Path, compiler: Sequence[str], run_by: Sequence[str] = ()) -> str:
    flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-O3")]
    program = folder / "drive"
    subprocess.run(
        [
            *(*compiler, "-O2", *flags, f"-I{build.SOURCE.parent}", str(DRIVER)),
            *("-o", str(program), "-lpthread"),
        ],
        check=True,
    )
    run = subprocess.run(
        [*run_by, str(program), SEED, ROUNDS], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.split()[1]


@pytest.fixture(scope="module")
def avx2(tmp_path_factory: pytest.TempPathFactory) -> str:
    if "x86-64-v3" not in cpu_targets() or shutil.which("g++") is None:
        report_missing("orders of summation are NOT compared: it needs g++ and AVX2")
    return _digest(tmp_path_factory.mktemp("avx2"), build.command_for("x86-64-v3"))


def test_vectors_of_16_sum_in_the_order_of_8(avx2: str, tmp_path: Path) -> None:
    assert _digest(tmp_path, [*build.command_for("x86-64-v3"), "-DVL=16"]) == avx2


def test_avx512_sums_in_the_order_of_avx2(avx2: str, tmp_path: Path) -> None:
    if "x86-64-v4" not in cpu_targets():
        pytest.skip("AVX-512 itself is NOT run: this CPU does not have it")
    assert _digest(tmp_path, build.command_for("x86-64-v4")) == avx2


def test_neon_sums_in_the_order_of_avx2(avx2: str, tmp_path: Path) -> None:
    emulator = shutil.which("qemu-aarch64")
    if emulator is None or not Path(AARCH64_LIBRARIES).exists() or find_spec("ziglang") is None:
        pytest.skip("NEON is NOT run: it needs ziglang, qemu-user and libc6-arm64-cross")
    assert platform.machine() == "x86_64"
    run_by = [emulator, "-L", AARCH64_LIBRARIES]
    assert _digest(tmp_path, build.command_for("aarch64"), run_by) == avx2

"""Which build is loaded, and that no file and no CPU ends the process."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from keepwarm.native import build, library
from keepwarm.native.library import BUILDS, Library, Missing, best_of, cpu_targets, load_build
from keepwarm.native.structures import ABI
from native_steps import report_missing, require_native

V3 = frozenset({"avx2", "fma", "f16c", "bmi2", "sse2"})
V4 = V3 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}


@pytest.fixture(scope="module")
def best() -> Path:
    return require_native().path


@pytest.mark.skipif(platform.machine() != "x86_64", reason="builds for x86-64")
@pytest.mark.parametrize(
    ("flags", "targets"),
    [
        (V4, ["x86-64-v4", "x86-64-v3"]),
        (V4 - {"avx512vl"}, ["x86-64-v3"]),
        (V3, ["x86-64-v3"]),
        (V3 - {"avx2"}, []),
        (V3 - {"f16c"}, []),
        (frozenset(), []),
    ],
)
def test_the_cpu_decides(
    monkeypatch: pytest.MonkeyPatch, flags: frozenset[str], targets: list[str]
) -> None:
    monkeypatch.setattr(library, "_cpu_flags", lambda: flags)

    assert cpu_targets() == targets


def test_a_cpu_without_avx2_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEEPWARM_NATIVE", raising=False)
    monkeypatch.setattr(library, "cpu_targets", list)

    found = library.library.__wrapped__()

    assert isinstance(found, Missing)
    assert "neither AVX2 nor NEON" in found.reason


def test_a_build_for_another_cpu_is_not_run(best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "cpu_targets", lambda: ["x86-64-v9"])

    found = load_build(best)

    assert isinstance(found, Missing)
    assert "which this CPU is not" in found.reason


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPWARM_NATIVE", "off")

    found = library.library.__wrapped__()

    assert found == Missing("it is switched off (KEEPWARM_NATIVE=off)")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_build_is_refused(best: Path, tmp_path: Path, share: float) -> None:
    cut = tmp_path / best.name
    whole = best.read_bytes()
    cut.write_bytes(whole[: int(len(whole) * share)])

    found = load_build(cut)

    assert isinstance(found, Missing)
    assert str(cut) in found.reason
    assert "Install g++" in found.remedy


FOREIGN = {
    "text": b"not a library" * 100,
    "another machine's": b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\xf3\x00" + bytes(200),
    "32 bits": b"\x7fELF\x01\x01\x01" + bytes(200),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x86-64-v3.so"
    path.write_bytes(FOREIGN[kind])

    assert isinstance(load_build(path), Missing)


def test_another_shared_library_is_refused() -> None:
    import _ctypes

    found = load_build(Path(_ctypes.__file__))

    assert isinstance(found, Missing)
    assert "kw_abi" in found.reason


def test_another_abi_is_refused(best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI", ABI + 1)

    found = load_build(best)

    assert isinstance(found, Missing)
    assert "has ABI" in found.reason


def test_a_build_of_other_sources_is_refused(best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull that changes them, say, and no installation after it."""
    monkeypatch.setattr(library, "sources_digest", lambda: "others")

    found = best_of([best])

    assert isinstance(found, Missing)
    assert "compiled from other sources" in found.reason


def test_a_damaged_better_build_gives_way(best: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "better.so"
    damaged.write_bytes(b"\x7fELF")

    assert isinstance(best_of([tmp_path / "absent.so", damaged, best]), Library)
    assert isinstance(best_of([tmp_path / "absent.so", damaged]), Missing)


def test_without_a_build_the_remedy_is_said(tmp_path: Path) -> None:
    found = best_of([tmp_path / "absent.so"])

    assert isinstance(found, Missing)
    assert "g++" in found.remedy
    assert "ziglang" in found.remedy


@pytest.mark.parametrize("target", build.TARGETS.get(platform.machine(), ()))
def test_every_build_gives_the_same_bits(target: str) -> None:
    """In a process of its own, because two builds have the same names."""
    if target not in cpu_targets():
        pytest.skip(f"{target} is NOT tested: this CPU cannot run it")
    require_native()
    digests = {digest_of(BUILDS / f"{name}.so") for name in {target, cpu_targets()[-1]}}

    assert len(digests) == 1


def digest_of(path: Path) -> str:
    script = (
        "import sys; sys.path[:0] = sys.argv[1:2]\n"
        "import native_digest; print(native_digest.digest())"
    )
    helpers = Path(__file__).parents[1] / "helpers"
    done = subprocess.run(
        [sys.executable, "-c", script, str(helpers)],
        env={"KEEPWARM_NATIVE": str(path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="affinity and control groups are Linux's")
@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000", 8),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("3200000 100000", 8),
        ("nonsense", 8),
        (None, 8),
    ],
)
def test_threads_follow_affinity_and_the_containers_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, cores: int
) -> None:
    file = tmp_path / "cpu.max"
    if limit is not None:
        file.write_text(f"{limit}\n")
    monkeypatch.setattr(library, "CPU_LIMIT", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))

    assert library.num_cores() == cores


# Compilers


def test_without_any_compiler_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "find_spec", lambda name: None)

    with pytest.raises(build.NoCompiler, match=r"install g\+\+ or ziglang"):
        build.command_for("x86-64-v3")


def test_zig_is_the_compiler_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "find_spec", lambda name: name)

    command = build.command_for("aarch64")

    assert command[:4] == [sys.executable, "-m", "ziglang", "cc"]
    assert "aarch64-linux-gnu.2.27" in command


def test_the_systems_compiler_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = platform.machine()
    if machine not in build.TARGETS:
        pytest.skip(f"no build for {machine}")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(build, "find_spec", lambda name: name)

    assert build.command_for(build.TARGETS[machine][0])[0] == "gcc"


# Sanitizers


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(tmp_path: Path, sanitizers: str) -> None:
    """Random models, shapes, splits and threads, by drive.cpp."""
    target = next((t for t in cpu_targets() if t.endswith("v3") or t == "aarch64"), None)
    if shutil.which("g++") is None or target is None:
        report_missing(f"{sanitizers} is NOT run: it needs g++ and a CPU that runs the step")
    driver = tmp_path / "drive"
    flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-O3")]
    compiled = subprocess.run(
        [
            *("g++", "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"),
            *build.command_for(target)[3:],
            *flags,
            f"-I{build.SOURCE.parent}",
            str(Path(__file__).parent / "drive.cpp"),
            *("-o", str(driver), "-lpthread"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert compiled.returncode == 0, compiled.stderr
    run = subprocess.run(
        [driver, "1", "6"], capture_output=True, text=True, check=False, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("0 of 6 failed\n")

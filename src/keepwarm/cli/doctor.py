"""`keepwarm doctor`: examines this machine, and says what is wrong and what to do."""

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from keepwarm import __version__
from keepwarm.core.errors import ConfigError, ModelLoadError
from keepwarm.home import keepwarm_home

_GIB = 1 << 30
_ENOUGH_MEMORY_BYTES = 2 * _GIB
_ENOUGH_DISK_BYTES = 2 * _GIB
_DISTS = ("mlx", "mlx-lm", "transformers", "tokenizers", "numpy")
_INSTALL = "pip install 'keepwarm[cpu]' (Linux), 'keepwarm[cuda]' (NVIDIA) or keepwarm (macOS)"


class Status(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was examined; `remedy` says what to do where it is not ok."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Also run the experiments here; takes minutes.")
    ] = False,
    model: Annotated[str, typer.Option(help="The self-test's model.")] = "smollm2",
) -> None:
    """Examine this machine, and say what is wrong and what to do."""
    findings = examine(keepwarm_home())
    if selftest:
        findings += self_tested(model)
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        _show(findings)
    if any(finding.status is Status.ERROR for finding in findings):
        raise typer.Exit(1)


def examine(home: Path) -> list[Finding]:
    """Examine everything, in the order in which a person wants to read it."""
    return [
        _versions(),
        *_compute(),
        _memory(),
        _home(home),
        _embedded_model(home),
        *_models(home),
    ]


def self_tested(model: str) -> list[Finding]:
    """Run EXP-005 and EXP-006, shortened, on this device. Raises ModelLoadError."""
    from keepwarm import load_model
    from keepwarm.bench.progress import progress_bar
    from keepwarm.bench.selftest import run_selftest

    loaded = load_model(model)
    with progress_bar("self-test", Console(stderr=True)) as tell:
        result = run_selftest(loaded, tell)
    return [
        _self_test("same computation", result.computation_passed, result.computation_detail),
        _self_test("reconstruction", result.reconstruction_passed, result.reconstruction_detail),
    ]


def _self_test(name: str, passed: bool, detail: str) -> Finding:
    if passed:
        return _ok(name, detail)
    return _error(
        name,
        detail,
        "Do not rely on resumed agents here; report this with the output of `keepwarm bench "
        "output --json FILE`",
    )


def _versions() -> Finding:
    found = {dist: _version(dist) for dist in _DISTS}
    detail = f"keepwarm {__version__}, Python {platform.python_version()}, " + ", ".join(
        f"{dist} {version or 'missing'}" for dist, version in found.items()
    )
    if None in found.values():
        return _error("versions", detail, f"Run {_INSTALL}")
    return _ok("versions", detail)


def _version(dist: str) -> str | None:
    try:
        return metadata.version(dist)
    except metadata.PackageNotFoundError:
        return None


def _compute() -> Iterator[Finding]:
    """Examine the device, and, where it is the CPU, its BLAS and its allocator."""
    try:
        from keepwarm.mlx_backend import CPU_SETUP
        from keepwarm.mlx_backend.device import current_device
    except ImportError as error:
        yield _error("device", f"MLX cannot be imported: {error}", f"Run {_INSTALL}")
        return
    device = current_device()
    memory = f", {_gib(device.memory_bytes)}" if device.memory_bytes else ""
    yield _ok("device", f"{device.kind}: {device.name}{memory}")
    if not CPU_SETUP.needed:
        return
    yield _native_step()
    yield _blas(CPU_SETUP.blas, CPU_SETUP.num_threads, CPU_SETUP.mkl_cbwr, CPU_SETUP.problems)
    yield _allocator(tuned=CPU_SETUP.malloc_tuned)


def _native_step() -> Finding:
    from keepwarm.native.library import Missing, library, num_cores

    found = library()
    if not isinstance(found, Missing):
        return _ok("native step", f"{found.target}, {num_cores()} threads")
    if found.remedy:
        return _warning("native step", f"none: {found.reason}", found.remedy)
    return _ok("native step", f"none: {found.reason}; MLX computes")


def _blas(
    library: str | None, num_threads: int, cbwr: str | None, problems: tuple[str, ...]
) -> Finding:
    if library is None:
        detail = "; ".join(["MLX's own reference BLAS, some 30 times slower", *problems])
        return _warning("blas", detail, "Run pip install 'keepwarm[cpu]'")
    detail = f"{library}, {num_threads} threads"
    if cbwr is None:
        return _warning(
            "blas",
            f"{detail}; repeated products may differ in their last bits",
            "Use MKL (x86-64) where results must be equal byte for byte; nothing else needs it",
        )
    return _ok("blas", f"{detail}, reproducible (MKL_CBWR={cbwr})")


def _allocator(*, tuned: bool) -> Finding:
    if tuned:
        return _ok("allocator", "malloc keeps its memory")
    return _warning(
        "allocator",
        "malloc returns memory to the system after use, which makes new arrays slow",
        "Import keepwarm.mlx_backend before mlx, on a Linux with glibc",
    )


def _memory() -> Finding:
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available_bytes = _available_bytes()
    if available_bytes is None:
        return _ok("memory", f"{_gib(total_bytes)} in all")
    detail = f"{_gib(available_bytes)} available of {_gib(total_bytes)}"
    if available_bytes < _ENOUGH_MEMORY_BYTES:
        return _warning("memory", detail, "Close other programs, or lower the memory budget")
    return _ok("memory", detail)


def _available_bytes() -> int | None:
    """Read Linux's estimate; elsewhere free pages say little, because caches make room."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _home(home: Path) -> Finding:
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    detail = f"{home}, {_gib(free_bytes)} free"
    if not os.access(existing, os.W_OK):
        return _error(
            "home", f"{detail}, not writable", "Set KEEPWARM_HOME to a folder that you may write to"
        )
    if free_bytes < _ENOUGH_DISK_BYTES:
        return _warning("home", detail, "Free some disk, or set KEEPWARM_HOME to another one")
    return _ok("home", detail)


def _embedded_model(home: Path) -> Finding:
    try:
        from keepwarm.mlx_backend.loading.embedded_model import (
            converted_folder,
            embedded_source,
            is_intact,
        )
    except ImportError:
        return _error("model", "cannot be examined without MLX", f"Run {_INSTALL}")
    try:
        source = embedded_source()
    except ModelLoadError as error:
        return _warning("model", f"smollm2: {error.problem}", error.remedy)
    folder = converted_folder(home, source)
    if not folder.exists():
        return _ok("model", "smollm2: installed, converted when first loaded")
    if is_intact(folder):
        return _ok("model", f"smollm2: {folder}")
    return _warning(
        "model",
        f"smollm2: {folder} is damaged",
        "Do nothing: it is set aside, and converted again when next loaded",
    )


def _models(home: Path) -> Iterator[Finding]:
    """Say of each model of the settings that is here how it will be computed."""
    from keepwarm.config import load_settings
    from keepwarm.wiring import registry_of, wanted_of

    try:
        models = list(registry_of(load_settings()))
    except ConfigError as error:
        yield _error("settings", str(error), "Correct the setting; docs/configuration.md lists all")
        return
    try:
        from keepwarm.mlx_backend.loading.computation import outlook_in_words
        from keepwarm.mlx_backend.loading.loader import local_folder
        from keepwarm.mlx_backend.loading.model_folder import ModelFolder
    except ImportError:
        return
    for model in models:
        name, folder = f"computes {model.name}", local_folder(model.source, home)
        if folder is None:
            continue
        try:
            yield _ok(name, outlook_in_words(ModelFolder.open(folder), wanted_of(model.settings)))
        except ModelLoadError as error:
            yield _error(name, error.problem, error.remedy)


def _ok(name: str, detail: str) -> Finding:
    return Finding(name, Status.OK, detail)


def _warning(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name, Status.WARNING, detail, remedy)


def _error(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name, Status.ERROR, detail, remedy)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"


_MARKS = {
    Status.OK: "[green]ok[/]",
    Status.WARNING: "[yellow]warn[/]",
    Status.ERROR: "[red]error[/]",
}


def _show(findings: list[Finding]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        table.add_row(_MARKS[finding.status], finding.name, _escaped(finding.detail))
        if finding.remedy:
            table.add_row("", "", f"[bold]-> {_escaped(finding.remedy)}[/]")
    Console().print(table)


def _escaped(text: str) -> str:
    """Escape brackets: `keepwarm[cpu]` is a requirement, not rich's markup."""
    return text.replace("[", r"\[")

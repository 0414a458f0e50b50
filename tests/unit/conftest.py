"""An engine that is opened again and again on what the last one left, for tests of stores."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stores import Restart, restarting


@pytest.fixture(params=["memory", "disk"])
def restart(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Restart]:
    with restarting(request.param, tmp_path / "store") as restart:
        yield restart

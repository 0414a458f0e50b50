"""What the server's process asks of the system before it listens."""

import resource

import pytest

from keepwarm.cli.server_process import _allow_files

UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("now", "after"),
    [
        ((256, UNLIMITED), (1500, UNLIMITED)),
        ((256, 4096), (1500, 4096)),
        ((256, 1000), (1000, 1000)),
        ((1000, 1000), None),
        ((2000, 4096), None),
        ((UNLIMITED, UNLIMITED), None),
    ],
)
def test_as_many_files_as_connections(
    monkeypatch: pytest.MonkeyPatch, now: tuple[int, int], after: tuple[int, int] | None
) -> None:
    """macOS gives 256 to a process that does not ask."""
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: now)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    _allow_files(1500)
    assert set_to == ([] if after is None else [after])

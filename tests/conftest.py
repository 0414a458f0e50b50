"""Shared by all tests."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

from keepwarm.core.ports import LoadedModel

if find_spec("mlx") is not None:
    # Sorted imports put `mlx` before `keepwarm`; the CPU has to be prepared before either.
    import keepwarm.mlx_backend  # noqa: F401

# No test says how long something takes: a busy machine would fail it.
settings.register_profile("keepwarm", deadline=None)
settings.load_profile("keepwarm")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one worker, and all that compute with the embedded model.

    The model is loaded once, and MLX has no second pair of threads beside its own.
    """
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        group = "model" if "keepwarm_home" in fixtures else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def keepwarm_home() -> Iterator[Path]:
    """One home for all runs, so that the embedded model is converted once per checkout."""
    home = Path(__file__).parents[1] / ".cache" / "keepwarm-test-home"
    before = os.environ.get("KEEPWARM_HOME")
    os.environ["KEEPWARM_HOME"] = str(home)
    yield home
    if before is None:
        del os.environ["KEEPWARM_HOME"]
    else:
        os.environ["KEEPWARM_HOME"] = before


@pytest.fixture(scope="session")
def smollm2(keepwarm_home: Path) -> LoadedModel:
    from keepwarm import load_model

    return load_model("smollm2", home=keepwarm_home)


@pytest.fixture(scope="session")
def smollm2_on_mlx(keepwarm_home: Path) -> LoadedModel:
    """The embedded model where there is no native step."""
    from keepwarm import load_model

    return load_model("smollm2", native=False, home=keepwarm_home)

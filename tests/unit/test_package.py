"""The package's front door."""

import subprocess
import sys

import pytest

import keepwarm


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = keepwarm.no_such_name


def test_everything_exported_has_a_home() -> None:
    assert set(keepwarm.__all__) == {*keepwarm._HOMES, "__version__"}
    assert set(keepwarm.__all__) <= set(dir(keepwarm))


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, keepwarm; print([m for m in ('mlx', 'numpy', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

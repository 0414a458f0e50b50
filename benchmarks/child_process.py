"""Child processes of the benchmarks: a module of this checkout in a Python of its own."""

import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs `module` with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def environment() -> dict[str, str]:
    """Return this process's environment, in which `benchmarks` is found from any folder."""
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

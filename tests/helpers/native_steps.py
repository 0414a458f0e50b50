"""The native step's library for tests: skipped without it, required in CI."""

import os
from typing import NoReturn

import pytest

from keepwarm.native.library import Library, Missing, library

REQUIRED_VARIABLE = "NATIVE_TESTS"
"""Set to `required`, it makes a missing library a failure: CI never skips the native step."""


def require_native() -> Library:
    """Return the library; skip loudly, or fail where it is required."""
    found = library()
    if isinstance(found, Missing):
        report_missing(f"the native step is NOT tested: {found.reason}")
    return found


def report_missing(reason: str) -> NoReturn:
    """Skip with the reason, or fail where the native step is required."""
    if os.environ.get(REQUIRED_VARIABLE) == "required":
        pytest.fail(reason)
    pytest.skip(reason)

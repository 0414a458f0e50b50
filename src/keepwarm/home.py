"""Finds the folder in which Keepwarm keeps its state."""

import os
from pathlib import Path

import platformdirs


def keepwarm_home() -> Path:
    """Return `KEEPWARM_HOME`, or the platform's folder for an application's data."""
    configured = os.environ.get("KEEPWARM_HOME")
    if configured:
        return Path(configured).expanduser()
    return platformdirs.user_data_path("keepwarm", appauthor=False)

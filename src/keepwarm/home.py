"""Where Keepwarm keeps its state."""

import os
from pathlib import Path

import platformdirs


def keepwarm_home() -> Path:
    """`KEEPWARM_HOME`, or the platform's own folder for an application's data."""
    configured = os.environ.get("KEEPWARM_HOME")
    if configured:
        return Path(configured).expanduser()
    return platformdirs.user_data_path("keepwarm", appauthor=False)

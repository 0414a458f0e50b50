"""What the command loads before it knows what it is to do: nothing heavy."""

import subprocess
import sys

PROGRAM = """
import sys
from keepwarm.cli import main

heavy = {"mlx", "mlx_lm", "transformers", "fastapi", "uvicorn", "httpx", "pydantic"}
heavy |= {"keepwarm.engine.batch_engine", "keepwarm.store.agent_cache_store"}
print(sorted(heavy & set(sys.modules)))
"""


def test_help_loads_neither_model_nor_server_nor_client() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"

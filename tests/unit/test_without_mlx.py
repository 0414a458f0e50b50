"""Core, engine, store and fakes work where nothing but Python is installed."""

import subprocess
import sys

PROGRAM = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"mlx", "mlx_lm", "transformers", "numpy", "tokenizers"}:
            raise ImportError(f"{name} is blocked by this test")


sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])

import pkgutil
import keepwarm.core, keepwarm.engine, keepwarm.fleet, keepwarm.kv, keepwarm.store, keepwarm.testing

for package in (
    keepwarm.core,
    keepwarm.engine,
    keepwarm.fleet,
    keepwarm.kv,
    keepwarm.store,
    keepwarm.testing,
):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        __import__(module.name)

from engines import fake_engine, run, user

engine = fake_engine()
done = run(engine, agent_id="ada", messages=[user("Hello")], max_tokens=5)
assert done.usage.completion_tokens == 5
assert run(engine, agent_id="ada", append=[user("And?")], max_tokens=5).usage.cached_tokens > 0
try:
    keepwarm.load_model
except ImportError as error:
    print(error)
assert not {"mlx", "mlx_lm", "transformers", "numpy"} & set(sys.modules)
"""


def test_a_fake_engine_runs_where_mlx_and_numpy_are_missing() -> None:
    import engines

    folder = engines.__file__.rpartition("/")[0]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "blocked by this test" in result.stdout

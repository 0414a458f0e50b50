"""Real models that come and go by name: other tokenizers, shapes and weights, and bad files."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest

from keepwarm.mlx_backend.loading.computation import Wanted
from keepwarm.mlx_backend.loading.loader import resolve
from keepwarm.mlx_backend.loading.memory_estimate import estimate_bytes
from keepwarm.mlx_backend.memory import device_bytes
from keepwarm.wiring import MLXSource
from servers import FakeServer, fake_server
from tiny_models import write_tiny_model

pytestmark = pytest.mark.slow

A, B = "alpha", "beta"


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two models that differ in shape and in their tokenizers' ids."""
    return {
        A: write_tiny_model(tmp_path / A, seed=1),
        B: write_tiny_model(
            tmp_path / B, "qwen2", seed=2, other_ids=True, num_hidden_layers=3, hidden_size=192
        ),
    }


def room_for_one(folders: dict[str, Path]) -> int:
    """Return bytes in which either model fits, and both do not."""
    return max(map(estimate_bytes, folders.values())) * 11 // 10


@contextmanager
def served(folders: dict[str, Path], home: Path, **flags: object) -> Iterator[FakeServer]:
    tables = [f'[models.{name}]\nsource = "{folder}"\n' for name, folder in folders.items()]
    path = home / "keepwarm.toml"
    path.write_text("\n".join(tables))
    options = {
        "model__name": A,
        "model__memory_bytes": room_for_one(folders),
        "memory__budget_bytes": 64 << 20,
        **flags,
    }
    with fake_server(home / "home", source=MLXSource(), config_file=path, **options) as server:
        yield server


def say(client: httpx.Client, agent: str, content: str, model: str, **more: Any) -> dict[str, Any]:
    body = {"content": content, "model": model, "max_tokens": 8, "temperature": 0.0, **more}
    answer = client.post(f"/v1/agents/{agent}/messages", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def states(client: httpx.Client) -> dict[str, str]:
    return {card["id"]: card["state"] for card in client.get("/v1/models").json()["data"]}


def test_one_conversation_on_two_models(folders: dict[str, Path], tmp_path: Path) -> None:
    """Swapped in turn; the same agent on each as if it had never been away from it."""
    with served(folders, tmp_path) as server, server.client() as client:
        client.put("/v1/agents/ada", json={})
        first = say(client, "ada", "x" * 600, A)
        other = say(client, "ada", "y" * 600, B)
        assert other["cache"]["cached_tokens"] == 0
        again = say(client, "ada", "z", A)
        assert again["cache"]["tier"] == "cold"
        assert again["cache"]["cached_tokens"] >= first["usage"]["prompt_tokens"]
        assert [answer["turn"] for answer in (first, other, again)] == [1, 2, 3]
        assert list(states(client).values()) == ["ready", "known"]
        prints = {
            card["id"]: card["fingerprint"] for card in client.get("/v1/models").json()["data"]
        }
        assert len(set(prints.values())) == 2
        assert client.post("/v1/agents/ada/verify").json()["passed"]


def test_what_was_said_elsewhere_is_computed_at_rest(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """By the bits that a cold computation gives."""
    options = {"model__memory_bytes": 4 * room_for_one(folders), "model__deterministic": True}
    with served(folders, tmp_path, **options) as server, server.client() as client:
        client.put("/v1/agents/ada", json={})
        say(client, "ada", "x" * 300, A)
        say(client, "ada", "y" * 600, B)
        wait_until_built(client)
        again = say(client, "ada", "z", A)
        assert again["cache"]["tier"] == "hot"
        assert again["cache"]["cached_tokens"] > again["usage"]["prompt_tokens"] - 30
        report = client.post("/v1/agents/ada/verify").json()
        assert report["passed"]
        assert report["largest_difference"] == 0.0
        assert report["compared_tokens"] >= again["cache"]["cached_tokens"]


def wait_until_built(client: httpx.Client) -> None:
    """Until something was computed that nobody asked for, and then nothing more."""
    before = latest = num_prefilled(client)
    until = time.monotonic() + 60.0
    while time.monotonic() < until:
        time.sleep(0.5)
        known, latest = latest, num_prefilled(client)
        if before < known == latest:
            return
    raise AssertionError(f"{latest - before} tokens were computed")


def num_prefilled(client: httpx.Client) -> int:
    return int(client.get("/v1/stats").json()["batch"]["prefilled_tokens"])


def test_memory_comes_back(folders: dict[str, Path], tmp_path: Path) -> None:
    with served(folders, tmp_path) as server, server.client() as client:
        levels: list[int] = []
        for number in range(4):
            say_to_new = f"agent-{number}"
            client.put(f"/v1/agents/{say_to_new}", json={})
            say(client, say_to_new, "x" * 500, B)
            say(client, say_to_new, "x" * 500, A)
            client.post(f"/v1/models/{A}/unload")
            assert set(states(client).values()) == {"known"}
            levels.append(mx.get_active_memory())
        assert max(levels) - min(levels) < 64 << 10, levels


def test_the_same_name_with_other_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    """Same shape, same tokenizer: nothing but the weights' fingerprint can tell."""
    with served(folders, tmp_path) as server, server.client() as client:
        client.put("/v1/agents/ada", json={})
        first = say(client, "ada", "x" * 600, A)
        kept = say(client, "ada", "again", A)
        assert kept["cache"]["cached_tokens"] >= first["usage"]["prompt_tokens"]
        client.post(f"/v1/models/{A}/unload")
        write_tiny_model(folders[A], seed=77)
        other = say(client, "ada", "and now", A)
        assert other["cache"]["cached_tokens"] == 0
        assert other["turn"] == 3
        assert client.post("/v1/agents/ada/verify").json()["passed"]


def test_a_whole_restart_between(folders: dict[str, Path], tmp_path: Path) -> None:
    for turn, model in enumerate((A, B, A, B), 1):
        with served(folders, tmp_path) as server, server.client() as client:
            client.put("/v1/agents/ada", json={})
            answer = say(client, "ada", f"{turn} " * 200, model)
            assert answer["turn"] == turn
            if turn > 2:
                assert answer["cache"]["tier"] == "cold"


def _cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


def _gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _flipped(name: str, position: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[position] ^= 0xFF
        (folder / name).write_bytes(data)

    return damage


def _config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def _without_tensor(folder: Path) -> None:
    path = str(folder / "model.safetensors")
    weights = dict(mx.load(path))
    weights.pop(min(weights))
    mx.eval(*weights.values())
    mx.save_safetensors(path, weights, {"format": "mlx"})


def _nothing_in_tokenizer(folder: Path) -> None:
    (folder / TOKENIZER).write_text("{}")


WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
DAMAGES: dict[str, Callable[[Path], None]] = {
    "no folder": shutil.rmtree,
    "no weights": _gone(WEIGHTS),
    "weights cut to a half": _cut(WEIGHTS, 0.5),
    "weights cut at the end": _cut(WEIGHTS, 0.999),
    "weights empty": _cut(WEIGHTS, 0.0),
    "weights' header cut": _cut(WEIGHTS, 0.0005),
    "weights' length wrong": _flipped(WEIGHTS, 3),
    "weights' header damaged": _flipped(WEIGHTS, 20),
    "a tensor missing": _without_tensor,
    "no config": _gone(CONFIG),
    "config cut": _cut(CONFIG, 0.5),
    "config empty": _cut(CONFIG, 0.0),
    "unknown architecture": _config(model_type="nonsense"),
    "no architecture": _config(model_type=None),
    "other sizes": _config(hidden_size=64),
    "more layers than weights": _config(num_hidden_layers=9),
    "no context": _config(max_position_embeddings=None),
    "no tokenizer": _gone(TOKENIZER),
    "tokenizer cut": _cut(TOKENIZER, 0.5),
    "tokenizer of nothing": _nothing_in_tokenizer,
}


def test_twenty_ways_to_fail(folders: dict[str, Path], tmp_path: Path) -> None:
    """Whatever is wrong with a model, the one that served goes on, with its agents."""
    sound = tmp_path / "sound"
    shutil.copytree(folders[B], sound)
    assert len(DAMAGES) == 20
    with served(folders, tmp_path) as server, server.client() as client:
        client.put("/v1/agents/ada", json={})
        for number, (what, damage) in enumerate(DAMAGES.items(), 1):
            shutil.rmtree(folders[B], ignore_errors=True)
            shutil.copytree(sound, folders[B])
            damage(folders[B])
            refused = client.post(f"/v1/models/{B}/load")
            assert refused.status_code == 503, (what, refused.text)
            assert len(refused.json()["error"]["message"]) > 30, what
            assert say(client, "ada", f"turn {number}", A)["turn"] == number
            assert states(client) == {A: "ready", B: "failed"}, what
        shutil.rmtree(folders[B], ignore_errors=True)
        shutil.copytree(sound, folders[B])
        assert client.post(f"/v1/models/{B}/load").json()["state"] == "ready"


class TestMemory:
    def test_an_estimate_is_no_less_than_the_weights(self, folders: dict[str, Path]) -> None:
        for folder in folders.values():
            held = sum(array.nbytes for array in mx.load(str(folder / WEIGHTS)).values())
            assert held <= estimate_bytes(folder) < held + (64 << 20)

    def test_quantised_weights_count_as_they_compute(self, tmp_path: Path) -> None:
        plain = write_tiny_model(tmp_path / "plain")
        packed = write_tiny_model(tmp_path / "packed", quantise_bits=4)
        on_mlx = Wanted(native=False)
        difference = estimate_bytes(packed, on_mlx) - estimate_bytes(plain, on_mlx)
        if mx.default_device() == mx.cpu:
            assert abs(difference) < 0.01 * estimate_bytes(plain, on_mlx)
        else:
            assert difference < 0

    def test_a_real_limit(
        self, folders: dict[str, Path], keepwarm_home: Path, tmp_path: Path
    ) -> None:
        """Under a limit of its address space the process refuses what cannot fit, with numbers."""
        on_mlx = Wanted(native=False)
        needed = estimate_bytes(resolve("smollm2", keepwarm_home), on_mlx)
        assert needed > 500 << 20
        script = (
            "import asyncio, resource, sys\n"
            "import keepwarm.mlx_backend\n"
            "from pathlib import Path\n"
            "from keepwarm.config import load_settings\n"
            "from keepwarm.wiring import start_server\n"
            "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
            "given = {'model.name': sys.argv[2], 'memory.budget_bytes': 1_200_000_000}\n"
            "file = Path(sys.argv[1]) / 'keepwarm.toml'\n"
            "file.write_text('[models.smollm2]\\nnative = false')\n"
            "settings = load_settings(given, config_file=file, environment={})\n"
            "async def main():\n"
            "    running = await start_server(settings, Path(sys.argv[1]) / 'home')\n"
            "    try:\n"
            "        await running.engine.models.load('smollm2')\n"
            "    finally:\n"
            "        await running.engine.stop(0.0)\n"
            "asyncio.run(main())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), str(folders[A])],
            capture_output=True,
            text=True,
            env={"KEEPWARM_HOME": str(keepwarm_home), "PATH": "/usr/bin:/bin"},
            timeout=120,
            check=False,
        )
        assert done.returncode == 1
        assert f"ModelTooLarge: the model 'smollm2' needs {needed:,} bytes" in done.stderr

    def test_the_devices_own(self) -> None:
        assert 1 << 30 < device_bytes() < 1 << 46

"""Real Python clients against the server on the fake generator; `make clients` runs all of them.

Each token takes longer than the server is silent, so that their streams are full of heartbeats.
"""

from collections.abc import Iterator

import pytest

from clients import install, run_python
from engines import TOKENIZER, FakeFactory
from servers import MODEL, FakeServer, fake_server

pytestmark = pytest.mark.slow

SCRIPTS = {
    "openai": "openai_client.py",
    "anthropic": "anthropic_client.py",
    "openai-agents": "openai_agents_client.py",
}
REPLY = "Hello world, that would be the Danube."
KEY = "sk-clients"
HEARTBEAT_S = 0.002
TOKEN_S = 0.01


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    install(list(SCRIPTS))
    script = TOKENIZER.encode(REPLY)
    factory = FakeFactory(script=script, vocab_size=TOKENIZER.vocab_size, pause_s=TOKEN_S)
    options = {"server__api_keys": {"clients": KEY}, "server__heartbeat_s": HEARTBEAT_S}
    with fake_server(tmp_path_factory.mktemp("home"), factory=factory, **options) as server:
        yield server


def test_there_are_heartbeats(server: FakeServer) -> None:
    """Or the others would prove less than they say."""
    hello = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
    with server.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        for path, heartbeat in (
            ("/v1/chat/completions", ": keepwarm\n"),
            ("/v1/messages", "event: ping\n"),
        ):
            stream = client.post(path, json={**hello, "stream": True}).text
            assert stream.count(heartbeat) > 5


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_real_client(server: FakeServer, name: str) -> None:
    run_python(name, SCRIPTS[name], server.url, KEY, MODEL)

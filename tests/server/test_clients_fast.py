"""Real Python clients against the server on the fake generator; `make clients` runs all of them."""

from collections.abc import Iterator

import pytest

from clients import install, run_python
from engines import TOKENIZER, FakeFactory
from servers import MODEL, FakeServer, fake_server

SCRIPTS = {
    "openai": "openai_client.py",
    "anthropic": "anthropic_client.py",
    "openai-agents": "openai_agents_client.py",
}
REPLY = "Hello world, that would be the Danube."
KEY = "sk-clients"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    install(list(SCRIPTS))
    factory = FakeFactory(script=TOKENIZER.encode(REPLY), vocab_size=TOKENIZER.vocab_size)
    keys = {"clients": KEY}
    with fake_server(
        tmp_path_factory.mktemp("home"), factory=factory, server__api_keys=keys
    ) as server:
        yield server


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_real_client(server: FakeServer, name: str) -> None:
    run_python(name, SCRIPTS[name], server.url, KEY, MODEL)

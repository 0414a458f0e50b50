"""A server on the fake generator for each module, and a client of it for each test.

A module whose server has settings, or whose tests need one each, has a fixture of the same name.
"""

from collections.abc import Iterator

import httpx
import pytest

from servers import FakeServer, fake_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with fake_server(tmp_path_factory.mktemp("home")) as running:
        yield running
        running.call(lambda engine: engine.check())


@pytest.fixture
def client(server: FakeServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client

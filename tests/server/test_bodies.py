"""Bodies that are compressed, or called something else than JSON."""

import asyncio
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.types import Message

from keepwarm.server.edge import decoding
from keepwarm.server.edge.decoding import PIECE_BYTES, readable
from keepwarm.server.problems import NotAllowed
from servers import FakeServer, fake_server

zstd: Any = vars(decoding)["zstd"]
"""Python's own, or the backport for older versions of Python."""

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
JSON = json.dumps(BODY).encode()
LIMIT = 1 << 20


def raw_deflate(data: bytes) -> bytes:
    compress = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compress.compress(data) + compress.flush()


ENCODERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-Gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "raw deflate": ("deflate", raw_deflate),
    "zstd": ("zstd", zstd.compress),
    "identity": ("identity", bytes),
}
COMPRESSED = [name for name in ENCODERS if name != "identity"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    home = tmp_path_factory.mktemp("home")
    with fake_server(home, server__max_body_bytes=LIMIT) as running:
        yield running


def post(client: httpx.Client, name: str, body: bytes = JSON, **options: Any) -> httpx.Response:
    encoding, encode = ENCODERS[name]
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    return client.post(CHAT, content=encode(body), headers=headers, **options)


class TestEncodings:
    @pytest.mark.parametrize("name", ENCODERS)
    def test_one_is_read_like_the_body_itself(self, client: httpx.Client, name: str) -> None:
        plain = client.post(CHAT, json=BODY).json()
        response = post(client, name)
        assert response.status_code == 200, response.text
        assert response.json()["choices"] == plain["choices"]

    @pytest.mark.parametrize("name", ENCODERS)
    def test_it_may_come_in_pieces(self, client: httpx.Client, name: str) -> None:
        encoding, encode = ENCODERS[name]
        data = encode(JSON)
        pieces = (data[start : start + 7] for start in range(0, len(data), 7))
        response = client.post(CHAT, content=pieces, headers={"Content-Encoding": encoding})
        assert response.status_code == 200, response.text

    @pytest.mark.parametrize("name", COMPRESSED)
    def test_a_large_one_is_whole(self, client: httpx.Client, name: str) -> None:
        padded = JSON[:-1] + b', "more": "' + b"x" * (LIMIT - len(JSON) - 20) + b'"}'
        response = post(client, name, padded)
        assert response.status_code == 200, response.text
        assert response.headers["x-keepwarm-ignored"] == "more"

    @pytest.mark.parametrize("name", COMPRESSED)
    def test_a_bomb_is_stopped_at_the_limit(self, client: httpx.Client, name: str) -> None:
        response = post(client, name, JSON + b" " * (8 * LIMIT))
        assert response.status_code == 413
        assert f"{LIMIT:,} bytes" in response.json()["error"]["message"]

    @pytest.mark.parametrize("name", COMPRESSED)
    def test_a_cut_or_damaged_one_is_refused(self, client: httpx.Client, name: str) -> None:
        encoding, encode = ENCODERS[name]
        data = encode(JSON)
        for broken in (data[:-5], b"", b"{}", data + data, data + b"x", b"\xff" * 40):
            response = client.post(CHAT, content=broken, headers={"Content-Encoding": encoding})
            assert response.status_code == 400, broken
            assert response.json()["error"]["param"] == "body"

    @pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "compress", "\u00e4", "g" * 300])
    @pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/agents/ada/messages"])
    def test_an_unknown_one_is_named(self, client: httpx.Client, path: str, encoding: str) -> None:
        headers = {"Content-Encoding": encoding.encode("latin-1")}
        response = client.post(path, content=gzip.compress(JSON), headers=headers)
        assert response.status_code == 415
        assert response.headers["accept-encoding"] == "gzip, deflate, zstd"
        message = response.json()["error"]["message"]
        assert encoding[:40] in message

    def test_a_window_that_a_short_body_claims_is_refused(self, client: httpx.Client) -> None:
        options = {zstd.CompressionParameter.window_log: 27}
        compressor = zstd.ZstdCompressor(options=options)
        data = compressor.compress(JSON) + compressor.flush()
        response = client.post(CHAT, content=data, headers={"Content-Encoding": "zstd"})
        assert response.status_code == 400
        assert "zstd" in response.json()["error"]["message"]

    @pytest.mark.parametrize("name", COMPRESSED)
    def test_others_have_their_turn_while_it_is_decoded(self, name: str) -> None:
        """A piece at a time, and no more of them than are allowed: a bomb is not opened."""
        encoding, encode = ENCODERS[name]
        bomb = encode(b" " * (8 * LIMIT))
        scope = {
            "method": "POST",
            "headers": [(b"content-encoding", encoding.encode()), (b"content-length", b"5")],
        }

        async def receive() -> Message:
            return {"type": "http.request", "body": bomb, "more_body": False}

        async def read() -> tuple[list[int], int]:
            turns = 0
            pieces: list[int] = []

            async def others() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            body = readable(scope, receive, max_bytes=LIMIT)
            beside = asyncio.create_task(others())
            with pytest.raises(NotAllowed):
                while True:
                    pieces.append(len((await body())["body"]))
            beside.cancel()
            return pieces, turns

        pieces, turns = asyncio.run(read())
        assert [header for header, _ in scope["headers"]] == [b"content-type"]
        assert max(pieces) <= PIECE_BYTES
        assert LIMIT - PIECE_BYTES < sum(pieces) <= LIMIT
        assert turns >= len(pieces) - 1

    @pytest.mark.parametrize("name", COMPRESSED)
    @pytest.mark.parametrize("cut", [-1, 7, None])
    def test_the_end_of_the_body_may_come_later_than_that_of_its_content(
        self, name: str, cut: int | None
    ) -> None:
        """It is waited for: nothing turns in circles until then."""
        encoding, encode = ENCODERS[name]
        data = encode(JSON)
        cuts = [data] if cut is None else [data[:cut], data[cut:]]
        messages: list[Message] = [
            *({"type": "http.request", "body": part, "more_body": True} for part in cuts),
            {"type": "http.request", "body": b"", "more_body": False},
            {"type": "http.disconnect"},
        ]
        headers = [(b"content-encoding", encoding.encode())]

        async def read() -> list[Message]:
            waiting = iter(messages)

            async def receive() -> Message:
                return next(waiting)

            body = readable({"method": "POST", "headers": headers}, receive, max_bytes=LIMIT)
            return [await body() for _ in range(len(cuts) + 2)]

        *parts, end = asyncio.run(read())
        assert b"".join(part["body"] for part in parts) == JSON
        assert [part["more_body"] for part in parts] == [True] * len(cuts) + [False]
        assert end["type"] == "http.disconnect"


class TestTypes:
    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/x-www-form-urlencoded", "", "x", "multipart/form-data"]
    )
    @pytest.mark.parametrize(
        ("path", "body"),
        [(CHAT, BODY), ("/v1/messages", BODY), ("/v1/agents/ada/fork", {"new_id": "x"})],
    )
    def test_json_is_json_whatever_it_is_called(
        self, client: httpx.Client, path: str, body: dict[str, Any], kind: str
    ) -> None:
        content = json.dumps(body).encode()
        response = client.post(path, content=content, headers={"Content-Type": kind})
        assert response.status_code == (404 if "agents" in path else 200), response.text
        node = {"Content-Type": kind, "Sec-Fetch-Mode": "cors"}
        again = client.post(path, content=content, headers=node)
        assert again.status_code == response.status_code
        without = client.build_request("POST", path, content=content)
        assert "content-type" not in without.headers
        assert client.send(without).status_code == response.status_code

    @pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
    def test_not_where_a_page_sends_it(
        self, client: httpx.Client, server: FakeServer, kind: str
    ) -> None:
        """A page may send these anywhere, without asking first."""
        marks: list[dict[str, str]] = [{"Origin": server.url}, {"Sec-Fetch-Site": "same-origin"}]
        for mark in marks:
            headers = {"Content-Type": kind, **mark}
            assert client.post(CHAT, content=JSON, headers=headers).status_code == 400
            headers = {**mark, "Content-Type": "application/json"}
            assert client.post(CHAT, content=JSON, headers=headers).status_code == 200

"""HTTP clients that behave badly, on bare sockets."""

import json
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any, Self

READ_S = 60.0


class RawClient:
    """A connection that sends and reads when it is told, and may end at any moment."""

    def __init__(self, url: str, *, receive_buffer: int | None = None) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._host = f"{host}:{port}"
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(READ_S)
        self.socket.connect((host, int(port)))
        self.received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def post(
        self,
        path: str,
        body: Any,
        headers: Mapping[str, str] | None = None,
        *,
        version: str = "1.1",
    ) -> None:
        data = json.dumps(body).encode()
        self.socket.sendall(self.request(path, data, headers, version=version))

    def request(
        self,
        path: str,
        data: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        version: str = "1.1",
    ) -> bytes:
        lines = {
            "Host": self._host,
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"POST {path} HTTP/{version}\r\n{head}\r\n".encode() + data

    def read_until(self, wanted: Callable[[bytes], object]) -> bytes:
        """Read until `wanted` holds for all that came, or the connection ends; return all of it."""
        while not wanted(self.received):
            data = self.socket.recv(4096)
            if not data:
                break
            self.received += data
        return self.received

    def read_document(self) -> tuple[int, dict[str, str], bytes]:
        """Read a response that has a length; return its status, headers and body."""
        self.read_until(lambda data: b"\r\n\r\n" in data)
        head = self.received.partition(b"\r\n\r\n")[0]
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        self.read_until(lambda data: len(data) >= len(head) + 4 + length)
        body = self.received[len(head) + 4 :][:length]
        self.received = self.received[len(head) + 4 + length :]
        return int(first.split()[1]), headers, body

    def reset(self) -> None:
        """Close without a goodbye: the server's next packet is answered with a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

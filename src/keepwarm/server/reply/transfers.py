"""Agents on their way in and out of the server, as temporary files."""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from keepwarm.core.errors import BundleFailed
from keepwarm.server.problems import TransferFailed
from keepwarm.server.reply.tasks import unless_disconnected

PIECE_BYTES = 1 << 20
"""How much is written, read or sent at a time. A client must read one piece in `slow_reader_s`."""
PIECE_PAUSE_S = 0.02
"""The pause after each piece of an upload, which bounds it to 50 MiB/s: one from this machine comes
as fast as memory copies, and took both of two cores from the model (four streams stood still for
1.3 s)."""


@dataclass(frozen=True, slots=True)
class Transfers:
    """Owns the folder of the files; on its disk `free_floor_bytes` always stay free."""

    folder: Path
    free_floor_bytes: int

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Turn errors of the disk into TransferFailed, which shows no path of this machine."""
        try:
            yield
        except BundleFailed as error:
            raise TransferFailed(error.problem) from error
        except OSError as error:
            raise TransferFailed(error.strerror or type(error).__name__) from error

    async def new_path(self) -> Path:
        """Choose the path of a new file, and make its folder. Raises OSError."""
        make = partial(self.folder.mkdir, mode=0o700, parents=True, exist_ok=True)
        await asyncio.to_thread(make)
        return self.folder / f"{secrets.token_hex(16)}.keepwarm"

    async def receive(self, request: Request, path: Path) -> None:
        """Write the request's body to the path, off the event loop.

        Raises OSError, and TransferFailed where it does not fit.
        """
        length = request.headers.get("content-length", "")
        await asyncio.to_thread(self._check_room, int(length) if length.isdecimal() else 0)
        with await asyncio.to_thread(_create, path) as file:
            async for piece in _in_pieces(request.stream()):
                await asyncio.to_thread(self._write, file, piece)
                await asyncio.sleep(PIECE_PAUSE_S)

    def _write(self, file: BinaryIO, piece: bytes) -> None:
        self._check_room(len(piece))
        file.write(piece)

    def _check_room(self, nbytes: int) -> None:
        disk = os.statvfs(self.folder)
        free_bytes = disk.f_bavail * disk.f_frsize
        if free_bytes < self.free_floor_bytes + nbytes:
            raise TransferFailed(
                f"{nbytes:,} bytes do not fit: {free_bytes:,} are free on the disk and "
                f"{self.free_floor_bytes:,} must stay free"
            )


def _create(path: Path) -> BinaryIO:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "wb")


async def _in_pieces(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    piece = bytearray()
    async for chunk in chunks:
        piece += chunk
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


async def remove(path: Path) -> None:
    """Delete the file, even where the caller is cancelled meanwhile."""
    await asyncio.shield(asyncio.to_thread(path.unlink, missing_ok=True))


class Unanswered(Response):
    """Sends nothing: the client has disconnected."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return


class SentFile(Response):
    """Sends a file, and deletes it. A client that does not read it is cut off by its connection."""

    def __init__(self, path: Path, *, media_type: str, headers: Mapping[str, str]) -> None:
        super().__init__(headers=headers, media_type=media_type)
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with await asyncio.to_thread(self._path.open, "rb") as file:
                self.headers["Content-Length"] = str(os.fstat(file.fileno()).st_size)
                await unless_disconnected(Request(scope, receive), self._send(file, send))
        except ClientDisconnect:
            return
        finally:
            await remove(self._path)

    async def _send(self, file: BinaryIO, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        body = {"type": "http.response.body", "more_body": True}
        while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
            await send({**body, "body": piece})
        await send({"type": "http.response.body", "body": b""})

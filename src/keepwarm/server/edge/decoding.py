"""Bodies as the routes read them: called JSON, and decoded as they come where they are compressed.

They are decoded a piece at a time, and never beyond what is allowed.
"""

import asyncio
import sys
import zlib
from collections.abc import Callable
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from keepwarm.server.edge.body import too_large
from keepwarm.server.problems import Kind, NotAllowed, Problem

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ACCEPTED = ("gzip", "deflate", "zstd")
PIECE_BYTES = 128 << 10
"""Decoded between two looks of the event loop at everything else: less than a millisecond."""
MAX_WINDOW_LOG = 23
"""Of zstd: RFC 9659 has 8 MiB for the web. A larger window is memory that a short body claims."""

_METHODS = frozenset({"POST", "PUT", "PATCH"})
_MARKS_OF_PAGES = ("origin", "sec-fetch-site")
"""Browsers send one or both with each body. (Node, which is none, sends `sec-fetch-mode`.)"""
_ZLIB = zlib.MAX_WBITS
_GZIP = zlib.MAX_WBITS + 16


class Decoder(Protocol):
    """As the standard library has it for bz2, lzma and zstd."""

    def decompress(self, data: bytes, max_length: int) -> bytes: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


class _Inflater:
    """zlib's, in the same manner: it keeps what of its input it has not decoded yet."""

    def __init__(self, window_bits: int) -> None:
        self._inflate = zlib.decompressobj(window_bits)
        self._may_have_more = False

    def decompress(self, data: bytes, max_length: int) -> bytes:
        decoded = self._inflate.decompress(self._inflate.unconsumed_tail + data, max_length)
        self._may_have_more = len(decoded) == max_length
        return decoded

    @property
    def needs_input(self) -> bool:
        return not self._may_have_more and not self._inflate.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data


class _Deflate(_Inflater):
    """By the standard with zlib's head; many clients have always sent it without."""

    def __init__(self) -> None:
        super().__init__(_ZLIB)
        self._has_begun = False

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if data and not self._has_begun:
            self._has_begun = True
            if data[0] & 0x0F != zlib.DEFLATED or data[0] >> 4 > 7:
                self._inflate = zlib.decompressobj(-_ZLIB)
        return super().decompress(data, max_length)


def _zstd() -> Decoder:
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: MAX_WINDOW_LOG}
    return zstd.ZstdDecompressor(options=options)


_DECODERS: dict[str, Callable[[], Decoder]] = {
    "gzip": lambda: _Inflater(_GZIP),
    "x-gzip": lambda: _Inflater(_GZIP),
    "deflate": _Deflate,
    "zstd": _zstd,
}


def readable(scope: Scope, receive: Receive, *, max_bytes: int) -> Receive:
    """Receives the body of a request that the guard has let in. Raises NotAllowed."""
    if scope["method"] not in _METHODS:
        return receive
    _call_it_json(scope)
    return _decoded(scope, receive, max_bytes=max_bytes)


def _call_it_json(scope: Scope) -> None:
    """Whatever a program calls its body: there is no other kind here.

    A web page has to call it so itself. What it calls otherwise it may send anywhere without
    asking, and it is told apart by what its browser says.
    """
    headers = Headers(scope=scope)
    if not any(mark in headers for mark in _MARKS_OF_PAGES):
        others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope["headers"] = [*others, (b"content-type", b"application/json")]


def _decoded(scope: Scope, receive: Receive, *, max_bytes: int) -> Receive:
    """Receives the body as it was before its client compressed it, at most `max_bytes` of it.

    Raises NotAllowed for an encoding that is not known, or more than one.
    """
    headers = Headers(scope=scope)
    encoding = ", ".join(headers.getlist("content-encoding")).strip().lower()
    if encoding in ("", "identity"):
        return receive
    make = _DECODERS.get(encoding)
    if make is None:
        raise NotAllowed(_unknown(encoding))
    stale = (b"content-encoding", b"content-length")
    scope["headers"] = [(name, value) for name, value in scope["headers"] if name not in stale]
    return DecodedBody(receive, make(), encoding, max_bytes=max_bytes)


class DecodedBody:
    """Receives for the application. Raises NotAllowed for what is too large, damaged or cut off."""

    def __init__(
        self, receive: Receive, decoder: Decoder, encoding: str, *, max_bytes: int
    ) -> None:
        self._receive = receive
        self._decoder = decoder
        self._encoding = encoding
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._has_all = False
        self._has_ended = False
        self._is_told = False

    async def __call__(self) -> Message:
        if self._is_told:
            return await self._receive()
        data = b""
        if self._decoder.needs_input and not self._has_all:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            data = message.get("body", b"")
            self._has_all = not message.get("more_body", False)
        else:
            await asyncio.sleep(0)  # nothing was waited for: the others have their turn
        body = self._next_piece(data)
        self._is_told = self._is_whole()
        return {"type": "http.request", "body": body, "more_body": not self._is_told}

    def _next_piece(self, data: bytes) -> bytes:
        piece = self._decoded(data)
        self._num_bytes += len(piece)
        if self._num_bytes > self._max_bytes:
            raise NotAllowed(too_large(self._max_bytes))
        return piece

    def _decoded(self, data: bytes) -> bytes:
        if self._has_ended:
            self._refuse_rest(data)
            return b""
        try:
            piece = self._decoder.decompress(data, PIECE_BYTES)
        except (zlib.error, zstd.ZstdError) as error:
            raise self._damaged(str(error)) from error
        self._has_ended = self._decoder.eof
        self._refuse_rest(self._decoder.unused_data)
        return piece

    def _refuse_rest(self, data: bytes) -> None:
        if data:
            raise self._damaged("something follows its end")

    def _is_whole(self) -> bool:
        """Whether all has come and been decoded."""
        if not self._has_all or not (self._has_ended or self._decoder.needs_input):
            return False
        if not self._has_ended:
            raise self._damaged("it breaks off")
        return True

    def _damaged(self, problem: str) -> NotAllowed:
        message = f"the body cannot be read as {self._encoding}: {problem}"
        return NotAllowed(Problem(400, Kind.INVALID, message, "body"))


def _unknown(encoding: str) -> Problem:
    shown = encoding[:64]
    message = (
        f"the Content-Encoding {shown!r} is not supported; send the body as {', '.join(ACCEPTED)}, "
        "one of them and once, or as it is"
    )
    headers = {"Accept-Encoding": ", ".join(ACCEPTED)}
    return Problem(415, Kind.INVALID, message, "Content-Encoding", headers=headers)

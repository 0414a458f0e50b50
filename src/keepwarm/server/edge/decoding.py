"""Makes bodies readable for routes: named JSON, and decompressed as they come.

They are decompressed a piece at a time, and never beyond what is allowed.
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
"""How much is decoded before the event loop turns to others: less than a millisecond's work."""
MAX_WINDOW_LOG = 23
"""zstd's largest window, 8 MiB as in RFC 9659: a short body could claim memory for a larger one."""

_METHODS = frozenset({"POST", "PUT", "PATCH"})
_MARKS_OF_PAGES = ("origin", "sec-fetch-site")
"""Headers of which browsers send at least one with each body. (Node sends `sec-fetch-mode`.)"""
_ZLIB = zlib.MAX_WBITS
_GZIP = zlib.MAX_WBITS + 16


class Decoder(Protocol):
    """The interface of the standard library's decompressors for bz2, lzma and zstd."""

    def decompress(self, data: bytes, max_length: int) -> bytes: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


class _Inflater:
    """zlib as a Decoder: it keeps the part of its input that it has not decoded yet."""

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
    """Deflate with zlib's header, as the standard says, or without, as many clients send it."""

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
    """Make `receive` give the body as JSON, decompressed. Raises NotAllowed."""
    if scope["method"] not in _METHODS:
        return receive
    _call_it_json(scope)
    return _decoded(scope, receive, max_bytes=max_bytes)


def _call_it_json(scope: Scope) -> None:
    """Set the body's type to JSON, whatever a program calls it: there is no other kind here.

    A web page must name it itself: other types a page may send to any server without asking
    (CORS), so correcting them here would let foreign pages in.
    """
    headers = Headers(scope=scope)
    if not any(mark in headers for mark in _MARKS_OF_PAGES):
        others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope["headers"] = [*others, (b"content-type", b"application/json")]


def _decoded(scope: Scope, receive: Receive, *, max_bytes: int) -> Receive:
    """Make `receive` give the body decompressed, at most `max_bytes` of it.

    Raises NotAllowed for an encoding that is unknown, or more than one.
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
        if not self._has_all and (self._has_ended or self._decoder.needs_input):
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            data = message.get("body", b"")
            self._has_all = not message.get("more_body", False)
        else:
            await asyncio.sleep(0)  # nothing was waited for: let other tasks run
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
        """Whether the body has come and been decoded to its end. Raises NotAllowed if cut off."""
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

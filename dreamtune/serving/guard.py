"""Who may ask, and how much they may send: looked at before anything of a request is read."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dreamtune.serving.errors import Refused

WAY = "Send the header `Authorization: Bearer KEY`, with the key that the server was started with."


class Guard:
    """An ASGI application around another.

    Args:
        key: that requests must bring; None: all may ask, but no page of another site, whose
            browser says so (`Origin`).
        hosts: names that requests may be sent to; empty: any. A page of a browser cannot reach
            a server of this machine by a name of its own (DNS rebinding).
        free: paths that need no key.
        most: bytes of a body; larger: path -> bytes where more are taken.
        seconds: that a body may take to come.
        denied: called for a request without the key.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        hosts: Collection[str],
        free: Collection[str],
        most: int,
        larger: Mapping[str, int],
        seconds: float,
        denied: Callable[[], None],
    ) -> None:
        self.app, self.hosts, self.free, self.denied = app, hosts, free, denied
        self.key = None if key is None else key.encode()
        self.most, self.larger, self.seconds = most, larger, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        most = self.larger.get(scope["path"], self.most)
        try:
            self._check_host(headers.get("host", ""))
            self._check_origin(headers.get("origin"), headers.get("host", ""))
            self._check_key(headers, scope["path"])
            self._check_length(headers.get("content-length", "0"), most)
        except Refused as refused:
            await answer(refused)(scope, receive, send)
            return
        await self.app(scope, self._counted(receive, most), send)

    def _check_origin(self, origin: str | None, host: str) -> None:
        if self.key is None and origin is not None and origin.partition("://")[2] != host:
            raise Refused(
                403,
                "A page of another site asks.",
                got=origin[:100],
                allowed="pages of this server, and programs",
                way_out="Start the server with an API key, and send it.",
            )

    def _check_host(self, host: str) -> None:
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self.hosts and name.strip("[]").lower() not in self.hosts:
            raise Refused(
                421,
                "This server is asked by the name of this machine alone.",
                got=host[:100],
                allowed=sorted(self.hosts),
                way_out="Use one of these names, or start the server with an API key.",
            )

    def _check_key(self, headers: Headers, path: str) -> None:
        if self.key is None or path in self.free:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = headers.get("x-api-key", "")
        # in constant time: how long it takes tells nothing of how much of it is right
        if not hmac.compare_digest(given.strip().encode(), self.key):
            self.denied()
            raise Refused(
                401,
                "The API key is missing or another.",
                way_out=WAY,
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_length(self, stated: str, most: int) -> None:
        if not (stated.isascii() and stated.isdecimal()) or int(stated[:20]) > most:
            raise too_large(most)

    def _counted(self, receive: Receive, most: int) -> Callable[[], Awaitable[Message]]:
        """A body may come in chunks, without a stated length."""
        read, over = 0, False
        until = time.monotonic() + self.seconds

        async def counted() -> Message:
            nonlocal read, over
            if over:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.001, until - time.monotonic()))
            except asyncio.TimeoutError:
                raise while_read(too_slow(self.seconds)) from None
            read += len(message.get("body", b""))
            if read > most:
                raise while_read(too_large(most))
            over = not message.get("more_body", False)
            return message

        return counted


def too_large(most: int) -> Refused:
    return Refused(
        413,
        "The body of the request is too large.",
        allowed=f"{most} bytes",
        way_out="Send less, or start the server with more: --max_body_kb.",
    )


def too_slow(seconds: float) -> Refused:
    return Refused(
        408,
        "The body of the request takes too long to come.",
        allowed=f"{seconds:g} seconds",
        way_out="Send it again, or start the server with more: --timeout_s.",
    )


def while_read(refused: Refused) -> HTTPException:
    """The one kind of error that FastAPI lets through while it reads a body."""
    return HTTPException(refused.status, refused.body)


def answer(refused: Refused, more: Mapping[str, Any] | None = None) -> JSONResponse:
    """more: headers."""
    headers = {**refused.headers, **(more or {})}
    return JSONResponse(refused.body, refused.status, headers)

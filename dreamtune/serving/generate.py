"""POST /generate: a request waits in the queue, and leaves it when its client does."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from dreamtune.serving import schema
from dreamtune.serving.backend import Row
from dreamtune.serving.engine import WARNING, lacks_memory
from dreamtune.serving.errors import Refused, late
from dreamtune.serving.png import adapter_text, encoded
from dreamtune.serving.queue import Drawn, Queue, Ticket

PNG = "image/png"
GONE = 499  # no client reads it; nginx's number for one that has closed
router = APIRouter()
log = logging.getLogger("dreamtune")


@router.post("/generate", response_model=schema.Picture, responses={200: {"content": {PNG: {}}}})
async def generate(wanted: schema.Request, request: Request) -> Response:
    """One picture: as JSON, or as a PNG for `Accept: image/png`, with the rest in its headers."""
    state, began = request.app.state, time.monotonic()
    try:
        row, shape = schema.settled(wanted, state.settings, state.engine)
        ticket = state.queue.submit(row, shape)
        drawn = await _drawn(ticket, state.queue, request)
    except Refused as refused:
        state.metrics.count(OUTCOMES.get(refused.status, "invalid"))
        raise
    except Exception as error:
        state.metrics.count("failed")
        raise _refusal(error, row) from error
    data = await run_in_threadpool(encoded, drawn.image, row, shape, state.engine.base.id)
    state.metrics.count("done")
    state.metrics.latency.observe(time.monotonic() - began)
    return _answer(data, row, drawn, as_png=PNG in request.headers.get("accept", ""))


OUTCOMES = {502: "failed", 503: "full", 504: "late", GONE: "cancelled"}


async def _drawn(ticket: Ticket, queue: Queue, request: Request) -> Drawn:
    """Raises Refused where it takes too long or the client goes, and what the drawing raised."""
    answer = asyncio.wrap_future(ticket.answer)
    gone = asyncio.create_task(_gone(request))
    either: set[asyncio.Future[Any]] = {answer, gone}
    left = ticket.deadline - time.monotonic()
    try:
        await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        queue.cancel(ticket)
        if gone.done():
            raise Refused(GONE, "The client has closed the connection.")
        raise late(queue.timeout)
    finally:
        gone.cancel()
        queue.cancel(ticket)  # also where this task is cancelled
        if not answer.done():
            answer.cancel()


async def _gone(request: Request) -> None:
    """Over when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(error: Exception, row: Row) -> Refused:
    """Of a row that could not be drawn alone either. Ours are sentences for whoever asks; of others
    only the log has more than the kind.
    """
    adapter = adapter_text(row.adapter)
    if lacks_memory(error):
        return Refused(
            507,
            "There is too little memory for this picture alone.",
            got=f"adapter {adapter}",
            way_out="Ask for a smaller size, or for fewer adapters.",
        )
    log.error("A picture of adapter %s failed", adapter, exc_info=error)
    why = f": {error}" if isinstance(error, ValueError) else f" ({type(error).__name__})"
    return Refused(
        500,
        f"This picture could not be drawn{why}.",
        got=f"adapter {adapter}, seed {row.seed}",
        way_out="Leave the adapter out, or give it less strength; the server's log says more.",
    )


def _answer(data: bytes, row: Row, drawn: Drawn, as_png: bool) -> Response:
    picture = schema.Picture(
        image="" if as_png else base64.b64encode(data).decode(),
        seed=row.seed,
        adapter=dict(row.adapter) if isinstance(row.adapter, Mapping) else row.adapter,
        waited=round(drawn.waited, 4),
        drawn=round(drawn.drawn, 4),
        batch=drawn.batch,
        warning=drawn.image.info.get(WARNING),
    )
    if not as_png:
        return JSONResponse(picture.model_dump())
    stated = {**picture.model_dump(exclude={"image"}), "adapter": adapter_text(row.adapter)}
    known = ((name, value) for name, value in stated.items() if value is not None)
    headers = {f"X-Dreamtune-{name.capitalize()}": str(value) for name, value in known}
    return Response(data, media_type=PNG, headers=headers)

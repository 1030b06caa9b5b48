"""The routes of training: what is asked comes in forms, how it goes as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from dreamtune.fields import nearest, shown
from dreamtune.serving.errors import Refused
from dreamtune.serving.guard import answer
from dreamtune.serving.jobs import preview
from dreamtune.serving.jobs.asked import Limits
from dreamtune.serving.jobs.jobs import Full, Jobs, Over

UPLOADS = ("/train", "/photos/check")  # their bodies are bounded by `Limits.body_bytes`
PHOTOS = "photos"  # of the form; may stand several times
# Field of the form -> of `Jobs.submit`.
TRAIN = {
    "prompt": "prompt",
    "name": "name",
    "method": "method",
    "steps": "max_train_steps",
    "seed": "seed",
    "learning_rate": "learning_rate",
    "class_prompt": "class_prompt",
    "identifier": "identifier",
}
CHECK = ("prompt", "class_prompt", "identifier")
FIELD_BYTES = 1 << 13  # a prompt of the longest in any letters
READING = 2  # forms whose photos are in memory at once; the others' are in files
POLL = 0.5  # seconds between looks for events
ALIVE = 15.0  # seconds after which a silent stream says that it is there
RETRY = 2000  # milliseconds after which a browser asks again
AGAIN = 30  # seconds, of Retry-After

Answer = Callable[..., Coroutine[Any, Any, Response]]


def explained(route: Answer) -> Answer:
    """What was wrong with a request is its answer."""

    @functools.wraps(route)
    async def explaining(*args: Any, **more: Any) -> Response:
        try:
            return await route(*args, **more)
        except Refused as error:
            return answer(error)
        except Full as error:
            return answer(Refused(503, str(error), headers={"Retry-After": str(AGAIN)}))
        except Over as error:
            return answer(Refused(409, str(error)))
        except ValueError as error:
            return answer(Refused(422, in_fields(str(error))))

    return explaining


def in_fields(text: str) -> str:
    """An error of `dreamtune train` with the form's fields for the command's options."""
    for field, option in TRAIN.items():
        text = re.sub(rf"--{option}\b", f"`{field}`", text)
    return text


def make_router(jobs: Jobs) -> APIRouter:
    """The routes of these jobs. Whoever includes them starts and stops `jobs`, and sets
    `jobs.stopping` when the server is asked to end: it waits for open streams, which end then.
    Who may ask, and from which page, is looked at before.
    """
    router = APIRouter()
    add_uploads(router, jobs)
    add_jobs(router, jobs)
    return router


def add_uploads(router: APIRouter, jobs: Jobs) -> None:
    """The routes that take photos."""
    limits = jobs.limits
    reading = asyncio.Semaphore(READING)

    @router.post("/train", status_code=202)
    @explained
    async def train(request: Request) -> Response:
        """Photos and a prompt, in a form: `photos` (several), `prompt`, and of `name`, `method`,
        `steps`, `seed`, `learning_rate`, `class_prompt`, `identifier` what is wanted.
        """
        async with form_of(request, limits, TRAIN, reading) as (fields, photos):
            prompt = needed(fields, "prompt")
            more: dict[str, Any] = {TRAIN[name]: value for name, value in fields.items()}
            name = more.pop("name", None)
            del more["prompt"]
            job = await run_in_threadpool(jobs.submit, photos, prompt, name, **more)
        return JSONResponse(job.public(), 202, {"Location": f"/jobs/{job.id}"})

    @router.post("/photos/check")
    @explained
    async def check(request: Request) -> Response:
        """What training would see: the crop of each photo of a form, and the words of `prompt`."""
        async with form_of(request, limits, CHECK, reading) as (fields, photos):
            prompt = fields.pop("prompt", None)
            with_lock = functools.partial(preview.crops, photos, limits, jobs.checking)
            found: dict[str, Any] = {"photos": await run_in_threadpool(with_lock)}
        if prompt is not None:
            words = preview.words(prompt, fields, jobs.common, limits)
            if "error" in words:
                words["error"] = in_fields(words["error"])
            found["words"] = words
        return JSONResponse(found)


def add_jobs(router: APIRouter, jobs: Jobs) -> None:
    """The routes that tell of jobs, and end them."""

    @router.get("/jobs")
    async def list_jobs() -> Response:
        found = await run_in_threadpool(jobs.list)
        return JSONResponse({"jobs": [job.public() for job in found]})

    @router.get("/jobs/{id}")
    @explained
    async def one_job(id: str) -> Response:
        known(jobs, id)
        events = await run_in_threadpool(jobs.events, id)
        samples = [event["step"] for event in events if event["kind"] == "sample"]
        last = next((event for event in reversed(events) if event["kind"] == "progress"), None)
        told = {"samples": samples, "progress": last, "last_event": len(events)}
        return JSONResponse({**jobs.get(id).public(), **told})

    @router.get("/jobs/{id}/events")
    @explained
    async def job_events(id: str, request: Request) -> Response:
        """Server-sent events, those after the `Last-Event-ID` of the header or `?after=`."""
        known(jobs, id)
        after = last_event(request)
        over = jobs.get(id).over
        if over and not await run_in_threadpool(jobs.events, id, after):
            return Response(status_code=204)  # to a browser: do not ask again
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(
            stream(jobs, id, after), media_type="text/event-stream", headers=headers
        )

    @router.get("/jobs/{id}/samples/{step}")
    @explained
    async def sample(id: str, step: str) -> Response:
        """The sheet of pictures of a scoring, a PNG."""
        known(jobs, id)
        number = int(step) if step.isascii() and step.isdecimal() and len(step) < 10 else -1
        path = await run_in_threadpool(jobs.sample, id, number)
        if path is None:
            raise Refused(
                404, f"job {id} has no pictures of step {shown(step)}: GET /jobs/{id} lists them."
            )
        return FileResponse(path, media_type="image/png")

    @router.delete("/jobs/{id}", status_code=202)
    @explained
    async def cancel(id: str) -> Response:
        known(jobs, id)
        job = await run_in_threadpool(jobs.cancel, id)
        return JSONResponse(job.public(), 202)


def known(jobs: Jobs, id: str) -> None:
    """Raises Refused for a job that is not there."""
    try:
        jobs.get(id)
    except KeyError:
        raise Refused(
            404, f"there is no job {shown(id)}: GET /jobs lists those that are there."
        ) from None


def last_event(request: Request) -> int:
    """The number of the last event that is known there, 0 for none. Raises Refused for what is
    none."""
    last = request.headers.get("last-event-id") or request.query_params.get("after") or "0"
    if not (last.isascii() and last.isdecimal() and len(last) < 10):
        raise Refused(422, f"the number of the last event must be digits, got {shown(last)}.")
    return int(last)


def needed(fields: dict[str, str], name: str) -> str:
    if name not in fields:
        raise Refused(422, f"`{name}` is missing: for instance 'a sks dog'.")
    return fields[name]


Form = tuple[dict[str, str], list[tuple[str, bytes]]]  # fields, photos


@contextlib.asynccontextmanager
async def form_of(
    request: Request, limits: Limits, known: Collection[str], reading: asyncio.Semaphore
) -> AsyncIterator[Form]:
    """Fields and photos of a multipart form, of which no more is read than may be sent; held in
    memory in the block alone.

    Raises Refused for one that is larger, malformed, or has other fields.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(415, "photos are sent as multipart/form-data: `curl -F photos=@1.jpg ...`.")
    parser = MultiPartParser(
        request.headers,
        counted(request, limits.body_bytes),
        max_files=limits.photos,
        max_fields=len(known),
        max_part_size=FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(
            422,
            f"the form cannot be read: {error.message} At most {limits.photos} photos and "
            f"{len(known)} fields of {FIELD_BYTES >> 10} KB are taken.",
        ) from None
    try:
        async with reading:
            yield await read_form(form.multi_items(), limits, known)
    finally:
        await form.close()


async def read_form(
    items: list[tuple[str, UploadFile | str]], limits: Limits, known: Collection[str]
) -> Form:
    fields: dict[str, str] = {}
    photos: list[tuple[str, bytes]] = []
    for name, value in items:
        if isinstance(value, UploadFile):
            if name != PHOTOS:
                raise Refused(422, f"files are sent as `{PHOTOS}`, got {shown(name)}.")
            # one byte more than may be: `submit` says so
            photos.append((value.filename or "", await value.read(limits.photo_bytes + 1)))
        elif name in fields:
            raise Refused(422, f"`{name}` stands twice: send it once.")
        elif name in known:
            fields[name] = value
        else:
            hint = nearest(name, known)
            raise Refused(422, f"unknown field {shown(name)}.{hint} There are {', '.join(known)}.")
    return fields, photos


async def counted(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body, given up where it goes on beyond what may be sent, whatever its header said."""
    read = 0
    stated = request.headers.get("content-length", "0")
    async for chunk in request.stream():
        read += len(chunk)
        if read > most or (stated.isdecimal() and int(stated[:20]) > most):
            raise Refused(
                413,
                f"the request has more than {most:,} bytes, the most that is taken: send fewer or "
                "smaller photos.",
            )
        yield chunk


async def stream(jobs: Jobs, id: str, after: int, poll: float = POLL) -> AsyncIterator[str]:
    """The events of a job as they happen, until it or the server ends."""
    yield f"retry: {RETRY}\n\n"
    said = time.monotonic()
    while True:
        over = jobs.get(id).over  # before the events: the last is told when it is
        for event in await run_in_threadpool(jobs.events, id, after):
            after, said = event["n"], time.monotonic()
            yield sse(event)
        if over or jobs.stopping.is_set():
            return
        if time.monotonic() - said > ALIVE:
            said = time.monotonic()
            yield ": waiting\n\n"
        await asyncio.sleep(poll)


def sse(event: dict[str, Any]) -> str:
    """An event as a browser's EventSource reads it. JSON has no line break of its own."""
    return f"id: {event['n']}\nevent: {event['kind']}\ndata: {json.dumps(event)}\n\n"

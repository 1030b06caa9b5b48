"""The server's routes: `make_app` puts the engine, its queue and its metrics behind them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dreamtune.fields import sentence, shown
from dreamtune.serving import schema
from dreamtune.serving.backend import Backend
from dreamtune.serving.errors import Refused
from dreamtune.serving.generate import router as generate
from dreamtune.serving.guard import Guard, answer
from dreamtune.serving.jobs.jobs import Jobs
from dreamtune.serving.jobs.store import STATES
from dreamtune.serving.metrics import Metrics
from dreamtune.serving.overview import router as overview
from dreamtune.serving.page_routes import PATHS
from dreamtune.serving.page_routes import router as page
from dreamtune.serving.queue import Queue
from dreamtune.serving.settings import LOOPBACK, Settings
from dreamtune.serving.train_routes import UPLOADS, make_router
from dreamtune.version import __version__

FREE = ("/health", *PATHS)  # without a key: the page asks for it
PATIENCE = 600.0  # seconds for accepted requests when the server is shut down
SCHEMA = "GET /openapi.json says what a request may hold."
FORM = schema.Request.model_fields
log = logging.getLogger("dreamtune")


def make_app(settings: Settings, engine: Backend, jobs: Jobs | None = None) -> FastAPI:
    """The application. Its `state` holds `settings`, `engine`, `queue` and `metrics`, from where
    routes take them. The queue starts and ends with it; `jobs`, without which there is no training,
    do not. Raises ValueError for a key that is none.
    """
    metrics = Metrics()
    queue = Queue(
        engine.draw,
        metrics,
        wait=settings.wait_ms / 1e3,
        max_batch=engine.max_batch,
        max_queue=settings.max_queue,
        timeout=settings.timeout_s,
        workers=engine.workers,
    )
    engine.on_resend = metrics.resends.inc
    metrics.watch_processes(engine.running, engine.memory)
    metrics.watch_adapters(lambda: len(engine.adapters), lambda: len(engine.left_out))
    if jobs:
        store = jobs.store
        metrics.watch_jobs(STATES, lambda state: len(store.all(state)))
    app = FastAPI(
        title="dreamtune",
        version=__version__,
        docs_url=None,  # pages that load scripts of another server
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.state.settings, app.state.engine, app.state.jobs = settings, engine, jobs
    app.state.queue, app.state.metrics = queue, metrics
    key = settings.api_key()
    app.add_middleware(
        Guard,
        key=key,
        hosts={*LOOPBACK, settings.host.lower()} if settings.at_home and key is None else (),
        free=FREE,
        most=settings.max_body_kb << 10,
        larger={path: jobs.limits.body_bytes for path in UPLOADS} if jobs else {},
        seconds=settings.timeout_s,
        denied=lambda: metrics.count("denied"),
    )
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    for router in (generate, overview, page, *([make_router(jobs)] if jobs else [])):
        app.include_router(router)
    return app


@asynccontextmanager
async def _run(app: FastAPI) -> AsyncIterator[None]:
    import asyncio

    app.state.queue.start()
    yield
    await asyncio.to_thread(app.state.queue.close, PATIENCE)


def _lifespan(app: FastAPI) -> AbstractAsyncContextManager[None]:
    return _run(app)


# Whatever goes wrong is answered in one form


async def _refused(request: Request, error: Any) -> Response:
    return answer(error)


async def _invalid(request: Request, error: Any) -> Response:
    """What the schema does not take, in the sentences of flags and files."""
    found = error.errors()
    if request.url.path == "/generate":
        request.app.state.metrics.count("invalid")
    if not found or len(found[0]["loc"]) < 2 or found[0]["type"] == "json_invalid":
        refused = Refused(
            422,
            "The body is not a JSON object.",
            allowed='{"prompt": "a dog"}, sent as application/json',
            way_out=SCHEMA,
        )
        return answer(refused)
    worst: dict[str, Any] = {}
    for each in found:  # of a union's the deepest: that type was meant
        name = str(each["loc"][1])[:100]
        if name not in worst or len(each["loc"]) > len(worst[name]["loc"]):
            worst[name] = each
    allowed = {n: FORM[n].description for n in worst if n in FORM and FORM[n].description}
    refused = Refused(
        422,
        " ".join(sentence({**each, "loc": (name,)}) for name, each in worst.items())[:2000],
        got={name: shown(each["input"]) for name, each in worst.items()},
        allowed=allowed or sorted(FORM),
        way_out=SCHEMA,
    )
    return answer(refused)


async def _http(request: Request, error: Any) -> Response:
    if isinstance(error.detail, dict):  # of the guard, as it stands
        return JSONResponse(error.detail, error.status_code, error.headers)
    refused = Refused(
        error.status_code,
        f"{error.detail}.",
        got=f"{request.method} {shown(request.url.path)}",
        allowed=sorted(_routes(request.app)) if error.status_code in (404, 405) else None,
    )
    return answer(refused, error.headers)


def _routes(app: FastAPI) -> set[str]:
    return {
        f"{method.upper()} {path}"
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    }


async def _failed(request: Request, error: Any) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return answer(Refused(500, "The server failed; its log says how.", way_out="Ask again later."))


HANDLERS: dict[Any, Any] = {
    Refused: _refused,
    RequestValidationError: _invalid,
    HTTPException: _http,
    Exception: _failed,
}

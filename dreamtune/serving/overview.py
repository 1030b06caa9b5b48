"""GET /about, /adapters, /health and /metrics; POST /adapters/reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from dreamtune.adapters import METHODS
from dreamtune.serving.backend import Backend
from dreamtune.serving.errors import Refused
from dreamtune.serving.folder import look
from dreamtune.serving.jobs.jobs import Jobs
from dreamtune.serving.metrics import CONTENT_TYPE
from dreamtune.serving.schema import MIXED, usual_guidance
from dreamtune.version import __version__

router = APIRouter()


@router.get("/about")
def about(request: Request) -> dict[str, Any]:
    """What may be asked for here, and what is drawn and trained where it is not said."""
    state = request.app.state
    jobs: Jobs | None = state.jobs
    return {
        "base": state.engine.base.id,
        "sizes": list(state.engine.sizes),
        "steps": state.settings.num_inference_steps,
        "max_steps": state.settings.max_steps,
        "guidance_scale": usual_guidance(state.settings, state.engine),
        "max_prompt": state.settings.max_prompt,
        "adapters_in_a_picture": MIXED,
        "training": jobs and training(jobs),
    }


def training(jobs: Jobs) -> dict[str, Any]:
    return {
        "methods": sorted(METHODS),
        "method": jobs.common["method"],
        "photos": jobs.limits.photos,
        "max_steps": jobs.limits.steps,
        "prompt": jobs.limits.prompt,
    }


@router.get("/adapters")
def adapters(request: Request) -> dict[str, Any]:
    """Those that are served, as their files state them, and the names of what is left out."""
    engine: Backend = request.app.state.engine
    return {
        "base": engine.base.id,
        "adapters": [known.to_dict() for known in engine.adapters.values()],
        "left_out": sorted(engine.left_out),
    }


@router.post("/adapters/reload")
def reload(request: Request) -> dict[str, Any]:
    """Serves what has come into the folder since. What is served stays as it is."""
    state = request.app.state
    try:
        folder = look(Path(state.settings.adapters).expanduser())
    except (ValueError, OSError) as error:
        way = "Bring it back where it was when the server was started."
        raise Refused(409, "The folder of adapters cannot be read.", way_out=way) from error
    added = state.engine.add_all(folder)
    return {"added": added, "left_out": sorted(state.engine.left_out)}


@router.get("/health")
def health(request: Request) -> JSONResponse:
    """200 where requests are drawn; 503 where none will be."""
    state = request.app.state
    live = state.queue.alive and state.engine.broken is None
    running = state.engine.running()
    ready = live and running > 0 and not state.queue.closed
    found = {
        "live": live,
        "ready": ready,
        "queue": len(state.queue.waiting),
        "replicas": running,
        "device": state.engine.device,
        "adapters": len(state.engine.adapters),
        "left_out": len(state.engine.left_out),
        "version": __version__,
    }
    return JSONResponse(found, 200 if ready else 503)


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """In the text format of Prometheus."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE)

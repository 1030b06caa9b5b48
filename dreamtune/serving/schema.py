"""What a request for a picture may say, and what it is answered."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from dreamtune.fields import Seed, nearest, shown
from dreamtune.serving.backend import Backend, Row, Shape
from dreamtune.serving.errors import Refused
from dreamtune.serving.settings import Guidance, Settings

LISTED = 20  # names in an answer
MIXED = 8  # adapters in a picture
Strength = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]
DRAWN_SEEDS = 1 << 32  # below 2^53, up to which a browser's numbers are exact


class Request(BaseModel):
    """Of POST /generate. What is not given is the server's own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, description="a text")
    negative_prompt: str = Field("", description="a text, of what guidance leads away from")
    adapter: str | dict[str, Strength] | None = Field(
        None,
        description="a name, null for the base, or an object: name -> strength, -10 to 10",
    )
    seed: Seed | None = Field(None, description="a whole number, from which the noise is drawn")
    steps: Annotated[int, Field(ge=1)] | None = Field(None, description="sampling steps")
    guidance_scale: Guidance | None = Field(None, description="0 to 100; up to 1: no guidance")
    size: int | None = Field(None, description="pixels a side")


class Picture(BaseModel):
    """The answer. image: a PNG in base64; waited, drawn: seconds; batch: pictures drawn at once;
    warning: what of the request is not in the picture.
    """

    image: str
    seed: int
    adapter: str | dict[str, float] | None
    waited: float
    drawn: float
    batch: int
    warning: str | None


def settled(request: Request, settings: Settings, engine: Backend) -> tuple[Row, Shape]:
    """With the server's own for what is not given. Raises Refused for what it does not have."""
    check_lengths(request, settings)
    steps = settings.num_inference_steps if request.steps is None else request.steps
    if steps > settings.max_steps:
        raise Refused(
            422,
            "`steps` is too large.",
            got=steps,
            allowed=f"1 to {settings.max_steps}",
            way_out="Ask for fewer, or start the server with --max_steps.",
        )
    size = engine.sizes[0] if request.size is None else request.size
    if size not in engine.sizes:
        raise Refused(
            422,
            "`size` is not one that is drawn here.",
            got=size,
            allowed=list(engine.sizes),
            way_out="Leave it out, or start the server with --resolution.",
        )
    scale = request.guidance_scale
    if scale is None:
        scale = usual_guidance(settings, engine)
    if request.negative_prompt:
        check_negative(request, scale, engine)
    check_adapters(request, engine)
    seed = secrets.randbelow(DRAWN_SEEDS) if request.seed is None else request.seed
    row = Row(request.prompt, request.negative_prompt, request.adapter, seed)
    negated = bool(row.negative_prompt) or engine.empty_is_none
    return row, Shape(size, steps, float(scale), negated)


def check_lengths(request: Request, settings: Settings) -> None:
    for name in ("prompt", "negative_prompt"):
        length = len(getattr(request, name))
        if length > settings.max_prompt:
            raise Refused(
                422,
                f"`{name}` is too long.",
                got=f"{length} characters",
                allowed=f"{settings.max_prompt} characters",
                way_out="Say it in fewer words.",
            )


def check_negative(request: Request, scale: float, engine: Backend) -> None:
    """Raises Refused for a negative prompt that would do nothing."""
    if not engine.takes_negatives:
        raise Refused(
            422,
            "There is no `negative_prompt` for this base, which is told its guidance as a number.",
            got=request.negative_prompt[:100],
            way_out="Leave `negative_prompt` out.",
        )
    if scale <= 1:
        raise Refused(
            422,
            "`negative_prompt` acts by guidance alone, and there is none.",
            got=f"a `guidance_scale` of {scale:g}",
            allowed="a `guidance_scale` above 1",
            way_out="Raise `guidance_scale`, or leave `negative_prompt` out.",
        )


def check_adapters(request: Request, engine: Backend) -> None:
    """Raises Refused for adapters that are not there, or too many."""
    if isinstance(request.adapter, Mapping):
        if len(request.adapter) > MIXED:
            raise Refused(
                422,
                "There are too many adapters in one picture.",
                got=len(request.adapter),
                allowed=MIXED,
                way_out="Leave the weakest out.",
            )
        names = list(request.adapter)
    else:
        names = [] if request.adapter is None else [request.adapter]
    for name in names:
        if name not in engine.adapters:
            raise unknown(name, engine)


def usual_guidance(settings: Settings, engine: Backend) -> float:
    """Of a request that does not say."""
    stated = settings.guidance_scale
    return engine.guidance_scale if stated is None else stated


def unknown(name: str, engine: Backend) -> Refused:
    """A name is looked up among those that are served, and nowhere else."""
    known = list(engine.adapters)
    more = f" (and {len(known) - LISTED} more)" if len(known) > LISTED else ""
    return Refused(
        404,
        f"There is no adapter of that name.{nearest(name, known)}",
        got=shown(name),
        allowed=known[:LISTED],
        way_out=f"Take one of these{more}, as GET /adapters lists them, or null for the base.",
    )

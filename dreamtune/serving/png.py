"""A picture as a PNG that says how it was made."""

from __future__ import annotations

import io
import json

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreamtune.serving.backend import Adapter, Row, Shape
from dreamtune.version import __version__


def adapter_text(adapter: Adapter) -> str:
    """JSON of ASCII letters, for headers too."""
    return json.dumps(adapter)


def encoded(image: Image.Image, row: Row, shape: Shape, base: str) -> bytes:
    """With prompt, seed, adapter and settings as text chunks of their names (iTXt, UTF-8)."""
    stated = {
        "prompt": row.prompt,
        "negative_prompt": row.negative_prompt,
        "seed": str(row.seed),
        "adapter": adapter_text(row.adapter),
        "steps": str(shape.steps),
        "guidance_scale": f"{shape.guidance_scale:g}",
        "base": base,
        "Software": f"dreamtune {__version__}",
    }
    info = PngInfo()
    for name, text in stated.items():
        info.add_itxt(name, text)
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=info)
    return out.getvalue()

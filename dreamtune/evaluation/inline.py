"""What a page holds in itself, so that one file is the whole of it: styles and pictures."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

TEMPLATES = Path(__file__).parent / "templates"
UNSCALED = 200  # images below this side are never shown larger than they are


def style() -> str:
    """The CSS that all pages share."""
    return (TEMPLATES / "page.css").read_text(encoding="utf-8")


def img(image: Image.Image, alt: str, side: int, crop: bool = False) -> str:
    """An <img> with the picture inside, shrunk to `side` if larger, never enlarged."""
    image = image.convert("RGB")
    small = min(image.size) < UNSCALED
    if crop:
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        image = image.crop((left, top, left + edge, top + edge))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=92 if small else 84, method=4)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/webp;base64,{data}" alt="{escape(alt)}" '
        f'width="{image.width}" height="{image.height}">'
    )

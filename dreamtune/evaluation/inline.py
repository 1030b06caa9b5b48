"""A page that holds all in itself, styles and pictures, so that one file is the whole of it."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from dreamtune.files.whole import whole
from dreamtune.version import __version__

TEMPLATES = Path(__file__).parent / "templates"
UNSCALED = 200  # images below this side are never shown larger than they are


def write_html(path: Path, name: str, title: str, **parts: str) -> Path:
    """A page, whole or not at all: `<name>.html` of the templates inside what all pages share, with
    `<name>.css` after the common style; parts: of both, as HTML.
    """

    title = escape(title)
    style, main = filled(f"{name}.css", **parts), filled(f"{name}.html", title=title, **parts)
    return write_main(path, title, main, style)


def write_main(path: Path, title: str, main: str, style: str = "") -> Path:
    """A page, whole or not at all: what all pages share around `main`, its style after the common
    one. All of it is HTML."""
    common = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    page = filled("page.html", title=title, style=common + style, main=main, version=__version__)
    with whole(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def filled(file: str, **values: str) -> str:
    """A template with its places filled."""
    text = (TEMPLATES / file).read_text(encoding="utf-8")
    return Template(text).substitute(values)


def section(anchor: str, title: str, *parts: str) -> str:
    """A section of a page with its head; "" where all parts are. parts: HTML."""
    inner = "".join(parts)
    if not inner:
        return ""
    return (
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(title)}</h2>{inner}'
        "</section>"
    )


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

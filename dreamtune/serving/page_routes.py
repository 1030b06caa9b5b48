"""The page for browsers, at /: files of this package, and nothing beside them."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

FOLDER = Path(__file__).with_name("page")
SCRIPT = "text/javascript; charset=utf-8"
FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **{
        f"{name}.js": SCRIPT
        for name in (
            "api", "chart", "dom", "generate", "history", "job", "main", "photos", "rows", "tile",
            "train",
        )
    },
}  # fmt: skip
PATHS = {"/": "index.html", **{f"/page/{name}": name for name in FILES if name != "index.html"}}
# Nothing of another server is loaded or asked, no script stands in the page, and none makes HTML of
# a text; no page of another site shows this one.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # the next version of the server has others
}

router = APIRouter()


def add(path: str, name: str) -> None:
    def file() -> Response:
        return Response((FOLDER / name).read_bytes(), media_type=FILES[name], headers=HEADERS)

    router.add_api_route(path, file, include_in_schema=False)


for path, name in PATHS.items():
    add(path, name)

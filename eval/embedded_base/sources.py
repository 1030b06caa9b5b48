"""The pictures behind the embedded base: pinned registry packages, rendered to 128 px sprites.

Everything is fetched from the npm registry by name, version and sha512, and rendered offline.
Licences: Noto Emoji Apache-2.0, Twemoji CC-BY-4.0, Fluent Emoji MIT (see MODEL_CARD.md).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SIZE = 128

# name@version -> sha512 of the tarball, as the registry publishes it
PACKAGES: dict[str, str] = json.loads((HERE / "packages.json").read_text())
FAMILIES = {  # style word of the captions -> package that draws it
    "cartoon": "@iconify-json/noto",
    "flat": "@iconify-json/twemoji",
    "3d": "@lobehub/fluent-emoji-3d",
}
STYLES = tuple(FAMILIES)


@dataclass(frozen=True)
class Concept:
    """A thing the base can draw: its word, its group in the list and its emoji code point."""

    word: str
    category: str
    subcategory: str
    code: str


def vocabulary() -> dict:
    """`concepts.json`: categories, held-out subjects; fixed before anything is trained."""
    return json.loads((HERE / "concepts.json").read_text())


def read_concepts() -> dict[str, tuple[str, str]]:
    """word -> (category, subcategory)."""
    groups = vocabulary()["categories"]
    return {
        word: (c, s) for c, subs in groups.items() for s, words in subs.items() for word in words
    }


def fetch(downloads: Path) -> dict[str, Path]:
    """Download and unpack the pinned packages below `downloads`; returns name -> folder.

    Raises:
        ValueError: a tarball's sha512 is not the pinned one.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    folders = {}
    for spec, integrity in PACKAGES.items():
        name = spec.rsplit("@", 1)[0]
        folder = downloads / spec.lstrip("@").replace("/", "-")
        if not folder.is_dir():
            packed = subprocess.run(
                ["npm", "pack", "--silent", spec],
                cwd=downloads,
                check=True,
                capture_output=True,
                text=True,
            )
            tarball = downloads / packed.stdout.strip().splitlines()[-1]
            digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
            if f"sha512-{digest}" != integrity:
                raise ValueError(f"{spec}: got sha512-{digest}, pinned is {integrity}")
            with tarfile.open(tarball) as tar:
                tar.extractall(folder, filter="data")
            tarball.unlink()
        folders[name] = folder / "package"
    return folders


def _plain(code: str) -> str:
    """Code points without the variation selector, which the packages spell differently."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _chars(folder: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for code, name in json.loads((folder / "chars.json").read_text()).items():
        names.setdefault(_plain(code), name)
    return names


class Family:
    """One style: code point -> RGBA picture, straight alpha."""

    def __init__(self, style: str, folder: Path):
        self.folder = folder
        self.icons = None
        if style == "3d":
            self.files = {_plain(p.stem): p for p in (folder / "assets").glob("*.webp")}
            self.codes = set(self.files)
        else:
            self.icons = json.loads((folder / "icons.json").read_text())
            self.names = _chars(folder)
            self.codes = set(self.names)

    def draw(self, code: str, pixels: int = 256) -> Image.Image:
        if self.icons is None:
            return Image.open(self.files[code]).convert("RGBA")
        import resvg_py

        name = self.names[code]
        icon = self.icons["icons"].get(name)
        if icon is None:
            icon = self.icons["icons"][self.icons["aliases"][name]["parent"]]
        width = icon.get("width", self.icons.get("width", 16))
        height = icon.get("height", self.icons.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{pixels}" height="{pixels}">'
            f"{icon['body']}</svg>"
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def fit(picture: Image.Image, size: int = SIZE) -> Image.Image:
    """Crop to what is drawn, centre in a square, resize with premultiplied alpha."""
    box = picture.getchannel("A").point(lambda v: 255 if v > 8 else 0).getbbox()
    picture = picture.crop(box or (0, 0, *picture.size))
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")


def concepts(folders: dict[str, Path]) -> list[Concept]:
    """The concepts of `concepts.json`, in its order."""
    by_name = {name: code for code, name in _chars(folders[FAMILIES["flat"]]).items()}
    return [
        Concept(word, category, subcategory, by_name[icon])
        for category, groups in vocabulary()["categories"].items()
        for subcategory, words in groups.items()
        for word, icon in words.items()
    ]


def _others(folders: dict[str, Path], families: list[Family], known: set[str]) -> Iterator[str]:
    """Code points that all families draw and no concept uses: for autoencoder and scorers."""
    table = json.loads((folders["emoji-datasource-google"] / "emoji.json").read_text())
    for entry in sorted(table, key=lambda e: e["sort_order"]):
        code = _plain(entry["unified"])
        skip = (
            entry["category"] in ("Flags", "Component", "Symbols")
            or "family" in entry["subcategory"]
        )
        if not skip and code not in known and all(code in family.codes for family in families):
            yield code


def _render(job: tuple[str, Path, str]) -> bytes:
    style, folder, code = job
    buffer = io.BytesIO()
    picture = fit(_family(style, folder).draw(code))
    picture.save(buffer, "WEBP", quality=90, alpha_quality=95, method=3)
    return buffer.getvalue()


@cache
def _family(style: str, folder: Path) -> Family:
    return Family(style, folder)


def pack(downloads: Path, out: Path, limit: int | None = None, workers: int = 2) -> None:
    """Render every sprite and write `out` (npz): WebP blobs, offsets, the concept table as JSON.

    Sprite i is code i // 3 in style i % 3; the concepts come first. `limit` keeps the first few
    concepts only (the smoke form).
    """
    folders = fetch(downloads)
    things = concepts(folders)[:limit]
    families = [_family(style, folders[name]) for style, name in FAMILIES.items()]
    codes = [c.code for c in things]
    if limit is None:
        codes += list(_others(folders, families, {c.code for c in concepts(folders)}))
    jobs = [(style, folders[name], code) for code in codes for style, name in FAMILIES.items()]
    with ProcessPoolExecutor(workers) as pool:
        blobs = list(pool.map(_render, jobs, chunksize=64))
    table = [[c.word, c.category, c.subcategory] for c in things]
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        out,
        blob=np.frombuffer(b"".join(blobs), np.uint8),
        offset=np.cumsum([0] + [len(b) for b in blobs]),
        concepts=np.frombuffer(json.dumps(table).encode(), np.uint8),
    )

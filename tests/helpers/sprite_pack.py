"""Sprites drawn on the spot, packed as `embedded_base.sources.pack` packs the real ones."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

EVAL = Path(__file__).parents[2] / "eval"
if str(EVAL) not in sys.path:
    sys.path.insert(0, str(EVAL))


def write_sprites(out: Path, concepts: int | None, size: int = 128) -> Path:
    """A disc a sprite, its colour by the concept and its outline by the style, on nothing.

    Args:
        concepts: how many of concepts.json, in its order; None: all.
    """
    from embedded_base.sources import STYLES, read_concepts

    table = [[word, *groups] for word, groups in read_concepts().items()][:concepts]
    blobs = []
    for i in range(len(table)):
        for k in range(len(STYLES)):
            picture = Image.new("RGBA", (size, size))
            box = (size // 8, size // 8, size - size // 8 - 1, size - size // 8 - 1)
            color = (37 * i % 256, 91 * i % 256, 255 - 53 * i % 256, 255)
            ImageDraw.Draw(picture).ellipse(box, color, "black", k * size // 32)
            buffer = io.BytesIO()
            picture.save(buffer, "WEBP", lossless=True)
            blobs.append(buffer.getvalue())
    np.savez(
        out,
        blob=np.frombuffer(b"".join(blobs), np.uint8),
        offset=np.cumsum([0] + [len(b) for b in blobs]),
        concepts=np.frombuffer(json.dumps(table).encode(), np.uint8),
    )
    return out

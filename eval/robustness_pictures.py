"""The pictures of `robustness_report.py`'s page."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Sequence
from html import escape

from PIL import Image
from robustness_sections import multiplier, text
from robustness_stats import Results, Row

from dreamtune.evaluation.inline import img, section


def pictures(results: Results) -> str:
    """One subject and prompt, at the last step of each rate and along the long runs."""
    kept = [p for p in results.about.get("pictures", []) if p["variant"] in results.titles]
    ends = [p for p in kept if p["part"] in ("a", "c")]
    ends = ends or [p for p in kept if p["part"] == "defaults"]
    long = [p for p in kept if p["part"] == "b" and p["multiplier"] == 1.0]
    kept = [*ends, *long]
    names = ", ".join(sorted({p["subject"] for p in kept}))
    note = f"Of {names}, the first scored prompt and seed; – diverged, or was not run."
    return section(
        "pictures", "Pictures", text(note) if kept else "",
        sheet(results, ends, "multiplier", lambda m: f"{multiplier(m)} x its rate"),
        sheet(results, long, "step", lambda step: f"{step} steps"),
    )  # fmt: skip


def sheet(
    results: Results, found: Sequence[Row], across: str, named: Callable[[float], str]
) -> str:
    """A row a variant, a column a rate or step."""
    if not found:
        return ""
    place = {(p["variant"], p[across]): p for p in reversed(found)}
    columns = sorted({p[across] for p in found})
    rows = ""
    for variant in results.variants(found):
        title, cells = results.titles[variant], ""
        for x in columns:
            one = place.get((variant, x))
            shown = picture(one["picture"], f"{title}, {named(x)}") if one else "–"
            cells += f"<td>{shown}</td>"
        rows += f'<tr><th scope="row">{escape(title)}</th>{cells}</tr>'
    heads = "".join(f'<th scope="col">{escape(named(x))}</th>' for x in columns)
    inner = f"<thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="scroll"><table class="pictures">{inner}</table></div>'


def picture(coded: str, said: str) -> str:
    """Raises ValueError for what is no picture."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(coded, validate=True)), formats=["WEBP"])
        return img(image, said, 128)
    except (OSError, binascii.Error, SyntaxError) as error:
        raise ValueError(f"the picture of {said} cannot be read: {error}") from None

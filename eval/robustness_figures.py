"""Figures of `robustness_report.py`: lines of variants with intervals, in the page and as files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamtune.evaluation.chart import (
    INK,
    MARK,
    RC,
    RULE,
    SMALL,
    SOFT,
    VARIABLES,
    axes_of,
    chart,
    limited,
    limits,
    plain,
    set_scale,
)
from dreamtune.evaluation.statistics import Estimate
from dreamtune.files.whole import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE, WIDE = (400, 260), (760, 360)
PIXELS = 160  # of a PNG an inch
# Told apart by people who do not see all colours (Okabe and Ito 2008), on light and dark pages.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d46", "#7f7f7f")
MARKERS = "os^DvPX*"
LIGHT = {INK: "#1d1c1a", SOFT: "#6b6760", RULE: "#e6e2db"}
PAPER = "#ffffff"


@dataclass(frozen=True)
class Line:
    """Of one variant: (x, mean) by x. look: the number of its colour and mark, the same in all
    figures of a kind, also where others have no line."""

    title: str
    points: Sequence[tuple[float, Estimate]]
    look: int


@dataclass(frozen=True)
class Plot:
    """paint: into the axes, by a mapping of the page's colours to those to draw in."""

    name: str
    title: str
    said: str
    size: tuple[int, int]
    paint: Callable[[Axes, Mapping[str, str]], None]

    def html(self) -> str:
        return chart(
            self.title, self.said, self.size, lambda axes: self.paint(axes, {c: c for c in LIGHT})
        )


def plot(
    name: str,
    title: str,
    lines: Sequence[Line],
    ticks: Mapping[float, str],
    across: str,
    *,
    reference: float | None = None,
    reference_name: str = "",
    wide: bool = False,
    number_format: str = ".3f",
) -> Plot | None:
    """Lines over a logarithmic axis. None without a point.

    Args:
        ticks: x -> its text. across: what the axis is of.
        reference: a dashed level.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None

    def paint(axes: Axes, colour: Mapping[str, str]) -> None:
        drawn = [e for line in lines for _, e in line.points]
        level = [] if reference is None else [reference]
        outer = [end for e in drawn for end in (e.low, e.high) if end is not None]
        means = [e.mean for e in drawn] + level
        set_scale(axes, "y", *limits(limited(means, [*outer, *level])))
        set_ticks(axes, ticks, colour)
        if reference is not None:
            axes.axhline(reference, color=colour[SOFT], linewidth=1, dashes=(5, 4))
            axes.annotate(
                plain(reference_name), (1, reference), xycoords=("axes fraction", "data"),
                xytext=(0, 4), textcoords="offset points", ha="right", color=colour[SOFT],
                fontsize=SMALL, gid=f"{MARK}halo",
            )  # fmt: skip
        for i, line in enumerate(lines):
            draw(axes, line, i - (len(lines) - 1) / 2)
        axes.set_xlabel(plain(across), color=colour[SOFT], fontsize=SMALL)
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4 if wide else 2, frameon=False,
            fontsize=SMALL, labelcolor=colour[INK], handlelength=1.6, columnspacing=1.2,
        )  # fmt: skip

    said = "; ".join(
        f"{line.title}: "
        + ", ".join(f"{e.mean:{number_format}} at {ticks.get(x, f'{x:g}')}" for x, e in line.points)
        for line in lines
    )
    return Plot(name, title, f"{title} against {across}. {said}", WIDE if wide else SIZE, paint)


def draw(axes: Axes, line: Line, place: float) -> None:
    """Means, joined, with their intervals; lines stand a little apart, so that none hides one."""
    x = [x * 2 ** (0.06 * place) for x, _ in line.points]
    y = [e.mean for _, e in line.points]
    look: dict[str, Any] = {"color": COLOURS[line.look % len(COLOURS)]}
    for at, (_, e) in zip(x, line.points):
        if e.low is not None and e.high is not None:
            axes.plot([at, at], [e.low, e.high], linewidth=1.2, alpha=0.55, **look)
    look |= {"marker": MARKERS[line.look % len(MARKERS)], "markersize": 5, "linewidth": 2}
    axes.plot(x, y, label=plain(line.title), **look)


def set_ticks(axes: Axes, ticks: Mapping[float, str], colour: Mapping[str, str]) -> None:
    from matplotlib.ticker import NullLocator

    places = list(ticks)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(places) / 2**0.6, max(places) * 2**0.6)
    axes.set_xticks(places, [plain(t) for t in ticks.values()], color=colour[SOFT])


def write_files(drawn: Plot, folder: Path) -> list[Path]:
    """`<name>.svg`, of a wide one also `<name>.png`, in the light page's colours, for use outside
    the page."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    svg = re.search(r"<svg.*</svg>", drawn.html(), re.DOTALL)
    assert svg is not None
    text = svg[0]
    for marker, variable in VARIABLES.items():
        text = text.replace(f"var({variable})", LIGHT.get(marker, PAPER))
    width, height = drawn.size
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" '
    )
    text = text.replace("<svg ", head, 1)
    sheet = f'<rect width="{width}" height="{height}" fill="{PAPER}"/>'
    text = text.replace("</title>", f"</title>{sheet}", 1)
    paths = [folder / f"{drawn.name}.svg", folder / f"{drawn.name}.png"]
    with whole(paths[0]) as partial:
        partial.write_text(text, encoding="utf-8")
    if drawn.size != WIDE:
        return paths[:1]
    with style.context(["default", RC]):
        figure = Figure(figsize=(width / 72, height / 72), dpi=PIXELS, facecolor=PAPER)
        canvas = FigureCanvasAgg(figure)
        figure.set_layout_engine("constrained")
        axes = axes_of(figure, LIGHT[SOFT], LIGHT[RULE])
        drawn.paint(axes, LIGHT)
        axes.set_ylabel(plain(drawn.title), color=LIGHT[SOFT], fontsize=SMALL)
        with whole(paths[1]) as partial:
            canvas.print_png(partial, metadata={"Software": None})
    return paths

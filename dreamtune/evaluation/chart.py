"""One chart as SVG inside a page: matplotlib draws it, the page's CSS colours it.

matplotlib is imported only once a chart is drawn: it takes most of a second. It draws in colours
that stand for CSS variables, so that a chart follows the page's light and dark.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, RULE, ACCENT, CARD = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "--ink", SOFT: "--soft", RULE: "--rule", ACCENT: "--accent", CARD: "--card"}
SMALL, LARGE = 10.5, 12.5  # of text, in the chart's units, which are pixels at its own size
MARK = "mark:"  # a gid that begins so becomes the class of its group
# What a person wrote is no formula, and text stays text; the salt keeps names of parts the same.
RC = {"svg.fonttype": "none", "svg.hashsalt": "dreamtune", "text.parse_math": False}
METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
LINK = "{http://www.w3.org/1999/xlink}href"

# Where a text lies is measured in the font that matplotlib has; the page shows it in its own.
NO_GLYPH = r"Glyph \d+ .*missing from"
# matplotlib keeps its settings in one global place, so charts are drawn one at a time.
_DRAWING = threading.Lock()


def chart(
    title: str,
    said: str,
    size: tuple[int, int],
    paint: Callable[[Axes], None],
    margins: tuple[int, int, int, int] | None = None,
) -> str:
    """A <figure> of the page with its caption.

    Args:
        said: what the chart shows, for those who do not see it.
        size: (width, height) in pixels at which text has its size; the page scales it.
        paint: draws into the axes, in the colours of this module. It need not escape anything.
        margins: left, right, top and bottom of the axes in pixels, where texts are known to fit; by
            default as wide as the texts, which takes as long again as all else.
    """
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    title, said, buffer = plain(title), plain(said), io.StringIO()
    with (
        _DRAWING,
        style.context(["default", RC]),  # a person's own style is not the page's
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", NO_GLYPH, UserWarning)
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
        canvas = FigureCanvasSVG(figure)
        if margins is not None:
            left, right, top, bottom = (m / size[i // 2] for i, m in enumerate(margins))
            figure.subplots_adjust(left, bottom, 1 - right, 1 - top)
        else:
            figure.set_layout_engine("constrained")
        figure.patch.set_visible(False)
        paint(axes_of(figure))
        canvas.print_svg(buffer, metadata=METADATA)
    head = f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
    return f"{head}{inlined(buffer.getvalue(), title, said)}</figure>"


def axes_of(figure: Figure, soft: str = SOFT, rule: str = RULE) -> Axes:
    """The only axes of a figure, bare but for soft texts and rules across."""
    axes = figure.add_subplot()
    axes.spines[:].set_visible(False)
    axes.set_facecolor("none")
    axes.tick_params(length=0, colors=soft, labelsize=SMALL, pad=5)
    axes.grid(axis="y", color=rule, linewidth=1)
    axes.set_axisbelow(True)
    return axes


def inlined(drawn: str, title: str, said: str) -> str:
    """matplotlib's SVG as an element of a page: no size, fonts or styles of its own; ids that no
    other chart of the page has, unless it is the same chart."""
    root = ElementTree.fromstring(drawn)
    prefix = hashlib.sha256(f"{said}\0{drawn}".encode()).hexdigest()[:8]
    names = {
        one.get("id"): f"chart-{prefix}-{n}" for n, one in enumerate(root.iter()) if one.get("id")
    }
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', drawn))
    for one in root.iter():
        one.tag = one.tag.rpartition("}")[2]
        one.tail = None
        if one.tag not in ("text", "tspan"):
            one.text = None
        if name := one.attrib.pop("id", None):
            if name in used:
                one.set("id", names[name])
            elif name.startswith(MARK):
                one.set("class", name.removeprefix(MARK))
        if target := one.attrib.pop(LINK, None):
            one.set("href", f"#{names[target[1:]]}")
        if clip := one.get("clip-path"):
            one.set("clip-path", f"url(#{names[clip[5:-1]]})")
        if look := one.get("style"):
            one.set("style", coloured(look))
        if path := one.get("d"):
            one.set("d", " ".join(path.split()))
        if one.get("transform", "").startswith("rotate(-0 "):
            del one.attrib["transform"]
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("style", "metadata"):  # a style would hold for the whole page
                parent.remove(child)
    box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib |= {"viewBox": box, "role": "img", "aria-label": said}
    root.attrib |= {"stroke-linejoin": "round", "stroke-linecap": "butt"}
    heading = ElementTree.Element("title")
    heading.text = title
    root.insert(0, heading)
    return ElementTree.tostring(root, encoding="unicode")


def coloured(look: str) -> str:
    """A style with the page's colours and font."""
    look = re.sub(r"\bfont: (?:(\d+) )?([\d.]+px) [^;]*", font, look)  # before matplotlib 3.11
    look = re.sub(r"font-family: [^;]*(; )?", "", look)
    return re.sub(r"#0[1-5]0[1-5]0[1-5]\b", lambda c: f"var({VARIABLES[c[0]]})", look)


def font(found: re.Match[str]) -> str:
    """Weight and size of CSS's `font`, without the family."""
    return f"font-weight: {found[1] or 400}; font-size: {found[2]}"


def plain(text: str) -> str:
    """Without characters that no XML may hold, and without breaks of the line."""

    def shown(c: str) -> bool:  # joiners and narrow spaces are part of words
        return unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") and c not in "\ufffe\uffff"

    return "".join(c if shown(c) else "\ufffd" for c in text)


def limits(values: Sequence[float]) -> tuple[float, float]:
    """(low, high) of an axis with some room; of values that hardly differ 0.02 and the room."""
    low, high = min(values), max(values)
    if high - low < 1e-3:
        low, high = low - 0.01, high + 0.01
    room = 0.12 * (high - low)
    return low - room, high + room


def limited(dots: Sequence[float], outer: Sequence[float]) -> tuple[float, float]:
    """(low, high) of the dots, widened to the outer by at most the dots' own spread, or 0.05: an
    interval of few may be many times the plot, and is cut off, not the dots squeezed."""
    low, high = min(dots), max(dots)
    room = max(high - low, 0.05)
    return max(min([low, *outer]), low - room), min(max([high, *outer]), high + room)


def set_scale(axes: Axes, kind: Literal["x", "y"], low: float, high: float) -> None:
    """The axis from low to high, with few round ticks whose digits are not rounded away."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    axes.set(**{f"{kind}lim": (low, high)})
    axis = axes.xaxis if kind == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(ScalarFormatter(useOffset=False))


def put(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    shift: tuple[float, float],
    align: str,
    *,
    value: bool = False,
    right_edge: bool = False,
) -> None:
    """Text beside a point, readable on top of lines.

    Args:
        shift: of the text from the point, in pixels. align: "left", "right", the side of the text
            that stands there.
        value: in bold and in the accent's colour. right_edge: at the right edge of the axes, and
            only `at[1]` is a value.
    """
    axes.annotate(
        plain(text),
        (1.0, at[1]) if right_edge else at,
        xycoords=("axes fraction", "data") if right_edge else "data",
        xytext=shift,
        textcoords="offset points",
        ha=align,
        va="bottom" if shift[1] > 0 else "top" if shift[1] < 0 else "center",
        color=ACCENT if value else SOFT,
        fontsize=LARGE if value else SMALL,
        fontweight="bold" if value else "normal",
        gid=f"{MARK}halo",
        annotation_clip=False,
        zorder=5,  # above all marks
    )

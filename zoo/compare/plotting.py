"""Plots for the page: matplotlib draws them, and they come back as SVG that takes the page's colours.

matplotlib gets a stand-in colour for every role (series, ink, grid, ground) and `_inline` writes the page's CSS
variable in its place, so that one drawing follows light, dark and print. Text stays text. Nothing global is changed:
figures are made without pyplot, inside ``rc_context``, and matplotlib is imported on first use.

A plot is `WIDTH` units wide and is meant to be shown 340 to 560 pixels wide, where its labels are legible.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from zoo.compare.labels import Box, placed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 400, 290
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 44
MARGIN = 30
"""Further units at the right of a chart that stands alone."""
SERIES = 7
"""Number of colours; beyond it colours repeat with another marker and dash."""
CONTROL = -1
"""The series of controls: grey, whatever else the page shows."""
DASHES: tuple[Any, ...] = ("-", (0, (6, 3)), (0, (2, 3)))
MARKERS = ("o", "s", "^")

LIGHT = {
    "--card": "#ffffff", "--ink": "#14181f", "--soft": "#5a6472", "--grid": "#e8ebef", "--s0": "#2458d3",
    "--s1": "#c2410c", "--s2": "#0b7a53", "--s3": "#a3247f", "--s4": "#6741d9", "--s5": "#94690a", "--s6": "#0b7285",
    "--control": "#6b7480",
}  # fmt: skip
"""The page's colours by day, for charts that stand alone."""
STAND_IN = {
    "--card": "#a1b2c0", "--ink": "#a1b2c1", "--soft": "#a1b2c2", "--grid": "#a1b2c3",
    "--s0": "#a1b2c4", "--s1": "#a1b2c5", "--s2": "#a1b2c6", "--s3": "#a1b2c7",
    "--s4": "#a1b2c8", "--s5": "#a1b2c9", "--s6": "#a1b2ca", "--control": "#a1b2cb",
}  # fmt: skip
"""What matplotlib is told; no other colour is used."""
RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; the page's own family is put in its place
    "font.size": 11.5,
    "text.parse_math": False,  # a run's name may hold dollars
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "path.simplify": False,
}

Format = Callable[[float], str]


def variable(series: int) -> str:
    """Return the name of the CSS variable of a series."""
    return "--control" if series == CONTROL else f"--s{series % SERIES}"


def colour(series: int) -> str:
    """Return the CSS colour of a series."""
    return f"var({variable(series)})"


def shape(series: int) -> int:
    """Return the place in `MARKERS` of a series: another one for every seven."""
    return max(series, 0) // SERIES % len(MARKERS)


def compact(value: float) -> str:
    """Format a count shortly: 1.5 M, 38.4 k, 4.6e13 as 46 T."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"
    return f"{value:.3g}"


# -- figures -----------------------------------------------------------------------------------------------------------


def draw(title: str, paint: Callable[[Figure], Mapping[str, str]], height: float = HEIGHT, kind: str = "chart") -> str:
    """Let ``paint`` fill a figure and return it as SVG for the page.

    Args:
        title: The alternative text; it also decides the ids inside, so that a chart is the same bytes every time.
        paint: Gets a figure of ``WIDTH`` x ``height`` units (points); returns gid -> text of artists that tell
            something where the pointer rests.
        kind: CSS class.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**RC, "svg.hashsalt": title}):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, frameon=False)
        FigureCanvasSVG(figure)
        tips = paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), title, tips, height, kind)


def _inline(svg: str, title: str, tips: Mapping[str, str], height: float, kind: str) -> str:
    """Make matplotlib's file a piece of the page: no prolog, no style of its own, CSS variables for colours, tips."""
    body = svg[svg.index('<g id="figure_1">') : svg.rindex("</svg>")]
    body = re.sub(r"<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r"<defs>\s*<clipPath.*?</defs>", "", body, flags=re.S)  # nothing is drawn outside its axes
    body = re.sub(r' clip-path="[^"<>]*"', "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r"font-family: [^;\"]*; ?", "", body)
    body = re.sub(r' (d|x|y|points|transform)="[^"<>]*"', lambda found: _rounded(found[0]), body)
    body = re.sub(
        r'<g id="([^"<>]*)">',
        lambda found: f"<g><title>{escape(tips[found[1]])}</title>" if found[1] in tips else "<g>",
        body,
    )
    for name, stand_in in STAND_IN.items():
        body = body.replace(stand_in, f"var({name})")
    body = re.sub(r">\s+<", "><", body).replace("\n", " ")
    return (
        f'<svg class="{kind}" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{body.strip()}</svg>"
    )


def _rounded(text: str) -> str:
    return re.sub(r"-?\d+\.\d+", lambda n: f"{float(n[0]):.1f}".removesuffix(".0"), text)


def standalone(svg: str) -> str:
    """A chart as a file of its own: the page's light colours, a white ground, its size in pixels, and room at the right
    for labels that another font makes wider."""
    for name, value in LIGHT.items():
        svg = svg.replace(f"var({name})", value)
    found = re.match(r'<svg class="\w+" viewBox="0 0 (\S+) (\S+)"', svg)
    assert found is not None
    svg = svg.replace(f'viewBox="0 0 {found[1]}', f'viewBox="0 0 {float(found[1]) + MARGIN:g}', 1)
    size = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' width="{2 * (float(found[1]) + MARGIN):g}" height="{2 * float(found[2]):g}"'
        ' style="font-family:system-ui,sans-serif;background:#fff"'
    )
    return svg.replace("<svg", size, 1) + "\n"


def new_axes(figure: Figure, x_title: str, y_title: str, height: float = HEIGHT) -> Axes:
    """One pair of axes with a grid and no frame."""
    box = (LEFT / WIDTH, BOTTOM / height, (WIDTH - LEFT - RIGHT) / WIDTH, (height - TOP - BOTTOM) / height)
    axes = figure.add_axes(box)
    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelcolor=STAND_IN["--soft"], pad=5)
    axes.minorticks_off()
    axes.grid(True, color=STAND_IN["--grid"], linewidth=1)
    axes.set_axisbelow(True)
    middle = (HEIGHT - BOTTOM + TOP) / 2
    figure.text((WIDTH + LEFT - RIGHT) / 2 / WIDTH, 8 / height, x_title, ha="center", color=STAND_IN["--soft"])
    figure.text(
        8 / WIDTH, 1 - middle / height, y_title, ha="center", va="center", rotation=90, color=STAND_IN["--soft"]
    )
    return axes


def padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * share or abs(high) * 0.1 or 1.0
    floor = 0.0 if low >= 0 else -math.inf  # a chart of counts does not begin below nought
    return max(low - pad, floor), high + pad


def set_ticks(axis: Any, low: float, high: float, count: int, text: Format) -> None:
    """About ``count`` round values within the limits, written by ``text``."""
    places = round_values(low, high, count)
    axis.set_ticks(places, [text(v) for v in places])


def round_values(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round values within [low, high], three at least where they differ."""
    from matplotlib.ticker import MaxNLocator

    found: list[float] = []
    for most in range(count, count + 4):
        values = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        found = [float(v) for v in values if low <= v <= high]
        if len(found) >= 3:
            break
    return found


def set_log_ticks(axis: Any, low: float, high: float, text: Format) -> None:
    """Values 1, 2, 5 times powers of ten within the limits; of many, powers of ten alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        places = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
        if len(places) <= 5:
            break
    axis.set_ticks(places[:: math.ceil(len(places) / 5)] or [low], minor=False)
    axis.set_ticklabels([text(float(v)) for v in axis.get_ticklocs()])


def marker(axes: Axes, x: float, y: float, series: int, hollow: bool, gid: str) -> None:
    ink = STAND_IN[variable(series)]
    axes.plot(
        [x], [y], ls="none", marker=MARKERS[shape(series)], ms=8, mew=2, mec=ink, zorder=3,
        mfc=STAND_IN["--card"] if hollow else ink, gid=gid, clip_on=False,
    )  # fmt: skip


def pixels(axes: Axes, x: float, y: float) -> tuple[float, float]:
    """Units from the left and from the top of the figure."""
    right, up = axes.transData.transform((x, y))
    figure: Any = axes.figure
    return float(right), float(figure.bbox.height - up)


def write_labels(axes: Axes, wanted: Sequence[tuple[float, float, str]], taken: list[Box]) -> None:
    """Write names beside their points, where they cover least; a thin line leads to one that stands further away."""
    figure: Any = axes.figure
    width, height = figure.bbox.width, figure.bbox.height
    for x, y, text in wanted:
        spot = placed(x, y, text, taken, (LEFT, 0, WIDTH - 2, height - BOTTOM))
        if spot is None:  # its mark says it where the pointer rests, and the legend by its colour
            continue
        if spot.leader is not None:
            ends = ((x / width, spot.leader[0] / width), (1 - y / height, 1 - spot.leader[1] / height))
            figure.add_artist(_leader(ends, figure))
        figure.text(
            spot.x / width, 1 - spot.y / height, text, ha=spot.anchor, va="baseline", color=STAND_IN["--ink"],
            fontsize=12, fontweight="bold",
        )  # fmt: skip


def _leader(ends: tuple[tuple[float, float], tuple[float, float]], figure: Figure) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(*ends, color=STAND_IN["--soft"], linewidth=0.7, transform=figure.transFigure)


def set_limits(axes: Axes, xs: Sequence[float], ys: Sequence[float], log: bool, y_text: Format) -> None:
    """Limits and ticks of both axes."""
    if log:
        low, high = (math.log10(v) for v in (min(xs), max(xs)))
        pad = 0.14 * (high - low)
        axes.set_xscale("log")
        axes.set_xlim(10 ** (low - pad), 10 ** (high + pad))
        axes.minorticks_off()
        set_log_ticks(axes.xaxis, *axes.get_xlim(), compact)
    else:
        axes.set_xlim(*padded(xs, 0.14))
        set_ticks(axes.xaxis, *axes.get_xlim(), 4, compact)
    axes.set_ylim(*padded(ys, 0.12))
    set_ticks(axes.yaxis, *axes.get_ylim(), 6, y_text)

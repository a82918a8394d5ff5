"""The figures of a scenario as SVG: the same records give the same bytes.

Every figure has one width, so text keeps its size wherever the page puts it.  Colours are tokens that the HTML
replaces by CSS variables (`for_html`), so a figure follows the reader's light or dark scheme; the file beside the
Markdown keeps them on a white ground.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from fastft.record import Record
from reports.comparison import Arm, Scenario, memory_above_model, peak_memory
from reports.numbers import byte_unit, clean, number, plural
from reports.statistics import mean_sd, median_interval, process_rate

INK, MUTED, RULE, GROUND = "#1d2126", "#5c6570", "#d5d9de", "#ffffff"
BACKEND_COLOURS = {"peft": "#878d96", "eager": "#2f7fc1", "triton": "#d9771a"}
"""Fixed, so that a backend looks the same in every report; distinguishable with any colour vision."""
OTHER_COLOURS = ("#1f9e77", "#c05a9d", "#8a6d1d", "#6a5acd")
TOKENS = {
    INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", GROUND: "var(--ground)",
    **{colour: f"var(--{name})" for name, colour in BACKEND_COLOURS.items()},
    **{colour: f"var(--other-{index})" for index, colour in enumerate(OTHER_COLOURS)},
}  # fmt: skip
LINE_STYLES = ("-", (0, (4, 1.6)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
"""Tells the arms of one backend apart."""
MAX_POINTS = 300
"""Longer curves are averaged down to so many points: more cannot be seen and would only make the file large."""
_WIDTH = 5.4
_FONTS = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Figure:
    """One figure: `name` is its file's stem, `svg` a whole SVG document."""

    name: str
    title: str
    caption: str
    svg: str

    def for_html(self) -> str:
        """The `<svg>` element alone, its colours as CSS variables, its ids unique within a page."""
        element = re.sub(r' xmlns(:xlink)?="[^"]*"', "", self.svg.strip(), count=2)
        names = {"xlink:href": "href", **TOKENS}
        return _in_tags(element, lambda tag: re.sub("|".join(names), lambda found: names[found[0]], tag))


@dataclass(frozen=True)
class _Look:
    colour: str
    line: object


def scenario_figures(scenario: Scenario, prefix: str, *, seed: int = 0) -> tuple[Figure, ...]:
    """Every figure that the scenario's records allow."""
    makers = (_speed, _memory, _loss, _step_time, _accuracy)
    found = (maker(scenario, f"{prefix}-{maker.__name__.strip('_').replace('_', '-')}", seed) for maker in makers)
    return tuple(figure for figure in found if figure is not None)


def _speed(scenario: Scenario, name: str, seed: int) -> Figure | None:
    arms = _shown(scenario, process_rate)
    if not arms:
        return None
    looks = _looks(scenario)
    with _bars(name, [arm.name for arm in arms], "Tokens per second") as (axes, finish):
        largest = max(max(arm.values(process_rate)) for arm in arms)
        for row, arm in enumerate(arms):
            rates = arm.values(process_rate)
            median = float(np.median(rates))
            axes.barh(row, median, height=0.5, color=looks[arm.name].colour, zorder=2)
            # Beside the bar's middle, so that neither the whisker nor equal values hide one another.
            offsets = np.linspace(-0.14, 0.14, len(rates)) if len(rates) > 1 else [0.0]
            axes.plot(rates, row + np.asarray(offsets), "o", ms=3, mfc=GROUND, mec=INK, mew=0.7, zorder=4)
            bounds = median_interval(rates, seed=seed)
            if bounds is not None:
                axes.plot(bounds, [row, row], color=INK, lw=1.3, marker="|", ms=7, mew=1.3, zorder=3)
            _label(axes, max([*rates, *(bounds or ())]) + 0.02 * largest, row, number(median))
        axes.set_xlim(0, 1.2 * largest or 1.0)
        svg = finish()
    caption = "Bar: median of the processes. Circles: one process each. Whisker: 95 % bootstrap interval of the median."
    return Figure(name, "Speed", caption, svg)


def _memory(scenario: Scenario, name: str, seed: int) -> Figure | None:
    arms = _shown(scenario, peak_memory)
    if not arms:
        return None
    looks = _looks(scenario)
    unit, scale = byte_unit([value for arm in arms for value in arm.values(peak_memory)])
    with _bars(name, [arm.name for arm in arms], f"Peak memory, {unit}") as (axes, finish):
        largest = max(float(np.median(arm.values(peak_memory))) / scale for arm in arms)
        for row, arm in enumerate(arms):
            peak = float(np.median(arm.values(peak_memory))) / scale
            above = max(0.0, float(np.median(arm.values(memory_above_model))) / scale)
            axes.barh(row, peak - above, height=0.5, color=RULE, zorder=2)
            axes.barh(row, above, left=peak - above, height=0.5, color=looks[arm.name].colour, zorder=2)
            _label(axes, peak + 0.02 * largest, row, f"{number(peak, 3)} ({number(above, 3)} above)")
        axes.set_xlim(0, 1.48 * largest or 1.0)
        svg = finish()
    kinds = {record.memory.kind for arm in arms for record in arm.ok if record.memory}
    what = "Resident set of the process." if kinds == {"rss"} else "Memory that the allocator handed out."
    return Figure(name, "Memory", f"Left: the loaded model. Coloured: what training needs on top. Medians. {what}", svg)


def _loss(scenario: Scenario, name: str, seed: int) -> Figure | None:
    return _curves(scenario, name, "Loss", "Loss", lambda record: record.loss, np.mean)


def _step_time(scenario: Scenario, name: str, seed: int) -> Figure | None:
    warmup = max((record.warmup_steps for record in scenario.records), default=0)

    def dress(axes: Axes) -> None:
        counted = [
            time
            for arm in scenario.arms
            for r in arm.ok
            for time in r.step_time_ms[r.warmup_steps :]
            if math.isfinite(time)
        ]
        if counted:
            # One slow step must not flatten all others: the frame follows the 99th percentile.
            axes.set_ylim(0, 1.25 * float(np.quantile(counted, 0.99)))
        if warmup:
            axes.axvspan(0.5, warmup + 0.5, color=RULE, alpha=0.55, lw=0, zorder=0)

    figure = _curves(scenario, name, "Step time", "Step time, ms", lambda record: record.step_time_ms, np.median, dress)
    if figure is None:
        return None
    note = f" Shaded: {plural(warmup, 'warm-up step')}, not counted, cut off where they leave the frame."
    return Figure(figure.name, figure.title, figure.caption + (note if warmup else ""), figure.svg)


def _curves(
    scenario: Scenario,
    name: str,
    title: str,
    label: str,
    read: Callable[[Record], list[float]],
    centre: Callable[..., np.ndarray],
    dress: Callable[[Axes], None] | None = None,
) -> Figure | None:
    """Per-process thin lines and their centre as a thick one, over optimizer steps."""
    curves = {
        arm.name: [_finite(read(r)) for r in arm.ok if read(r)] for arm in scenario.arms if arm.gate_error is None
    }
    curves = {arm: found for arm, found in curves.items() if found}
    if not curves:
        return None
    looks = _looks(scenario)
    broad_baseline = centre is np.mean
    steps = max(len(curve) for found in curves.values() for curve in found)
    stride = -(-steps // MAX_POINTS)
    with _canvas(name, 2.9) as (axes, finish):
        for arm, found in curves.items():
            look = looks[arm]
            if len(found) > 1:
                for curve in found:
                    axes.plot(*_binned(curve, stride), color=look.colour, lw=0.6, alpha=0.4, zorder=2)
            common = min(map(len, found))
            middle = centre(np.asarray([curve[:common] for curve in found], dtype=np.float64), axis=0)
            # A broad baseline lies below the others: a loss that tracks it lies on it, and both stay visible.
            width, order = (3.4, 2.5) if broad_baseline and arm == scenario.baseline else (1.5, 3)
            axes.plot(
                *_binned(middle.tolist(), stride),
                color=look.colour,
                lw=width,
                ls=look.line,
                label=clean(arm, 24),
                zorder=order,
            )
            if common == 1:
                axes.plot(1, middle[0], "o", ms=3.5, color=look.colour, zorder=3)
        axes.set_xlabel("Optimizer step")
        axes.set_ylabel(label)
        axes.set_xlim(0.5, steps + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        axes.grid(axis="y", color=RULE, lw=0.6)
        if dress is not None:
            dress(axes)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, handlelength=1.8, columnspacing=1.4)
        svg = finish()
    word, broad = ("mean", ", the baseline broadest") if broad_baseline else ("median", "")
    caption = f"Thick: {word} of the processes{broad}. Thin: one process each."
    return Figure(name, title, caption + (f" Each point averages {stride} steps." if stride > 1 else ""), svg)


def _accuracy(scenario: Scenario, name: str, seed: int) -> Figure | None:
    arms = _shown(scenario, lambda record: record.accuracy.after if record.accuracy else None)
    if not arms:
        return None
    looks = _looks(scenario)
    with _bars(name, [arm.name for arm in arms], "Accuracy on held-out samples, %") as (axes, finish):
        for row, arm in enumerate(arms):
            found = [record.accuracy for record in arm.ok if record.accuracy]
            before, after = [100 * one.before for one in found], [100 * one.after for one in found]
            start, end = mean_sd(before)[0], mean_sd(after)[0]
            colour = looks[arm.name].colour
            axes.plot([start, end], [row, row], color=RULE, lw=2, zorder=1)
            axes.plot(before + after, [row + 0.2] * len(before + after), "|", ms=5, mew=0.8, color=colour, zorder=2)
            axes.plot(start, row, "o", ms=6, mfc=GROUND, mec=colour, mew=1.5, zorder=3)
            axes.plot(end, row, "o", ms=6, color=colour, zorder=3)
            axes.annotate(
                f"{end:.1f}", (end, row), (0, 7), textcoords="offset points", ha="center", va="bottom", color=INK
            )
        low, high = axes.get_xlim()
        margin = max(1.0, 0.08 * (high - low))
        axes.set_xlim(max(-2.0, low - margin), min(102.0, high + margin))
        axes.set_ylim(len(arms) - 0.5, -0.7)
        svg = finish()
    caption = "Open: before training. Filled: after. Means over seeds; the ticks below are single seeds."
    return Figure(name, "Accuracy", caption, svg)


def _shown(scenario: Scenario, read: Callable[[Record], float | None]) -> list[Arm]:
    """The arms with something to show; one whose gate failed shows nothing."""
    return [arm for arm in scenario.arms if arm.gate_error is None and arm.values(read)]


def _looks(scenario: Scenario) -> dict[str, _Look]:
    """A colour for each backend, a line style for each further arm of the same backend."""
    others = sorted({arm.backend for arm in scenario.arms} - BACKEND_COLOURS.keys())
    colours = BACKEND_COLOURS | {
        backend: OTHER_COLOURS[index % len(OTHER_COLOURS)] for index, backend in enumerate(others)
    }
    seen: dict[str, int] = {}
    looks = {}
    for arm in scenario.arms:
        index = seen[arm.backend] = seen.get(arm.backend, -1) + 1
        looks[arm.name] = _Look(colours[arm.backend], LINE_STYLES[index % len(LINE_STYLES)])
    return looks


def _finite(curve: Sequence[float]) -> list[float]:
    """Gaps where the values are not finite: matplotlib leaves them out."""
    return [value if math.isfinite(value) else math.nan for value in curve]


def _binned(curve: Sequence[float], stride: int) -> tuple[list[float], list[float]]:
    """Steps (from 1) and values; with a stride, the mean of each run of so many."""
    if stride == 1:
        return list(map(float, range(1, len(curve) + 1))), list(curve)
    starts = range(0, len(curve), stride)
    runs = [curve[start : start + stride] for start in starts]
    return [start + (len(run) + 1) / 2 for start, run in zip(starts, runs, strict=True)], [
        float(np.mean(run)) for run in runs
    ]


def _label(axes: Axes, x: float, row: int, text: str) -> None:
    axes.text(x, row, text, va="center", ha="left", color=INK)


@contextmanager
def _bars(name: str, labels: list[str], axis_label: str) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """A frame of horizontal rows, the first on top."""
    with _canvas(name, 0.85 + 0.42 * max(2, len(labels))) as (axes, finish):
        axes.set_yticks(range(len(labels)), [clean(label, 24) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.set_xlabel(axis_label)
        axes.grid(axis="x", color=RULE, lw=0.6, zorder=0)
        axes.spines["left"].set_visible(False)
        axes.set_axisbelow(True)
        yield axes, finish


@contextmanager
def _canvas(name: str, height: float) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Axes of our style, and the function that turns them into SVG text; touches no global state for good."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.family": "DejaVu Sans",
        "font.size": 9, "axes.linewidth": 0.7, "axes.edgecolor": MUTED, "axes.labelcolor": MUTED,
        "axes.spines.top": False, "axes.spines.right": False, "text.color": INK, "legend.frameon": False,
        "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
        "xtick.major.size": 3, "ytick.major.size": 3, "figure.facecolor": GROUND, "axes.facecolor": "none",
        "axes.unicode_minus": True, "path.simplify": True, "figure.constrained_layout.use": True,
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # A name in a script that the measuring font lacks is still written as text and shown by the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        canvas = Canvas(figsize=(_WIDTH, height))
        FigureCanvasSVG(canvas)
        axes = canvas.add_subplot()
        yield axes, lambda: _svg(canvas, name)


def _svg(canvas: Canvas, name: str) -> str:
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r"<\?xml.*?\?>\s*|<!DOCTYPE.*?>\s*", "", text, flags=re.DOTALL)

    def fix(tag: str) -> str:
        tag = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", tag)
        return tag.replace("'DejaVu Sans'", _FONTS).replace('version="1.1"', 'version="1.1" role="img"')

    return _in_tags(text, fix)


def _in_tags(svg: str, change: Callable[[str], str]) -> str:
    """`change` every tag and leave the text between, which holds names that are not ours."""
    return re.sub(r"<[^>]*>", lambda found: change(found[0]), svg)

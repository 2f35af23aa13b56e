"""Plots as inline SVG for the report: no fixed ink, so they read on light and dark paper; the same bytes every time."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

INK = "#010203"  # a stand-in that becomes the page's text colour
COLOURS = {"sft": "#3b82d6", "sft_more": "#8b7fd0", "aligned": "#e0702f", "oracle": "#2f9e77"}
OTHER = "#8a8f98"
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "axes.prop_cycle": "cycler('color', ['3b82d6', 'e0702f', '2f9e77', '8b7fd0'])",
}
PANELS = (  # the learning curves that share axes; every other name gets its own panel
    ("rewards/chosen", "rewards/rejected"),
    ("logps/chosen", "logps/rejected"),
)
FIRST = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "logps/chosen")
UNITS = {
    "loss": "nats",
    "rewards/margins": "reward margin (nats)",
    "rewards/accuracies": "share of pairs",
    "rewards/chosen": "reward (nats)",
    "logps/chosen": "summed log-prob. (nats)",
    "grad_norm": "global norm",
    "epsilon/mean": "mean ε",
}


def finite(value: Any) -> bool:
    """Whether there is a number to draw."""
    return isinstance(value, int | float) and math.isfinite(value)


def curves(rows: Sequence[Mapping[str, Any]], names: Sequence[str], description: str) -> str:
    """Learning curves, one panel per name (or per pair of names that belong together), over update steps."""
    groups = [tuple(name for name in panel if name in names) for panel in PANELS]
    grouped = {name for group in groups for name in group}
    groups = [group for group in groups if group] + [(name,) for name in names if name not in grouped]
    groups.sort(key=lambda group: FIRST.index(group[0]) if group[0] in FIRST else len(FIRST))

    def paint(axes):
        for axis, group in zip(axes, groups, strict=False):
            for name in group:
                points = [(row["step"], row[name]) for row in rows if finite(row.get(name))]
                marker = "o" if len(points) <= 30 else None
                axis.plot(*zip(*points, strict=True), marker=marker, markersize=2.5, linewidth=1.1, label=name)
            axis.set(title=", ".join(group), xlabel="update step", ylabel=UNITS.get(group[0], group[0].split("/")[-1]))
            if len(group) > 1:
                axis.legend()

    return _draw(description, paint, panels=len(groups))


def intervals(cells: Mapping[str, Mapping[str, Mapping[str, Any]]], labels: Mapping[str, str], description: str) -> str:
    """One panel per metric of `cells[metric][model]`, one dot with its 95 % interval per model."""

    def paint(axes):
        for axis, (metric, column) in zip(axes, cells.items(), strict=False):
            for place, (model, cell) in enumerate(column.items()):
                axis.errorbar(cell["value"], place, xerr=_errors(cell), fmt="o", markersize=5, color=_colour(model))
            axis.set_yticks(range(len(column)), [labels.get(model, model) for model in column])
            axis.set(title=metric, xlabel=f"{metric}, 95 % interval", ylim=(len(column) - 0.5, -0.5))

    return _draw(description, paint, panels=len(cells), columns=2, height=2.4)


def bars(cells: Mapping[str, Mapping[str, Mapping[str, Any]]], labels: Mapping[str, str], description: str) -> str:
    """One panel per metric of `cells[metric][model]`, one bar with its 95 % interval per model."""

    def paint(axes):
        for axis, (metric, column) in zip(axes, cells.items(), strict=False):
            for place, (model, cell) in enumerate(column.items()):
                axis.bar(place, cell["value"], width=0.65, color=_colour(model), yerr=_errors(cell), ecolor=INK)
            axis.set_xticks(range(len(column)), [labels.get(model, model) for model in column])
            axis.set(title=metric, ylabel=metric)
            axis.grid(False, axis="x")
            axis.axhline(0, color=INK, linewidth=0.6)

    return _draw(description, paint, panels=len(cells))


def deciles(series: Mapping[str, Sequence[Mapping[str, Any]]], labels: Mapping[str, str], description: str) -> str:
    """HR@1 over the ten popularity classes of the target."""

    def paint(axes):
        for model, row in series.items():
            points = [(place, cell["value"]) for place, cell in enumerate(row, 1) if finite(cell.get("value"))]
            style = "-" if model in COLOURS else (":" if model == "popularity" else "--")
            label = labels.get(model, model)
            axes[0].plot(*zip(*points, strict=True), ls=style, marker="o", color=_colour(model), label=label)
        axes[0].set(title="HR@1 by popularity of the true item", ylabel="HR@1")
        axes[0].set_xlabel("decile of its train count, 1 = least popular")
        axes[0].set_xticks(range(1, 1 + max(len(row) for row in series.values())))
        axes[0].set_ylim(bottom=0)
        axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return _draw(description, paint, columns=1, height=3.2)


def epsilons(samples: Mapping[str, np.ndarray], description: str) -> str:
    """Histograms of the smoothing factors `samples[label]`, each as shares of its own sample."""
    edges = np.linspace(0.0, max(0.5, *(values.max() for values in samples.values())), 31)

    def paint(axes):
        for (label, values), colour in zip(samples.items(), (COLOURS["sft"], COLOURS["aligned"]), strict=False):
            weights = np.full(len(values), 1 / len(values))
            label = f"{label} (n = {len(values):,})"
            axes[0].hist(values, edges, weights=weights, color=colour, alpha=0.6, label=label)
        axes[0].set(title="Smoothing factor of the stored pairs", xlabel="ε", ylabel="share of pairs")
        axes[0].legend()

    return _draw(description, paint, columns=1, height=2.8)


def _colour(model: str) -> str:
    return COLOURS.get(model, OTHER)


def _errors(cell: Mapping[str, Any]) -> list[list[float]] | None:
    if not cell.get("ci95"):
        return None
    low, high = cell["ci95"]
    return [[max(cell["value"] - low, 0.0)], [max(high - cell["value"], 0.0)]]


def _draw(
    description: str, paint: Callable[[Any], None], *, panels: int = 1, columns: int = 3, height: float = 2.2
) -> str:
    import matplotlib.style  # heavy, and only reports need it
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(columns, panels)
    rows = -(-panels // columns)
    with matplotlib.style.context(["default", {**STYLE, "svg.hashsalt": description}]):
        size = ({1: 6.0, 2: 8.0}.get(columns, 9.5), height * rows)
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.12))
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for unused in axes[panels:]:
            unused.set_axis_off()
        paint(axes)
        figure.patch.set_visible(False)
        for axis in axes:
            axis.patch.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(buffer.getvalue(), description)


def _inline(svg: str, description: str) -> str:
    """The <svg> element alone, fit for a place inside HTML: named, scalable, without prologue and unused ids."""
    svg = svg[svg.index("<svg") :]
    width = re.search(r'width="([\d.]+)pt"', svg)[1]  # type: ignore[index]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r'\s+id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(
        r"<svg[^>]*?viewBox=(\"[^\"]*\")[^>]*>",
        lambda match: (
            f'<svg viewBox={match[1]} role="img" aria-label="{escape(description)}" style="max-width:{width}pt">'
        ),
        svg,
        count=1,
    )
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    return svg.replace(INK, "currentColor")

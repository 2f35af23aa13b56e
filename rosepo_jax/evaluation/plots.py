"""Plots as inline SVG: no fixed ink, so they read on light and dark paper; the same bytes every time.

Every function returns its panels one after the other, each an <svg> of its own: a page lays them out in as many columns
as fit, and none shrinks below a readable size.
"""

import functools
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
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
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
SHOWS = {
    "HR@1": "share of rows",
    "NDCG@5": "mean over rows",
    "popularity lift": "nats",
    "semantic error rate": "share of rows",
    "MGU": "gap of shares",
    "DGU": "gap of shares",
    "gini": "0: all alike, 1: always the same item",
    "coverage": "share of the catalogue",
}
NARROW, WIDE = 3.4, 5.2  # inches
ROW = 0.24  # inches a row of dots takes

Cells = Mapping[str, Mapping[str, Any]]


def finite(value: Any) -> bool:
    """Whether there is a number to draw."""
    return isinstance(value, int | float) and math.isfinite(value)


def curves(rows: Sequence[Mapping[str, Any]], names: Sequence[str], description: str) -> str:
    """Learning curves, one panel per name (or per pair of names that belong together), over update steps."""
    groups = [tuple(name for name in panel if name in names) for panel in PANELS]
    grouped = {name for group in groups for name in group}
    groups = [group for group in groups if group] + [(name,) for name in names if name not in grouped]
    groups.sort(key=lambda group: FIRST.index(group[0]) if group[0] in FIRST else len(FIRST))

    def paint(group, axis):
        for name in group:
            points = [(row["step"], row[name]) for row in rows if finite(row.get(name))]
            marker = "o" if len(points) <= 30 else None
            axis.plot(*zip(*points, strict=True), marker=marker, markersize=2.5, linewidth=1.1, label=name)
        axis.set(title=", ".join(group), xlabel="update step", ylabel=UNITS.get(group[0], group[0].split("/")[-1]))
        if len(group) > 1:
            axis.legend()

    return "".join(_draw(f"{description}: {', '.join(g)}", functools.partial(paint, g)) for g in groups)


def intervals(
    panels: Mapping[str, Cells], labels: Mapping[str, str], description: str, colours: Mapping[str, str] | None = None
) -> str:
    """One panel a metric of `panels[metric][row]`, one dot with its 95 % interval a row.

    A cell with "values" is a mean: its values are drawn as small dots beside it. `colours`: of rows that are no models.
    """
    places = {row: place for place, row in enumerate({row: None for column in panels.values() for row in column})}

    def paint(metric, column, axis):
        for row, cell in column.items():
            colour = _colour(row, colours)
            for value in cell.get("values", ()):
                axis.plot(value, places[row], ".", color=colour, markersize=4, alpha=0.7)
            axis.errorbar(cell["value"], places[row], xerr=_errors(cell), fmt="o", markersize=5, color=colour)
        axis.set_yticks(list(places.values()), [labels.get(row, row) for row in places])
        axis.set(title=metric, xlabel=SHOWS.get(metric.partition(" (")[0], metric), ylim=(len(places) - 0.5, -0.5))
        axis.grid(False, axis="y")

    return "".join(
        _draw(f"{description}: {metric}", functools.partial(paint, metric, column), WIDE, 1 + ROW * len(places))
        for metric, column in panels.items()
        if column
    )


def by_class(
    series: Mapping[str, Sequence[Mapping[str, Any]]],
    ticks: Sequence[str],
    labels: Mapping[str, str],
    title: str,
    xlabel: str,
) -> str:
    """HR@1 over classes of rows, one line a model; intervals of SFT and the aligned model, which are compared."""

    def paint(axis):
        for model, row in series.items():
            points = [(place, cell["value"]) for place, cell in enumerate(row) if finite(cell.get("value"))]
            if not points:
                continue
            style = "-" if model in COLOURS else (":" if model == "popularity" else "--")
            axis.plot(
                *zip(*points, strict=True), ls=style, marker="o", markersize=3, linewidth=1.2, color=_colour(model),
                label=labels.get(model, model),
            )  # fmt: skip
            for place, cell in enumerate(row):
                if model in ("sft", "aligned") and finite(cell.get("value")):
                    axis.errorbar(place, cell["value"], _errors(cell), color=_colour(model), linewidth=0.8)
        axis.set(ylabel="HR@1 (share of rows)", xlabel=xlabel)
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set_ylim(bottom=0)
        axis.margins(x=0.04)
        axis.figure.legend(loc="outside lower center", ncols=3, fontsize=8)

    return _draw(title, paint, WIDE, 3.3)


def epsilons(samples: Mapping[str, np.ndarray], description: str) -> str:
    """Histograms of the smoothing factors `samples[label]`, each as shares of its own sample."""
    edges = np.linspace(0.0, max(0.5, *(values.max() for values in samples.values())), 31)

    def paint(axis):
        for (label, values), colour in zip(samples.items(), (COLOURS["sft"], COLOURS["aligned"]), strict=False):
            weights = np.full(len(values), 1 / len(values))
            label = f"{label} (n = {len(values):,})"
            axis.hist(values, edges, weights=weights, color=colour, alpha=0.6, label=label)
        axis.set(title="Smoothing factor of the stored pairs", xlabel="ε", ylabel="share of pairs")
        axis.legend()

    return _draw(description, paint, WIDE, 2.6)


def slots(shares: Mapping[str, Sequence[float]], labels: Mapping[str, str], description: str) -> str:
    """How often the first answer stood in each slot of the shown list, a panel a model; dashed: all alike."""

    def paint(model, share, axis):
        axis.bar(range(1, len(share) + 1), share, width=0.7, color=_colour(model))
        axis.axhline(1 / len(share), color=INK, linewidth=0.8, ls="--")
        axis.set(title=labels.get(model, model), xlabel="slot of the shown list", ylabel="share of first answers")
        axis.grid(False, axis="x")

    return "".join(
        _draw(f"{description}: {labels.get(model, model)}", functools.partial(paint, model, share))
        for model, share in shares.items()
        if len(share)
    )


def heat_map(title: str, x: str, y: str, cells: Mapping[tuple[Any, Any], float | None]) -> str:
    """A figure over two settings, its value in every cell and the best one framed; cells[x value, y value].

    None: the run has no figure. A place that is not in `cells` was not run.
    """
    import matplotlib
    from matplotlib.patches import Rectangle

    xs, ys = (ordered({at[place] for at in cells}) for place in (0, 1))
    known = {(a, b): value for b in ys for a in xs if (value := cells.get((a, b))) is not None}
    best = max(known, key=lambda at: known[at]) if known else None
    value_YxX = np.array([[known.get((a, b), math.nan) for a in xs] for b in ys])
    described = "; ".join(f"{x} {_tick(a)}, {y} {_tick(b)}: {value:.3f}" for (a, b), value in known.items())
    colours = matplotlib.colormaps["cividis"].resampled(24)  # in so few steps its scale stays vectors, not a picture

    def paint(axis):
        low, high = (min(known.values()), max(known.values())) if known else (0.0, 1.0)
        mesh = axis.pcolormesh(
            value_YxX, cmap=colours, vmin=low, vmax=high if high > low else low + 1e-3, edgecolors="face", linewidth=0.3
        )
        for column, a in enumerate(xs):
            for row, b in enumerate(ys):
                value = cells.get((a, b))
                if value is None:
                    word, ink = ("no figure" if (a, b) in cells else "not run"), INK
                else:
                    red, green, blue, _ = mesh.cmap(mesh.norm(value))
                    word, ink = (
                        f"{value:.3f}",
                        "#000000" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.45 else "#ffffff",
                    )
                weight = "bold" if (a, b) == best else "normal"
                axis.text(column + 0.5, row + 0.5, word, color=ink, weight=weight, ha="center", va="center", fontsize=8)
        if best is not None:
            corner = xs.index(best[0]) + 0.04, ys.index(best[1]) + 0.04
            axis.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="#000000", linewidth=1.6))
        axis.set_xticks([place + 0.5 for place in range(len(xs))], [_tick(value) for value in xs])
        axis.set_yticks([place + 0.5 for place in range(len(ys))], [_tick(value) for value in ys])
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        scale = axis.figure.colorbar(mesh, ax=axis, label=title)
        scale.outline.set_visible(False)

    return _draw(f"Heat map of {title}. {described}", paint, max(2.2 + 0.62 * len(xs), NARROW), 1.3 + 0.42 * len(ys))


def against(title: str, key: str, points: Sequence[tuple[Any, float]], line: bool) -> str:
    """A figure over one setting, a dot a run; `line` joins the means of numbers.

    Numbers lie as far apart as they are, on a logarithmic axis where they span more than a factor of ten; words side by
    side.
    """
    values = ordered({value for value, _ in points})
    numeric = all(isinstance(value, int | float) for value in values)
    place = {value: value if numeric else number for number, value in enumerate(values)}
    mean = {value: np.mean([figure for at, figure in points if at == value]).item() for value in values}
    described = "; ".join(f"{_tick(value)}: {figure:.3f}" for value, figure in mean.items())

    def paint(axis):
        if line and numeric:
            axis.plot([place[value] for value in values], list(mean.values()), linewidth=1.1, color=COLOURS["aligned"])
        axis.plot([place[at] for at, _ in points], [figure for _, figure in points], "o", markersize=4,
                  color=COLOURS["aligned"], alpha=0.8)  # fmt: skip
        if numeric and values[0] > 0 and values[-1] > 10 * values[0]:
            axis.set_xscale("log")
        if not numeric or len(values) <= 8:
            axis.set_xticks([place[value] for value in values], [_tick(value) for value in values])
            axis.set_xticks([], minor=True)
        else:
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.xaxis.set_minor_formatter(lambda value, _: "")
        axis.set(title=title, xlabel=key, ylabel=title)
        axis.margins(x=0.08)

    return _draw(f"{title} by {key}. {described}", paint, WIDE, 2.4) if points else ""


def ordered(values: Any) -> list:
    """Numbers in their order, then words in theirs."""
    return sorted(values, key=lambda value: (isinstance(value, str), value))


def _tick(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _colour(row: str, colours: Mapping[str, str] | None = None) -> str:
    return (colours or COLOURS).get(row, OTHER)


def _errors(cell: Mapping[str, Any]) -> list[list[float]] | None:
    if not cell.get("ci95"):
        return None
    low, high = cell["ci95"]
    return [[max(cell["value"] - low, 0.0)], [max(high - cell["value"], 0.0)]]


def _draw(description: str, paint: Callable[[Any], None], width: float = NARROW, height: float = 2.2) -> str:
    import matplotlib.style  # heavy, and only reports need it
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", {**STYLE, "svg.hashsalt": description}]):
        figure = Figure(figsize=(width, height), layout="constrained")
        axis = figure.subplots()
        paint(axis)
        figure.patch.set_visible(False)
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

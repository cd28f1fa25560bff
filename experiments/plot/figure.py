"""The figure: a panel for each quantity, every curve in it."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dppo_jax.errors import UserError, nearest, writing
from dppo_jax.files import Path, make_folder, written_whole
from dppo_jax.storage.panels import PANELS, Panel, evaluations
from experiments.plot.curves import bootstrap_interval, described, smoothed
from experiments.plot.runs import Curve

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")  # Okabe and Ito, without yellow
INK, GRID = "#333333", "#E6E6E6"


def _logged(curves: Sequence[Curve]) -> set[str]:
    return {tag for curve in curves for run in curve.runs for tag in run}


def choose(curves: Sequence[Curve], tags: Sequence[str] = ()) -> list[Panel]:
    """The panels that some run has data for, evaluations after the reward; or one for every tag that `tags` name,
    where * stands for anything. UserError where there is none."""
    logged = _logged(curves)
    if tags:
        for pattern in tags:
            if not any(fnmatchcase(tag, pattern) for tag in logged):
                raise UserError(f"no run logged {pattern!r}{nearest(pattern, logged)}")
        panel_of = {p.tags[0]: p for p in (*PANELS, *evaluations(logged)) if len(p.tags) == 1}
        matching = [tag for pattern in tags for tag in sorted(logged) if fnmatchcase(tag, pattern)]
        return [panel_of.get(tag, Panel(tag, (tag,))) for tag in dict.fromkeys(matching)]
    panels = [panel for panel in (PANELS[0], *evaluations(logged), *PANELS[1:]) if logged.intersection(panel.tags)]
    if not panels:
        raise UserError(f"the runs logged none of {', '.join(tag for panel in PANELS for tag in panel.tags)}")
    return panels


def remarks(curves: Sequence[Curve], tags: Sequence[str] = ()) -> list[str]:
    """Sentences on what the figure leaves out: panels without data, runs without a tag, steps that a run lacks."""
    logged, drawn = _logged(curves), [tag for panel in choose(curves, tags) for tag in panel.tags]
    absent = [] if tags else [tag for panel in PANELS for tag in panel.tags if not logged.intersection(panel.tags)]
    notes = [f"left out, as no run logged them: {', '.join(absent)}"] if absent else []
    for curve in curves:
        ends = {tag: [int(run[tag][0][-1]) for run in curve.runs if tag in run] for tag in drawn}
        without = [tag for tag in drawn if 0 < len(ends[tag]) < len(curve.runs)]
        if without:
            notes.append(f"{curve.label}: drawn without those of its runs that did not log {', '.join(without)}")
        shortest = {tag: min(last_steps) for tag, last_steps in ends.items() if len(set(last_steps)) > 1}
        if shortest:
            tag = min(shortest, key=lambda tag: shortest[tag])
            notes.append(f"{curve.label}: its curves end with the shortest of its runs, {tag} at step {shortest[tag]}")
    return notes


def draw(curves: Sequence[Curve], smooth: float = 1, tags: Sequence[str] = ()) -> Figure:
    """The figure; `smooth` is that of `curves.smoothed`, `tags` those of `choose`."""
    panels = choose(curves, tags)
    rows = -(-len(panels) // (4 if len(panels) % 5 else 5))
    columns = -(-len(panels) // rows)
    figure = Figure(figsize=(3.3 * columns + 0.2, 2.45 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Axes] = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    axes = axes[: len(panels)]
    colors = COLORS if len(curves) <= len(COLORS) else colormaps["viridis"](np.linspace(0, 0.9, len(curves)))
    for axis, panel in zip(axes, panels, strict=True):
        drawn = [
            _draw_curve(axis, curve, tag, smooth, color)
            for curve, color in zip(curves, colors, strict=False)
            for tag in panel.tags
        ]
        _dress(axis, panel, np.concatenate(drawn))
    for axis in axes[max(0, len(panels) - columns) :]:
        axis.set_xlabel("step", fontsize=8, color=INK)
    ends = np.array([axis.get_xlim() for axis in axes])
    for axis in axes:
        axis.set_xlim(ends[:, 0].min(), ends[:, 1].max())
    # Matplotlib reads $ as mathematics, and leaves a label with a leading underscore out of the legend.
    labels = [re.sub("^_", " _", curve.label.replace("$", r"\$")) for curve in curves]
    if len(curves) == 1:
        figure.suptitle(labels[0], fontsize=10, color=INK)
    else:
        lines = [Line2D([], [], color=c, linewidth=2) for c, _ in zip(colors, curves, strict=False)]
        per_row = max(1, int(3.3 * columns * 12 / (max(map(len, labels)) + 6)))
        figure.legend(
            lines, labels, loc="outside upper center", ncols=min(per_row, len(curves)), frameon=False, fontsize=9
        )
    if footer := _footer(curves, panels, smooth):
        figure.supxlabel(footer, fontsize=8, color=INK)
    return figure


def save(figure: Figure, path: Path, *, dpi: int = 120) -> None:
    """Writes a figure whole or not at all, as its name's ending says. UserError."""
    make_folder(path.parent)
    with writing(path), written_whole(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix[1:].lower())


def _footer(curves: Sequence[Curve], panels: Sequence[Panel], smooth: float) -> str:
    """How the curves were made, for the reader of the figure alone."""
    parts = []
    if any(len(curve.runs) > 1 for curve in curves):
        parts.append("line: mean over seeds, band: its 95% bootstrap interval")
    if described(smooth):
        spared = ", but for evaluations" if any(map(_sparse, (p.tags[0] for p in panels))) else ""
        parts.append(f"smoothed: {described(smooth)}{spared}")
    return "; ".join(parts)


def _sparse(tag: str) -> bool:
    """Evaluations are many steps apart: drawn as they are, with markers."""
    return tag.startswith("eval/")


def _draw_curve(axis: Axes, curve: Curve, tag: str, smooth: float, color) -> np.ndarray:
    """Draws one curve, and the band of several runs; returns the values, for the choice of scale."""
    series = [run[tag] for run in curve.runs if tag in run]
    if not series:
        return np.empty(0)
    steps = series[0][0]
    for run_steps, _ in series[1:]:
        steps = np.intersect1d(steps, run_steps)
    raw = np.stack([values[np.isin(run_steps, steps)] for run_steps, values in series])
    raw = np.where(np.isfinite(raw), raw, np.nan)
    amount = 1 if _sparse(tag) else smooth
    values = np.stack([smoothed(run, amount) for run in raw])
    marker = "o" if _sparse(tag) or steps.size == 1 else None
    if len(series) > 1:
        axis.fill_between(steps, *bootstrap_interval(values), color=color, alpha=0.18, linewidth=0)
    elif amount != 1:
        axis.plot(steps, raw[0], color=color, alpha=0.25, linewidth=0.8)
    axis.plot(steps, values.mean(0), color=color, linewidth=1.6, marker=marker, markersize=3)
    return raw.ravel()


def _dress(axis: Axes, panel: Panel, values: np.ndarray) -> None:
    axis.set_title(panel.title, loc="left", fontsize=9, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#AAAAAA")
    axis.tick_params(labelsize=8, colors=INK, length=2)
    axis.tick_params(which="minor", left=False)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    values = values[np.isfinite(values)]
    if panel.wide and values.size and values.min() > 0 and values.max() > 100 * values.min():
        axis.set_yscale("log")
        return
    axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axis.yaxis.set_major_formatter(lambda value, _: re.sub(r"e([-+])0*", r"e\1", f"{value:.6g}"))
    if panel.fraction:
        axis.set_ylim(bottom=0)

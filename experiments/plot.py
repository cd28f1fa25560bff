"""The paper's panels from the logs of one or more runs.

    python -m experiments.plot --runs runs/a runs/b --out curves.png [--smooth 5]

One panel per quantity that any run logged, one line per run, labelled with its folder's name. Runs whose config.json
differs in the seed only are one method: their mean, in a band from the lowest to the highest.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from dppo_jax.errors import UserError, nearest, run_main  # noqa: E402
from dppo_jax.run_log import EVENTS, Scalars, make_folder, read_config, read_scalars  # noqa: E402
from experiments.cli import Parser  # noqa: E402

PANELS = {  # tag -> title; the evaluations found in the logs come after the reward
    "reward/mean": "Reward",
    "mismatch/abs_prob_diff_mean": "Mismatch: mean |π − μ| before any update",
    "policy/abs_prob_diff_mean": "Policy shift: mean |π − μ|",
    "trust_region/masked": "Masked fraction of tokens",
    "policy/entropy": "Entropy (nats)",
    "response/length_mean": "Response length (tokens)",
    "grad_norm": "Gradient norm",
}
LOG_SCALED = ("mismatch/abs_prob_diff_mean", "policy/abs_prob_diff_mean", "grad_norm")  # where the range is wide
FORMATS = (".png", ".svg", ".pdf")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")  # Okabe and Ito, without yellow
INK, GRID = "#333333", "#E6E6E6"


class Method(NamedTuple):
    """Runs that are drawn as one line."""

    label: str
    runs: list[Scalars]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m experiments.plot",
        description="Draws reward, evaluation, mismatch, masked fraction, entropy, length and gradient norm of runs.",
        epilog="Runs whose config.json differs in the seed only are drawn as their mean, in a band from min to max.",
        allow_abbrev=False,
    )
    parser.add_argument("--runs", nargs="+", required=True, metavar="DIR", help="run folders (a run's --workdir)")
    parser.add_argument("--out", required=True, metavar="F", help="the figure: F.png, F.svg or F.pdf")
    parser.add_argument("--smooth", type=int, default=1, metavar="W", help="centred mean over W steps; default 1: none")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}{nearest(unknown[0], ['--runs', '--out', '--smooth'])}")
    out = Path(args.out)
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {args.out!r} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if args.smooth < 1:
        raise UserError(f"--smooth must be 1 or more, not {args.smooth}")
    figure = draw(group_runs(args.runs), args.smooth)
    make_folder(out.parent)
    try:
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {args.out!r}: {error.strerror}") from None
    finally:
        plt.close(figure)
    print(f"wrote {out}")


def group_runs(folders: Sequence[str]) -> list[Method]:
    """Reads the runs and puts those of one method together, in the order given. A folder given twice counts once."""
    paths = {Path(folder).resolve(): folder for folder in folders}
    given = {path.parent if path.name == EVENTS else path: folder for path, folder in paths.items()}
    unique = list(given)
    shared = os.path.commonpath([p.parent for p in unique])
    names = [p.name for p in unique]
    if len(set(names)) < len(names):
        names = [str(p.relative_to(shared)) for p in unique]
    members: dict[str, list[int]] = {}
    for i, path in enumerate(unique):
        members.setdefault(_method_key(path), []).append(i)
    labels = [_label([names[i] for i in group]) for group in members.values()]
    if len(set(labels)) < len(labels):
        labels = [", ".join(names[i] for i in group) for group in members.values()]
    runs = [read_scalars(folder) for folder in given.values()]
    return [Method(label, [runs[i] for i in group]) for label, group in zip(labels, members.values(), strict=True)]


def _method_key(path: Path) -> str:
    """The config without its seed; a run without config.json is a method of its own."""
    if not (path / "config.json").exists():
        return str(path)
    config = read_config(path)
    config.pop("seed", None)
    return json.dumps(config, sort_keys=True)


def _label(names: Sequence[str]) -> str:
    """What the folder names share, without a dangling "seed": a_seed0, a_seed1 -> "a (2 runs)"."""
    if len(names) == 1:
        return names[0]
    common = os.path.commonprefix(list(names))
    if any(name[len(common) :][:1].isdigit() for name in names):
        common = common.rstrip("0123456789")
    common = re.sub(r"[-_./ ]+(seed|s)?[-_= ]*$", "", common)
    return f"{common if common else names[0]} ({len(names)} runs)"


def draw(methods: Sequence[Method], smooth: int = 1) -> Figure:
    """One panel per tag that some run holds. Raises UserError where there is none."""
    logged = {tag for method in methods for run in method.runs for tag in run}
    evals = {tag: f"Evaluation: {tag.split('/')[1]}" for tag in sorted(logged) if re.fullmatch(r"eval/[^/]+/avg", tag)}
    titles = {"reward/mean": PANELS["reward/mean"], **evals, **PANELS}
    titles = {tag: title for tag, title in titles.items() if tag in logged}
    if not titles:
        raise UserError(f"the runs logged none of {', '.join(PANELS)}")
    columns = len(titles) if len(titles) <= 3 else -(-len(titles) // (-(-len(titles) // 4)))
    rows = -(-len(titles) // columns)
    size = (3.3 * columns + 0.2, 2.45 * rows + 0.5)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    axes = list(grid.flat)
    for axis in axes[len(titles) :]:
        axis.set_axis_off()
    colors = COLORS if len(methods) <= len(COLORS) else plt.get_cmap("viridis")(np.linspace(0, 0.9, len(methods)))
    for axis, (tag, title) in zip(axes, titles.items(), strict=False):
        spread = [_draw_method(axis, m, tag, smooth, c) for m, c in zip(methods, colors, strict=False)]
        _dress(axis, tag, title, np.concatenate(spread))
    for axis in axes[max(0, len(titles) - columns) : len(titles)]:
        axis.set_xlabel("step", fontsize=8, color=INK)
    ends = np.array([axis.get_xlim() for axis in axes[: len(titles)]])
    plt.setp(axes[: len(titles)], xlim=(ends[:, 0].min(), ends[:, 1].max()))
    # Matplotlib reads $ as mathematics, and leaves a label with a leading underscore out of the legend.
    labels = [re.sub("^_", " _", method.label.replace("$", r"\$")) for method in methods]
    if len(methods) == 1:
        figure.suptitle(labels[0], fontsize=10, color=INK)
    else:
        lines = [plt.Line2D([], [], color=c, linewidth=2) for c, _ in zip(colors, methods, strict=False)]
        per_row = max(1, int(3.3 * columns * 12 / (max(map(len, labels)) + 6)))
        figure.legend(
            lines, labels, loc="outside upper center", ncols=min(per_row, len(methods)), frameon=False, fontsize=9
        )
    return figure


def _draw_method(axis: Axes, method: Method, tag: str, smooth: int, color) -> np.ndarray:
    """Draws one line, and the band of several runs; returns the values, for the choice of scale."""
    found = [run[tag] for run in method.runs if tag in run]
    if not found:
        return np.empty(0)
    steps = found[0][0]
    for other, _ in found[1:]:
        steps = np.intersect1d(steps, other)
    raw = np.stack([values[np.isin(own, steps)] for own, values in found])
    raw = np.where(np.isfinite(raw), raw, np.nan)
    sparse = tag.startswith("eval/")  # evaluations are many steps apart: drawn as they are, with markers
    width = 1 if sparse else smooth
    smoothed = np.stack([moving_average(values, width) for values in raw])
    mean = smoothed.mean(0)
    marker = "o" if sparse or steps.size == 1 else None
    if len(found) > 1:
        axis.fill_between(steps, smoothed.min(0), smoothed.max(0), color=color, alpha=0.18, linewidth=0)
    elif width > 1:
        axis.plot(steps, raw[0], color=color, alpha=0.25, linewidth=0.8)
    axis.plot(steps, mean, color=color, linewidth=1.6, marker=marker, markersize=3)
    return raw.ravel()


def _dress(axis: Axes, tag: str, title: str, values: np.ndarray) -> None:
    axis.set_title(title, loc="left", fontsize=9, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#AAAAAA")
    axis.tick_params(labelsize=8, colors=INK, length=2)
    axis.tick_params(which="minor", left=False)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    values = values[np.isfinite(values)]
    if tag in LOG_SCALED and values.size and values.min() > 0 and values.max() > 100 * values.min():
        axis.set_yscale("log")
        return
    axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axis.yaxis.set_major_formatter(lambda value, _: re.sub(r"e([-+])0*", r"e\1", f"{value:.6g}"))
    if tag == "trust_region/masked":
        axis.set_ylim(bottom=0)


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over the `width` points around each point, over fewer at the ends; NaN points are left out of it."""
    if width <= 1:
        return values
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(values.size)
    low, high = np.maximum(at - (width - 1) // 2, 0), np.minimum(at + width // 2 + 1, values.size)
    number = count[high] - count[low]
    return np.where(number > 0, (total[high] - total[low]) / np.maximum(number, 1), np.nan)


if __name__ == "__main__":
    run_main(main)

"""What the cells of a survival map show."""

import json
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from dppo_jax.errors import UserError
from dppo_jax.files import Path, make_folder, read_json, write_text
from dppo_jax.statistics import binomial_interval
from dppo_jax.storage.run_config import read_config
from dppo_jax.storage.run_log import read_scalars
from experiments.plot import save
from experiments.plot.runs import method_or_loss
from experiments.study import LAST, THRESHOLDS, by_step, outcome
from experiments.sweep import Run

DRIFT = "mismatch/abs_prob_diff_mean"  # before a step's updates: what the rollout's arithmetic and age make
FIRST = 5  # steps over which it is averaged


def mean_and_interval(values: list[float]) -> list[float]:
    """[mean, low, high]: Student's 95% interval, which is as wide as few seeds ask for."""
    mean, count = float(np.mean(values)), len(values)
    reach = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5) if count > 1 else 0.0
    return [round(x, 5) for x in (mean, mean - reach, mean + reach)]


def name_of(folder: Path, config: dict[str, Any]) -> str:
    """The method or the loss of a run, and its threshold on a divergence if it has one."""
    loss = config["loss"]["name"]
    name, delta = method_or_loss(folder, loss), config["loss_defaults"].get(loss, {}).get("delta_high")
    return name if delta is None else f"{name}, δ {delta:g}"


def names_of(configs: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """The name of every run, with its thresholds where runs of one name differ in them."""
    names = {folder: name_of(folder, config) for folder, config in configs.items()}
    thresholds = {folder: _thresholds(config) for folder, config in configs.items()}
    of_name: dict[str, set[str]] = {}
    for folder, name in names.items():
        of_name.setdefault(name, set()).add(thresholds[folder])
    return {
        folder: name if len(of_name[name]) == 1 else f"{name}, {thresholds[folder]}" for folder, name in names.items()
    }


def _thresholds(config: dict[str, Any]) -> str:
    numbers = config["loss_defaults"].get(config["loss"]["name"], {})
    return ", ".join(f"{key} {number:g}" for key, number in sorted(numbers.items()) if key.startswith(THRESHOLDS))


def cells(workdir: Path) -> list[dict[str, Any]]:
    """One entry for each mismatch, lag, loss and learning rate, with the outcomes of its seeds. Unfinished runs are
    left out; UserError if no run is finished."""
    groups: dict[tuple, list] = {}
    folders = sorted({path.parent for path in workdir.glob("**/seed_*/config.json")})
    if not folders:
        raise UserError(f"{workdir} holds no runs of a survival map; train them first, without --report")
    configs = {folder: read_config(folder) for folder in folders}
    names = names_of(configs)
    for folder, config in configs.items():
        run = read_scalars(folder)
        if len(run["reward/mean"][1]) < config["steps"]:
            continue
        rollout = config["rollout"]
        mismatch = "+".join(filter(None, (rollout["activations"], rollout["weights"]))) or "none"
        rate = float(f"{config['optimizer']['learning_rate']:.2g}")
        groups.setdefault((mismatch, rollout["lag"], names[folder], rate), []).append(run)
    if not groups:
        raise UserError(f"none of the {len(folders)} runs in {workdir} is finished; train them to their end first")
    starts: dict[tuple, list[float]] = {}
    for key, runs in groups.items():
        starts.setdefault(key[:2], []).extend(run["reward/mean"][1][0] for run in runs)
    start = {key: float(np.mean(values)) for key, values in starts.items()}
    return [
        {
            "mismatch": mismatch,
            "lag": lag,
            "loss": loss,
            "learning_rate": rate,
            "seeds": len(runs),
            "start": round(start[mismatch, lag], 4),
            "survived": sum(outcome(run) >= start[mismatch, lag] for run in runs),
            "outcome": mean_and_interval([outcome(run) for run in runs]),
            "abs_prob_diff": float(f"{np.mean([np.mean(by_step(run, DRIFT)[:FIRST]) for run in runs]):.3g}"),
        }
        for (mismatch, lag, loss, rate), runs in sorted(groups.items())
    ]


def edges(workdir: Path, runs: Sequence[Run], seeds: Sequence[int]) -> list[Run]:
    """The same with other seeds, of those losses or methods and rates of which some seeds survive and some do not."""
    scalars = {run: read_scalars(workdir / run.folder) for run in runs}
    start = float(np.mean([found["reward/mean"][1][0] for found in scalars.values()]))
    fates: dict[Run, set[bool]] = {}
    for run, found in scalars.items():
        fates.setdefault(run._replace(seed=0), set()).add(outcome(found) >= start)
    return [run._replace(seed=seed) for run, lived in fates.items() if len(lived) == 2 for seed in seeds]


def _axes(cell_list: list[dict[str, Any]]) -> tuple[list, list, list]:
    """(mismatch, lag) from small to large, losses from the largest share of survivors on, learning rates."""
    drift = {(cell["mismatch"], cell["lag"]): cell["abs_prob_diff"] for cell in cell_list}
    lived: dict[str, list[float]] = {}
    for cell in cell_list:
        lived.setdefault(cell["loss"], []).append(cell["survived"] / cell["seeds"])
    columns = sorted(drift, key=lambda key: (key[1], drift[key]))
    losses = sorted(lived, key=lambda loss: -float(np.mean(lived[loss])))
    return columns, losses, sorted({c["learning_rate"] for c in cell_list})


def markdown(cell_list: list[dict[str, Any]]) -> str:
    """Survivors and mean outcome, a row for each loss and learning rate, and what a count of survivors is worth."""
    columns, losses, rates = _axes(cell_list)
    at = {(c["mismatch"], c["lag"], c["loss"], c["learning_rate"]): c for c in cell_list}
    drift = {(c["mismatch"], c["lag"]): c["abs_prob_diff"] for c in cell_list}
    start = {(c["mismatch"], c["lag"]): c["start"] for c in cell_list}
    heads = [f"{key[0]}, lag {key[1]} ({drift[key]:.0e}, {start[key]:.2f})" for key in columns]
    lines = [
        f"Seeds that survive (mean reward of the last {LAST} steps at least that of the first step) of all seeds, and "
        f"the mean of that reward. In brackets, mean |π − μ| between rollout and updates over the first {FIRST} steps, "
        "and the first reward.",
        "",
        "| loss | learning rate | " + " | ".join(heads) + " |",
        "|---" * (2 + len(heads)) + "|",
    ]
    for loss in losses:
        for rate in rates:
            row = [at.get((*column, loss, rate)) for column in columns]
            if any(row):
                lines.append(f"| `{loss}` | {rate:g} | " + " | ".join(map(_cell, row)) + " |")
    lines += ["", "The chance of survival that a count allows, 95% (exact: Clopper and Pearson, 1934):"]
    for seeds in sorted({c["seeds"] for c in cell_list}):
        found = sorted({c["survived"] for c in cell_list if c["seeds"] == seeds})
        spans = [f"{k}: {low:.2f} to {high:.2f}" for k in found for low, high in [binomial_interval(k, seeds)]]
        lines.append(f"- of {seeds}: " + "; ".join(spans))
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, Any] | None) -> str:
    return "" if cell is None else f"{cell['survived']}/{cell['seeds']} · {cell['outcome'][0]:.2f}"


def draw(cell_list: list[dict[str, Any]], path: Path) -> None:
    """A square for each cell, from red, where no seed survives, to green, where all do; a panel for each mismatch."""
    columns, losses, _ = _axes(cell_list)
    panels = list(dict.fromkeys(mismatch for mismatch, _ in columns))
    of_panel = {
        mismatch: sorted({(c["learning_rate"], c["lag"]) for c in cell_list if c["mismatch"] == mismatch})
        for mismatch in panels
    }
    widths = [len(found) for found in of_panel.values()]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(0.62 * sum(widths) + 2.8, 0.36 * len(losses) + 1.9), squeeze=False,
        layout="constrained", sharey=True, width_ratios=widths,
    )  # fmt: skip
    for axis, mismatch in zip(axes[0], panels, strict=True):
        own = of_panel[mismatch]
        shares = np.full((len(losses), len(own)), np.nan)
        for cell in cell_list:
            if cell["mismatch"] == mismatch:
                y, x = losses.index(cell["loss"]), own.index((cell["learning_rate"], cell["lag"]))
                shares[y, x] = cell["survived"] / cell["seeds"]
                axis.text(x, y, f"{cell['survived']}/{cell['seeds']}", ha="center", va="center", fontsize=8)
        axis.set_facecolor("0.85")  # where nothing was run
        axis.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", alpha=0.85)
        axis.set_xticks(range(len(own)), [f"{lag}\n{rate:g}" for rate, lag in own], fontsize=8)
        axis.set_yticks(range(len(losses)), losses, fontsize=8)
        axis.set_title("rollout unrounded" if mismatch == "none" else f"rollout rounded to {mismatch}", fontsize=9)
    figure.supxlabel("age of the rollout, in updates, and learning rate", fontsize=9)
    figure.suptitle("Runs that survive: green all, red none", fontsize=10)
    save(figure, path)
    plt.close(figure)


def _key(cell: dict[str, Any]) -> tuple[str, int, str, float]:
    return cell["mismatch"], cell["lag"], cell["loss"], cell["learning_rate"]


def report(workdir: Path, out: Path) -> str:
    """Writes map.json, map.md and map.png into `out`; returns the table. Cells of an earlier map there, of which the
    workdir has no runs, stay as they are."""
    earlier = read_json(out / "map.json") if (out / "map.json").exists() else []
    found = {_key(cell): cell for cell in earlier} | {_key(cell): cell for cell in cells(workdir)}
    cell_list = [found[key] for key in sorted(found)]
    text = markdown(cell_list)
    make_folder(out)
    write_text(out / "map.json", json.dumps(cell_list, indent=1) + "\n")
    write_text(out / "map.md", text)
    draw(cell_list, out / "map.png")
    return text

"""What the cells of a survival map show."""

import json
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from dppo_jax.errors import UserError
from dppo_jax.files import Path, make_folder, write_text
from dppo_jax.storage.run_config import read_config
from dppo_jax.storage.run_log import read_scalars
from experiments.plot import save
from experiments.plot.runs import method_or_loss
from experiments.study import LAST, by_step, mean_and_interval, outcome

DRIFT = "mismatch/abs_prob_diff_mean"  # before a step's updates: what the rollout's arithmetic and age make
FIRST = 5  # steps over which it is averaged


def name_of(folder: Path, config: dict[str, Any]) -> str:
    """The method or the loss of a run, and its threshold on a divergence if it has one."""
    loss = config["loss"]["name"]
    name, delta = method_or_loss(folder, loss), config["loss_defaults"].get(loss, {}).get("delta_high")
    return name if delta is None else f"{name}, δ {delta:g}"


def cells(workdir: Path) -> list[dict[str, Any]]:
    """One entry for each mismatch, lag, loss and learning rate, with the outcomes of its seeds. Unfinished runs are
    left out; UserError if no run is finished."""
    groups: dict[tuple, list] = {}
    folders = sorted({path.parent for path in workdir.glob("**/seed_*/config.json")})
    if not folders:
        raise UserError(f"{workdir} holds no runs of a survival map; train them first, without --report")
    for folder in folders:
        config, run = read_config(folder), read_scalars(folder)
        if len(run["reward/mean"][1]) < config["steps"]:
            continue
        rollout = config["rollout"]
        mismatch = "+".join(filter(None, (rollout["activations"], rollout["weights"]))) or "none"
        rate = float(f"{config['optimizer']['learning_rate']:.2g}")
        groups.setdefault((mismatch, rollout["lag"], name_of(folder, config), rate), []).append(run)
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
    """Survivors and mean outcome, a row for each loss and learning rate."""
    columns, losses, rates = _axes(cell_list)
    at = {(c["mismatch"], c["lag"], c["loss"], c["learning_rate"]): c for c in cell_list}
    drift = {(c["mismatch"], c["lag"]): c["abs_prob_diff"] for c in cell_list}
    start = {(c["mismatch"], c["lag"]): c["start"] for c in cell_list}
    heads = [f"{key[0]}, lag {key[1]} ({drift[key]:.0e}, {start[key]:.2f})" for key in columns]
    lines = [
        f"Seeds that survive (mean reward of the last {LAST} steps at least that of the first step) of "
        f"{max(c['seeds'] for c in cell_list)}, and the mean of that reward. In brackets, mean |π − μ| between rollout "
        f"and updates over the first {FIRST} steps, and the first reward.",
        "",
        "| loss | learning rate | " + " | ".join(heads) + " |",
        "|---" * (2 + len(heads)) + "|",
    ]
    for loss in losses:
        for rate in rates:
            row = [at.get((*column, loss, rate)) for column in columns]
            cells = ["" if c is None else f"{c['survived']} · {c['outcome'][0]:.2f}" for c in row]
            lines.append(f"| `{loss}` | {rate:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(cell_list: list[dict[str, Any]], path: Path) -> None:
    """A square for each cell, coloured by the mean outcome, with the number of seeds that survive in it."""
    columns, losses, rates = _axes(cell_list)
    lags = sorted({lag for _, lag in columns})
    figure, panels = plt.subplots(
        len(lags), len(losses), figsize=(2.1 * len(losses) + 1, 1.9 * len(lags) + 0.9), squeeze=False,
        layout="constrained", sharey=True,
    )  # fmt: skip
    image = None
    for row, lag in zip(panels, lags, strict=True):
        names = [mismatch for mismatch, column_lag in columns if column_lag == lag]
        for axis, loss in zip(row, losses, strict=True):
            grid = np.full((len(rates), len(names)), np.nan)
            for cell in cell_list:
                if cell["lag"] == lag and cell["loss"] == loss:
                    y, x = rates.index(cell["learning_rate"]), names.index(cell["mismatch"])
                    grid[y, x] = cell["outcome"][0]
                    axis.text(x, y, f"{cell['survived']}/{cell['seeds']}", ha="center", va="center", fontsize=8)
            image = axis.imshow(grid, cmap="RdYlBu", vmin=0.1, vmax=0.9, origin="lower", aspect="auto")
            axis.set_xticks(range(len(names)), names, fontsize=8)
            axis.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates], fontsize=8)
            if lag == lags[0]:
                axis.set_title(loss.replace(", ", "\n"), fontsize=8)
            if lag == lags[-1]:
                axis.set_xlabel("rollout rounded to", fontsize=8)
        row[0].set_ylabel(f"lag {lag}\nlearning rate", fontsize=8)
    figure.colorbar(image, ax=panels, label=f"mean reward, last {LAST} steps", shrink=0.8)
    save(figure, path)
    plt.close(figure)


def report(workdir: Path, out: Path) -> str:
    """Writes map.json, map.md and map.png into `out`; returns the table."""
    cell_list = cells(workdir)
    text = markdown(cell_list)
    make_folder(out)
    write_text(out / "map.json", json.dumps(cell_list, indent=1) + "\n")
    write_text(out / "map.md", text)
    draw(cell_list, out / "map.png")
    return text

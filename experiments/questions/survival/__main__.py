"""The survival map: mismatch × staleness × learning rate, and which losses live through it.

    python -m experiments.questions.survival --config configs/studies/survival.py --workdir DIR [--mismatch m4 --lag 0]

A cell is a format of the rollout's activations and an age of its parameters; `experiments.sweep` trains every loss or
method, learning rate and seed of it; where some seeds survive and some do not, it trains more of them, up to --edge.
Started again, it goes on. With --report DIR it trains nothing and writes what the cells under --workdir show, beside
what DIR's map has of earlier ones.
"""

import sys

from ml_collections import ConfigDict

from dppo_jax.errors import UserError, run_main
from dppo_jax.files import Path
from experiments.questions.survival.report import edges, report
from experiments.run import cli
from experiments.study import Arm
from experiments.sweep import NAMED, Run, check, make_runs, train

DEFAULT_LOSSES = ("pg_is", "cispo", "clip_higher", "minirl", "dppo_binary_tv", "dppo_binary_tv_proximal")
MISMATCH = ("none", "m2", "m1")  # rollout.activations, and after + rollout.weights, by bits of mantissa
LAGS = (0,)  # rollout.lag, in updates; a rollout batch takes 16
RATES = (0.3, 0.6, 1.0)  # of optimizer.learning_rate; at 3, no loss survives even without mismatch
SEEDS = 6
EDGE = 12  # seeds where six of them do not share a fate


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {
            "--workdir": dict(type=Path, required=True, metavar="DIR", help="a folder for each cell; resumes"),
            **NAMED,
            "--mismatch": dict(
                type=cli.by_commas(), default=MISMATCH, metavar="FORMATS", help="of activations[+weights]"
            ),
            "--lag": dict(type=cli.by_commas(int), default=LAGS, metavar="NUMBERS", help="of rollout.lag"),
            "--rates": dict(type=cli.by_commas(cli.positive), default=RATES, metavar="NUMBERS", help="learning rates"),
            "--scale": dict(type=cli.positive, default=1.0, metavar="X", help="of the losses' thresholds (1)"),
            "--seeds": dict(type=cli.SEEDS, default=SEEDS, metavar="N", help=f"seeds from config.seed on ({SEEDS})"),
            "--edge": dict(type=cli.SEEDS, default=EDGE, metavar="N", help=f"seeds in all where fates differ ({EDGE})"),
            "--report": dict(type=Path, metavar="DIR", help="write map.json, map.md and map.png there"),
        },
    )
    if arguments.report:
        print(report(arguments.workdir, arguments.report), end="")
        return
    if arguments.methods and arguments.scale != 1:
        raise UserError("--scale is of losses, and a method has its own thresholds: give --losses, or no --scale")
    if arguments.edge < arguments.seeds:
        raise UserError(f"--edge must be at least --seeds = {arguments.seeds}, and is a number of seeds in all")
    losses = arguments.losses or (() if arguments.methods else DEFAULT_LOSSES)
    seeds = range(config.seed, config.seed + arguments.seeds)
    runs = make_runs(losses, arguments.methods, arguments.rates, seeds)
    for loss in losses:
        config = Arm(loss, arguments.scale).config(config)
    cells = {
        f"{mismatch}_lag{lag}": cell_config(config, mismatch, lag)
        for lag in arguments.lag
        for mismatch in arguments.mismatch
    }
    for of_cell in cells.values():  # all, before any is trained
        check(of_cell, runs)
    for name, of_cell in cells.items():
        workdir = arguments.workdir / name
        print(f"{name}: {len(runs)} runs", file=sys.stderr)
        train(of_cell, runs, workdir)
        if edge := edges(workdir, runs, range(seeds.stop, config.seed + arguments.edge)):
            print(f"{name}: {len(edge)} runs more, where seeds differ", file=sys.stderr)
            train_edge(of_cell, edge, workdir / "edge")


def train_edge(config: ConfigDict, runs: list[Run], workdir: Path) -> None:
    """Beside the cell's own sweep, which has its checkpoints. UserError where another edge was trained there."""
    there = {str(path.parent.relative_to(workdir)) for path in workdir.glob("*/seed_*/config.json")}
    wanted = {run.folder for run in runs}
    if there and there != wanted:
        raise UserError(
            f"{workdir} has {len(there)} runs of another edge than the {len(wanted)} of --edge and --seeds: give them "
            "as they were, or move the folder away, whose runs are then trained again"
        )
    train(config, runs, workdir)


def cell_config(config: ConfigDict, mismatch: str, lag: int) -> ConfigDict:
    """The config of a cell."""
    of_cell = config.copy_and_resolve_references()
    activations, _, weights = mismatch.replace("none", "").partition("+")
    of_cell.rollout.activations, of_cell.rollout.weights, of_cell.rollout.lag = activations, weights, lag
    return of_cell


if __name__ == "__main__":
    run_main(main)

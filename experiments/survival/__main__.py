"""The survival map: mismatch × staleness × learning rate, and which methods live through it.

    python -m experiments.survival --config configs/studies/survival.py --workdir runs/survival [--mismatch m4 --lag 0]

A cell is a format of the rollout's activations and an age of its parameters; `experiments.sweep` trains every method,
learning rate and seed of it. Started again, it goes on. With --report DIR it trains nothing and writes what the cells
under --workdir show.
"""

import sys
from pathlib import Path

from dppo_jax.checkpoint import Checkpoints
from dppo_jax.errors import UserError, lookup, run_main
from dppo_jax.losses import LOSSES
from experiments import cli
from experiments.study import Arm
from experiments.survival.report import report
from experiments.sweep import Run, Sweep

METHODS = ("pg_is", "cispo", "clip_higher", "minirl", "dppo_binary_tv", "dppo_binary_tv_proximal")
MISMATCH = ("none", "m2", "m1")  # rollout.activations, and after + rollout.weights, by bits of mantissa
LAGS = ("0",)  # rollout.lag, in updates; a rollout batch takes 16
RATES = ("0.3", "0.6", "1")  # of optimizer.learning_rate; at 3, no method survives even without mismatch
SEEDS = 6


def listed(text: str, option: str, kind=str) -> list:
    """The items of a comma-separated option."""
    try:
        return [kind(item) for item in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r} is not a list of numbers, such as 0,16") from None


def main() -> None:
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {
            "--workdir": dict(type=Path, required=True, metavar="DIR", help="a folder for each cell; resumes"),
            "--methods": dict(default=",".join(METHODS), metavar="NAMES", help="losses, by commas"),
            "--mismatch": dict(default=",".join(MISMATCH), metavar="FORMATS", help="of activations[+weights]"),
            "--lag": dict(default=",".join(LAGS), metavar="NUMBERS", help="of rollout.lag"),
            "--rates": dict(default=",".join(RATES), metavar="NUMBERS", help="factors of optimizer.learning_rate"),
            "--scale": dict(type=float, default=1.0, metavar="X", help="of the methods' thresholds (1)"),
            "--seeds": dict(type=int, default=SEEDS, metavar="N", help=f"seeds from config.seed on ({SEEDS})"),
            "--report": dict(type=Path, metavar="DIR", help="write map.json, map.md and map.png there"),
        },
    )
    if arguments.report:
        print(report(arguments.workdir, arguments.report), end="")
        return
    if arguments.seeds < 1:
        raise UserError(f"--seeds must be at least 1, not {arguments.seeds}")
    methods = listed(arguments.methods, "--methods")
    for method in methods:
        lookup(LOSSES, method, "--methods")
        config = Arm(method, arguments.scale).config(config)
    runs = [
        Run(method, seed, rate)
        for method in methods
        for rate in listed(arguments.rates, "--rates", float)
        for seed in range(config.seed, config.seed + arguments.seeds)
    ]
    for lag in listed(arguments.lag, "--lag", int):
        for mismatch in listed(arguments.mismatch, "--mismatch"):
            own = config.copy_and_resolve_references()
            activations, _, weights = mismatch.replace("none", "").partition("+")
            own.rollout.activations, own.rollout.weights, own.rollout.lag = activations, weights, lag
            workdir = arguments.workdir / f"{mismatch}_lag{lag}"
            with Checkpoints(workdir, keep=1) as checkpoints:
                if checkpoints.latest() == config.steps:
                    continue
            print(f"{workdir.name}: {len(runs)} runs", file=sys.stderr)
            sweep = Sweep(own, runs, workdir)
            try:
                sweep.train()
            finally:
                sweep.close()


if __name__ == "__main__":
    run_main(main)

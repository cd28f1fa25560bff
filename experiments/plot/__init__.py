"""The paper's panels from the logs of one or more runs.

    python -m experiments.plot --runs runs/a runs/b --out curves.png [--smooth 5] [--group loss.delta_low]

One panel per quantity that any run logged, and a curve for each config. Runs whose config.json differs in the seed
only are one curve: their mean, in its 95% bootstrap interval. A curve is named by one key of the config, or by the
method that a sweep trained.
"""

from experiments.plot.command import main
from experiments.plot.curves import bootstrap_interval, exponential_average, moving_average
from experiments.plot.figure import draw, save
from experiments.plot.runs import Curve, group_runs

__all__ = [
    "Curve", "bootstrap_interval", "draw", "exponential_average", "group_runs", "main", "moving_average", "save",
]  # fmt: skip

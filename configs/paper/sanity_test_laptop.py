"""The paper's sanity test in miniature, for a laptop: problems that the policy can solve, and every loss's curve.

    python -m experiments.train --config configs/paper/sanity_test_laptop.py --workdir runs/sanity_laptop
    ... --config.loss.name=pg_is, or any other row of LOSSES

The embedded model and its sums in place of a 1.5B model and MATH; thresholds, caps and losses are sanity_test's. Half a
minute a run on two CPU cores.
"""

from configs import quickstart
from configs.paper import sanity_test


def get_config():
    c = quickstart.get_config()
    c.loss_defaults = sanity_test.get_config().loss_defaults
    c.steps = 20
    return c

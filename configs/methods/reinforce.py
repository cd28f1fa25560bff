"""REINFORCE (Williams, 1992), on the embedded default.

One update a batch: the data is on-policy. No baseline: `reward` is R itself.

    python -m experiments.train --config configs/methods/reinforce.py --workdir runs/reinforce
"""

from configs import quickstart

METHOD = {
    "title": "REINFORCE",
    "formula": "A",
    "masked": "none",
    "cap": "–",
    "anchor": "none",
    "source": "Williams, 1992",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "reinforce"
    c.advantage.name = "reward"
    c.aggregation.name = "seq_mean_token_sum"
    c.train.epochs = c.train.minibatches = 1
    return c

"""RLOO (Ahmadian et al., 2402.14740, equation 6), on the embedded default.

The paper: 2 or 4 responses to a prompt, whole responses as actions, on-policy; its KL penalty is part of the
reward.

    python -m experiments.train --config configs/methods/rloo.py --workdir runs/rloo
"""

from configs import quickstart

METHOD = {
    "title": "RLOO",
    "formula": "A",
    "masked": "none",
    "cap": "–",
    "anchor": "none",
    "source": "Ahmadian et al., 2402.14740, equation 6",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "reinforce"
    c.advantage.name = "leave_one_out"
    c.aggregation.name = "seq_mean_token_sum"
    c.train.epochs = c.train.minibatches = 1
    return c

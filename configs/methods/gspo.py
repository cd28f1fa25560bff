"""GSPO (Zheng et al., 2507.18071, equations 5 to 7), on the embedded default.

The paper: ε 3e-4 and 4e-4, 4 minibatches.

    python -m experiments.train --config configs/methods/gspo.py --workdir runs/gspo
"""

from configs import quickstart

METHOD = {
    "title": "GSPO",
    "formula": "M s A, s = exp(mean log r)",
    "masked": "A>0: s > 1+ε_high; A<0: s < 1−ε_low",
    "cap": "∞",
    "anchor": "behavior",
    "source": "Zheng et al., 2507.18071, equations 5 to 7",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "gspo"
    c.advantage.name = "group_mean_std"
    c.aggregation.name = "seq_mean_token_mean"
    return c

"""Trust-region masking, mean divergence (Li et al., 2512.23075), on the embedded default.

δ 0.01 is ours.

    python -m experiments.train --config configs/methods/trm_mean.py --workdir runs/trm_mean
"""

from configs import quickstart

METHOD = {
    "title": "Trust-region masking, mean divergence",
    "formula": "M min(r, C) A",
    "masked": "the response where mean (r−1−log r) > δ",
    "cap": "5",
    "anchor": "behavior",
    "source": "Li et al., 2512.23075",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "trm_mean"
    return c

"""Trust-region masking, largest divergence (Li et al., 2512.23075), on the embedded default.

δ 0.25 is ours.

    python -m experiments.train --config configs/methods/trm_max.py --workdir runs/trm_max
"""

from configs import quickstart

METHOD = {
    "title": "Trust-region masking, largest divergence",
    "formula": "M min(r, C) A",
    "masked": "the response where max log(r)²/2 > δ",
    "cap": "5",
    "anchor": "behavior",
    "source": "Li et al., 2512.23075",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "trm_max"
    return c

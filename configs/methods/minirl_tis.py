"""MiniRL-TIS (Qi et al., 2602.04879, section 5), on the embedded default.

As MiniRL, with a truncated weight.

    python -m experiments.train --config configs/methods/minirl_tis.py --workdir runs/minirl_tis
"""

from configs import quickstart

METHOD = {
    "title": "MiniRL-TIS",
    "formula": "M min(r, C) A",
    "masked": "A>0: π/π′ > 1+ε_high; A<0: π/π′ < 1−ε_low",
    "cap": "3",
    "anchor": "proximal",
    "source": "Qi et al., 2602.04879, section 5",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "minirl_tis"
    return c

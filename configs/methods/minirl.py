"""MiniRL (Qi et al., 2602.04879, section 5), on the embedded default.

The mask on the recomputed policy, the weight on the behavior policy.

    python -m experiments.train --config configs/methods/minirl.py --workdir runs/minirl
"""

from configs import quickstart

METHOD = {
    "title": "MiniRL",
    "formula": "M min(r, C) A",
    "masked": "A>0: π/π′ > 1+ε_high; A<0: π/π′ < 1−ε_low",
    "cap": "∞",
    "anchor": "proximal",
    "source": "Qi et al., 2602.04879, section 5",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "minirl"
    return c

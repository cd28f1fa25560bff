"""MaxRL (Tajwar et al., 2602.02710), on the embedded default.

For rewards of 0 and 1. The clip is PPO's: the advantage is the method.

    python -m experiments.train --config configs/methods/max_rl.py --workdir runs/max_rl
"""

from configs import quickstart

METHOD = {
    "title": "MaxRL",
    "formula": "M min(r, C) A with A = (R−mean)/mean",
    "masked": "A>0: r > 1+ε_high; A<0: r < 1−ε_low",
    "cap": "∞",
    "anchor": "behavior",
    "source": "Tajwar et al., 2602.02710",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "ppo_clip"
    c.loss.ratio_cap = float("inf")
    c.advantage.name = "max_rl"
    return c

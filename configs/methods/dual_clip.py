"""Dual-clip PPO (Ye et al., 1912.09729, equation 5), on the embedded default.

c 3, ε 0.2.

    python -m experiments.train --config configs/methods/dual_clip.py --workdir runs/dual_clip
"""

from configs import quickstart

METHOD = {
    "title": "Dual-clip PPO",
    "formula": "M min(r, C) A",
    "masked": "PPO's, and A<0: r > c",
    "cap": "∞",
    "anchor": "behavior",
    "source": "Ye et al., 1912.09729, equation 5",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "dual_clip"
    c.advantage.name = "group_mean_std"
    return c

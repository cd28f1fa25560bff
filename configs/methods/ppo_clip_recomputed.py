"""PPO on the recomputed policy (PPO, 1707.06347, equation 7, on π′), on the embedded default.

The mismatch π′/μ is left uncorrected: the control of the next five.

    python -m experiments.train --config configs/methods/ppo_clip_recomputed.py --workdir runs/ppo_clip_recomputed
"""

from configs import quickstart

METHOD = {
    "title": "PPO on the recomputed policy",
    "formula": "M min(π/π′, C) A",
    "masked": "A>0: π/π′ > 1+ε_high; A<0: π/π′ < 1−ε_low",
    "cap": "∞",
    "anchor": "proximal",
    "source": "PPO, 1707.06347, equation 7, on π′",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "ppo_clip_recomputed"
    c.advantage.name = "group_mean_std"
    return c

"""DAPO (Yu et al., 2503.14476, equations 8 to 13), on the embedded default.

The paper: learning rate 1e-6, 512 prompts × 16, 16 updates a batch, 4,096 of 20,480 tokens as the buffer.

    python -m experiments.train --config configs/methods/dapo.py --workdir runs/dapo
"""

from configs import quickstart

METHOD = {
    "title": "DAPO",
    "formula": "M min(r, C) A",
    "masked": "A>0: r > 1+ε_high; A<0: r < 1−ε_low",
    "cap": "∞",
    "anchor": "behavior",
    "source": "Yu et al., 2503.14476, equations 8 to 13",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "clip_higher"
    c.loss.eps_low, c.loss.eps_high = 0.2, 0.28
    c.loss.ratio_cap = float("inf")
    c.advantage.name = "group_mean_std"
    c.rollout.resample = 8
    c.reward.overlong_buffer = c.rollout.max_new_tokens // 5
    return c

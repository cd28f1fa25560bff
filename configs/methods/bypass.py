"""Bypass: rollout log-probabilities as the old policy (PPO, 1707.06347, equation 7, on μ), on the embedded default.

No pass at the rollout's parameters: the ratio holds staleness and mismatch alike.

    python -m experiments.train --config configs/methods/bypass.py --workdir runs/bypass
"""

from configs import quickstart

METHOD = {
    "title": "Bypass: rollout log-probabilities as the old policy",
    "formula": "M min(r, C) A",
    "masked": "A>0: r > 1+ε_high; A<0: r < 1−ε_low",
    "cap": "5",
    "anchor": "behavior",
    "source": "PPO, 1707.06347, equation 7, on μ",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "bypass"
    c.advantage.name = "group_mean_std"
    return c

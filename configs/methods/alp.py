"""Adaptive layerwise perturbation (Ye et al., 2603.19470), on the embedded default.

Gaussian noise on every layer's input in training; σ per layer is learned. In place of corrections by π′, not beside
them.

    python -m experiments.train --config configs/methods/alp.py --workdir runs/alp
"""

from configs import quickstart

METHOD = {
    "title": "Adaptive layerwise perturbation",
    "formula": "M min(r, C) A with a perturbed π",
    "masked": "A>0: r > 1+ε_high; A<0: r < 1−ε_low",
    "cap": "5",
    "anchor": "behavior",
    "source": "Ye et al., 2603.19470",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "ppo_clip"
    c.advantage.name = "group_mean_std"
    c.alp.sigma = 1e-3  # ours, as the learning rate of log sigma
    return c

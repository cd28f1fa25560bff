"""PPO with a critic (Schulman et al., 1707.06347, equation 7; GAE, 1506.02438), on the embedded default.

The paper: ε 0.2, λ 0.95, discount 0.99 (1 here: the reward comes once, at the end).

    python -m experiments.train --config configs/methods/ppo.py --workdir runs/ppo
"""

from configs import quickstart

METHOD = {
    "title": "PPO with a critic",
    "formula": "M min(r, C) A",
    "masked": "A>0: r > 1+ε_high; A<0: r < 1−ε_low",
    "cap": "∞",
    "anchor": "behavior",
    "source": "Schulman et al., 1707.06347, equation 7; GAE, 1506.02438",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "ppo_clip"
    c.loss.ratio_cap = float("inf")
    c.advantage.name = "gae"
    c.critic.learning_rate = 1e-3  # a value head from zero, in few steps
    return c

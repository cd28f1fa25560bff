"""Token-level truncated importance sampling (Yao et al., 2025, Your efficient RL framework secretly brings you off-
policy RL training), on the embedded default.

ρ = π′/μ.

    python -m experiments.train --config configs/methods/token_tis.py --workdir runs/token_tis
"""

from configs import quickstart

METHOD = {
    "title": "Token-level truncated importance sampling",
    "formula": "M (π/π′) min(ρ, C) A",
    "masked": "PPO's on π/π′",
    "cap": "2",
    "anchor": "proximal",
    "source": "Yao et al., 2025, Your efficient RL framework secretly brings you off-policy RL training",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "token_tis"
    c.advantage.name = "group_mean_std"
    return c

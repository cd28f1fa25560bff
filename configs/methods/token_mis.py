"""Token-level masked importance sampling (Liu, Li et al., 2025, When speed kills stability), on the embedded
default.

C 2.

    python -m experiments.train --config configs/methods/token_mis.py --workdir runs/token_mis
"""

from configs import quickstart

METHOD = {
    "title": "Token-level masked importance sampling",
    "formula": "M (π/π′) ρ A",
    "masked": "PPO's on π/π′, and ρ > C",
    "cap": "–",
    "anchor": "proximal",
    "source": "Liu, Li et al., 2025, When speed kills stability",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "token_mis"
    c.advantage.name = "group_mean_std"
    return c

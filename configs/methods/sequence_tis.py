"""Sequence-level truncated importance sampling (Liu, Li et al., 2025, When speed kills stability), on the embedded
default.

ρ = π′/μ; the product over the response.

    python -m experiments.train --config configs/methods/sequence_tis.py --workdir runs/sequence_tis
"""

from configs import quickstart

METHOD = {
    "title": "Sequence-level truncated importance sampling",
    "formula": "M (π/π′) min(Πρ, C) A",
    "masked": "PPO's on π/π′",
    "cap": "2",
    "anchor": "proximal",
    "source": "Liu, Li et al., 2025, When speed kills stability",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "sequence_tis"
    c.advantage.name = "group_mean_std"
    return c

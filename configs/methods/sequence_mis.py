"""Sequence-level masked importance sampling (Liu, Li et al., 2025, When speed kills stability), on the embedded
default.

C 2; a whole response is dropped.

    python -m experiments.train --config configs/methods/sequence_mis.py --workdir runs/sequence_mis
"""

from configs import quickstart

METHOD = {
    "title": "Sequence-level masked importance sampling",
    "formula": "M (π/π′) Πρ A",
    "masked": "PPO's on π/π′, and Πρ > C",
    "cap": "–",
    "anchor": "proximal",
    "source": "Liu, Li et al., 2025, When speed kills stability",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "sequence_mis"
    c.advantage.name = "group_mean_std"
    return c

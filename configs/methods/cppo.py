"""CPPO (Mao et al., 2606.10968, equations 8 to 11), on the embedded default.

δ 0.2, budget 0.02, weights from 1 down to 0.8.

    python -m experiments.train --config configs/methods/cppo.py --workdir runs/cppo
"""

from configs import quickstart

METHOD = {
    "title": "CPPO",
    "formula": "M min(r, C) A",
    "masked": "A(r−1) > 0 and w_t|π−μ| > min(δ, what the prefix has left)",
    "cap": "5",
    "anchor": "behavior",
    "source": "Mao et al., 2606.10968, equations 8 to 11",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "cppo"
    return c

"""DRPO (Yao et al., 2606.09821, table 1), on the embedded default.

δ 12.5: section 4 of the paper; at that size it is nearly PG-IS on single probabilities.

    python -m experiments.train --config configs/methods/drpo.py --workdir runs/drpo
"""

from configs import quickstart

METHOD = {
    "title": "DRPO",
    "formula": "min(r, C) A [1 − sign(A)(π−μ)/δ]",
    "masked": "none: a linear weight",
    "cap": "∞",
    "anchor": "behavior",
    "source": "Yao et al., 2606.09821, table 1",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "drpo"
    return c

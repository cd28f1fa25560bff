"""DPPO, exact TV (what 2602.04879 estimates), on the embedded default.

δ 0.2: that of its estimates. Costs one more forward pass and two more through the head.

    python -m experiments.train --config configs/methods/dppo_exact_tv.py --workdir runs/dppo_exact_tv
"""

from configs import quickstart

METHOD = {
    "title": "DPPO, exact TV",
    "formula": "M min(r, C) A",
    "masked": "moving away and TV over the vocabulary > δ",
    "cap": "5",
    "anchor": "behavior",
    "source": "what 2602.04879 estimates",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "dppo_exact_tv"
    return c

"""DPPO, exact KL (what 2602.04879 estimates), on the embedded default.

δ 0.05: that of its estimates. Costs one more forward pass and two more through the head.

    python -m experiments.train --config configs/methods/dppo_exact_kl.py --workdir runs/dppo_exact_kl
"""

from configs import quickstart

METHOD = {
    "title": "DPPO, exact KL",
    "formula": "M min(r, C) A",
    "masked": "moving away and KL over the vocabulary > δ",
    "cap": "5",
    "anchor": "behavior",
    "source": "what 2602.04879 estimates",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "dppo_exact_kl"
    return c

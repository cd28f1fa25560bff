"""DPPO, binary KL, recomputed anchor (Qi et al., 2602.04879, section 5.2), on the embedded default.

The ablation of the anchor (Figure 4).

    python -m experiments.train --config configs/methods/dppo_binary_kl_proximal.py --workdir DIR
"""

from configs import quickstart

METHOD = {
    "title": "DPPO, binary KL, recomputed anchor",
    "formula": "M min(r, C) A",
    "masked": "moving away from π′ and its KL(Bern π′‖Bern π) > δ",
    "cap": "5",
    "anchor": "proximal",
    "source": "Qi et al., 2602.04879, section 5.2",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "dppo_binary_kl_proximal"
    return c

"""DPPO, binary TV, recomputed anchor (Qi et al., 2602.04879, section 5.2), on the embedded default.

The ablation of the anchor (Figure 4).

    python -m experiments.train --config configs/methods/dppo_binary_tv_proximal.py --workdir DIR
"""

from configs import quickstart

METHOD = {
    "title": "DPPO, binary TV, recomputed anchor",
    "formula": "M min(r, C) A",
    "masked": "moving away from π′ and its |π−π′| of the sampled token > δ",
    "cap": "5",
    "anchor": "proximal",
    "source": "Qi et al., 2602.04879, section 5.2",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "dppo_binary_tv_proximal"
    return c

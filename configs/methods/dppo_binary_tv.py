"""DPPO, binary TV (Qi et al., 2602.04879, section 4), on the embedded default.

δ 0.2, cap 5: section 7 and appendix E.

    python -m experiments.train --config configs/methods/dppo_binary_tv.py --workdir runs/dppo_binary_tv
"""

from configs import quickstart

METHOD = {
    "title": "DPPO, binary TV",
    "formula": "M min(r, C) A",
    "masked": "moving away and |π−μ| of the sampled token > δ",
    "cap": "5",
    "anchor": "behavior",
    "source": "Qi et al., 2602.04879, section 4",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "dppo_binary_tv"
    return c

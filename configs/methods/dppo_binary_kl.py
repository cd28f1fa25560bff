"""DPPO, binary KL (Qi et al., 2602.04879, section 4), on the embedded default.

δ 0.05, cap 5: section 7 and appendix E.

    python -m experiments.train --config configs/methods/dppo_binary_kl.py --workdir runs/dppo_binary_kl
"""

from configs import quickstart

METHOD = {
    "title": "DPPO, binary KL",
    "formula": "M min(r, C) A",
    "masked": "moving away and KL(Bern μ‖Bern π) > δ",
    "cap": "5",
    "anchor": "behavior",
    "source": "Qi et al., 2602.04879, section 4",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "dppo_binary_kl"
    return c

"""Relaxed clip, both (Qi et al., 2602.04879, section 6), on the embedded default.

Which bound holds back low-probability tokens (Figures 6 and 7).

    python -m experiments.train --config configs/methods/relax_both.py --workdir runs/relax_both
"""

from configs import quickstart

METHOD = {
    "title": "Relaxed clip, both",
    "formula": "M min(r, C) A",
    "masked": "Clip-Higher's, its bounds lifted where μ < α",
    "cap": "5",
    "anchor": "behavior",
    "source": "Qi et al., 2602.04879, section 6",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "relax_both"
    c.loss.alpha = 0.1  # ours: the paper sweeps it
    return c

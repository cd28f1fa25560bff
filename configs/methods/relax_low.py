"""Relaxed clip, lower (Qi et al., 2602.04879, section 6), on the embedded default.

Which bound holds back low-probability tokens (Figures 6 and 7).

    python -m experiments.train --config configs/methods/relax_low.py --workdir runs/relax_low
"""

from configs import quickstart

METHOD = {
    "title": "Relaxed clip, lower",
    "formula": "M min(r, C) A",
    "masked": "Clip-Higher's, its lower bound lifted where μ < α",
    "cap": "5",
    "anchor": "behavior",
    "source": "Qi et al., 2602.04879, section 6",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "relax_low"
    c.loss.alpha = 0.1  # ours: the paper sweeps it
    return c

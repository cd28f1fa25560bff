"""Relaxed clip, upper (Qi et al., 2602.04879, section 6), on the embedded default.

Which bound holds back low-probability tokens (Figures 6 and 7).

    python -m experiments.train --config configs/methods/relax_high.py --workdir runs/relax_high
"""

from configs import quickstart

METHOD = {
    "title": "Relaxed clip, upper",
    "formula": "M min(r, C) A",
    "masked": "Clip-Higher's, its upper bound lifted where μ < α",
    "cap": "5",
    "anchor": "behavior",
    "source": "Qi et al., 2602.04879, section 6",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "relax_high"
    c.loss.alpha = 0.1  # ours: the paper sweeps it
    return c

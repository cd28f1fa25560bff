"""Minimal mask (Qi et al., 2602.04879, section 5.3), on the embedded default.

δ 0.5; the paper's 0.8 fails.

    python -m experiments.train --config configs/methods/minimal_mask.py --workdir runs/minimal_mask
"""

from configs import quickstart

METHOD = {
    "title": "Minimal mask",
    "formula": "M min(r, C) A",
    "masked": "A<0: μ−π ≥ δ",
    "cap": "5",
    "anchor": "behavior",
    "source": "Qi et al., 2602.04879, section 5.3",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "minimal_mask"
    return c

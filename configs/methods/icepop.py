"""IcePop (Ring-1T, 2510.18855), on the embedded default.

The report: bounds 0.5 and 5.

    python -m experiments.train --config configs/methods/icepop.py --workdir runs/icepop
"""

from configs import quickstart

METHOD = {
    "title": "IcePop",
    "formula": "M (π/π′) ρ A",
    "masked": "PPO's on π/π′, and ρ outside [0.5, 5]",
    "cap": "–",
    "anchor": "proximal",
    "source": "Ring-1T, 2510.18855",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "icepop"
    c.advantage.name = "group_mean_std"
    return c

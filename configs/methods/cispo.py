"""CISPO (PG-TIS) (MiniMax-M1, 2506.13585, equations 4 and 5), on the embedded default.

The report gives no number for the cap; 5 is that of 2602.04879, section 7.

    python -m experiments.train --config configs/methods/cispo.py --workdir runs/cispo
"""

from configs import quickstart

METHOD = {
    "title": "CISPO (PG-TIS)",
    "formula": "min(r, C) A",
    "masked": "none",
    "cap": "5",
    "anchor": "behavior",
    "source": "MiniMax-M1, 2506.13585, equations 4 and 5",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "cispo"
    c.loss.ratio_cap = 5.0
    c.advantage.name = "group_mean_std"
    return c

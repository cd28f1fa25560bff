"""PG-TIS (Qi et al., 2602.04879, section 5), on the embedded default.

The ablation without a trust region, with section 5's cap.

    python -m experiments.train --config configs/methods/pg_tis.py --workdir runs/pg_tis
"""

from configs import quickstart

METHOD = {
    "title": "PG-TIS",
    "formula": "min(r, C) A",
    "masked": "none",
    "cap": "3",
    "anchor": "behavior",
    "source": "Qi et al., 2602.04879, section 5",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "cispo"
    c.loss.ratio_cap = 3.0
    return c

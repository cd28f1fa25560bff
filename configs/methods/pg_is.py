"""PG-IS (Qi et al., 2602.04879, section 5), on the embedded default.

The ablation without a trust region and without truncation.

    python -m experiments.train --config configs/methods/pg_is.py --workdir runs/pg_is
"""

from configs import quickstart

METHOD = {
    "title": "PG-IS",
    "formula": "r A",
    "masked": "none",
    "cap": "∞",
    "anchor": "behavior",
    "source": "Qi et al., 2602.04879, section 5",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "pg_is"
    return c

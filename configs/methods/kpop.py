"""KPop (both binary KLs, sign-free), on the embedded default.

δ 0.1.

    python -m experiments.train --config configs/methods/kpop.py --workdir runs/kpop
"""

from configs import quickstart

METHOD = {
    "title": "KPop",
    "formula": "M min(r, C) A",
    "masked": "KL(Bern μ‖Bern π) > δ or KL(Bern π‖Bern μ) > δ",
    "cap": "5",
    "anchor": "behavior",
    "source": "both binary KLs, sign-free",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "kpop"
    return c

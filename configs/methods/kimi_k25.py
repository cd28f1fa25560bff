"""Kimi K2.5's loss (Kimi K2.5 technical report, 2026), on the embedded default.

The report gives no numbers; ours are ε 0.5 and 1, τ 1e-3.

    python -m experiments.train --config configs/methods/kimi_k25.py --workdir runs/kimi_k25
"""

from configs import quickstart

METHOD = {
    "title": "Kimi K2.5's loss",
    "formula": "M r A − 2τ log r",
    "masked": "r outside [1−ε_low, 1+ε_high]",
    "cap": "–",
    "anchor": "behavior",
    "source": "Kimi K2.5 technical report, 2026",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "kimi_k25"
    return c

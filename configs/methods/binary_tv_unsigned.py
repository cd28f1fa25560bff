"""Binary TV without the sign of A (the rule of prime-rl's IPO loss), on the embedded default.

δ 0.2, as the signed one; prime-rl has 0.3.

    python -m experiments.train --config configs/methods/binary_tv_unsigned.py --workdir runs/binary_tv_unsigned
"""

from configs import quickstart

METHOD = {
    "title": "Binary TV without the sign of A",
    "formula": "M min(r, C) A",
    "masked": "|π−μ| > δ",
    "cap": "5",
    "anchor": "behavior",
    "source": "the rule of prime-rl's IPO loss",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "binary_tv_unsigned"
    return c

"""GRPO with Clip-Higher (DAPO, 2503.14476, equation 10; 2602.04879, section 7), on the embedded default.

The baseline of 2602.04879, with its numbers.

    python -m experiments.train --config configs/methods/clip_higher.py --workdir runs/clip_higher
"""

from configs import quickstart

METHOD = {
    "title": "GRPO with Clip-Higher",
    "formula": "M min(r, C) A",
    "masked": "A>0: r > 1+ε_high; A<0: r < 1−ε_low",
    "cap": "5",
    "anchor": "behavior",
    "source": "DAPO, 2503.14476, equation 10; 2602.04879, section 7",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "clip_higher"
    c.loss.eps_low, c.loss.eps_high = 0.2, 0.27
    return c

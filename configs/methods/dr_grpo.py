"""Dr. GRPO (Liu et al., 2503.20783, section 3.2), on the embedded default.

The paper: no standard deviation, a fixed denominator, no reference, learning rate 1e-6, 8 responses, 128 questions.

    python -m experiments.train --config configs/methods/dr_grpo.py --workdir runs/dr_grpo
"""

from configs import quickstart

METHOD = {
    "title": "Dr. GRPO",
    "formula": "M min(r, C) A",
    "masked": "A>0: r > 1+ε_high; A<0: r < 1−ε_low",
    "cap": "∞",
    "anchor": "behavior",
    "source": "Liu et al., 2503.20783, section 3.2",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "ppo_clip"
    c.loss.ratio_cap = float("inf")
    c.aggregation.name = "seq_sum_const"
    c.aggregation.constant = float(c.rollout.max_new_tokens)
    return c

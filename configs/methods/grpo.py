"""GRPO (Shao et al., 2402.03300, equations 3 and 4), on the embedded default.

The paper: learning rate 1e-6, 64 responses to a question, batches of 1,024, β 0.04, one update a batch.

    python -m experiments.train --config configs/methods/grpo.py --workdir runs/grpo
"""

from configs import quickstart

METHOD = {
    "title": "GRPO",
    "formula": "M min(r, C) A + β(ref/π − 1)",
    "masked": "A>0: r > 1+ε_high; A<0: r < 1−ε_low",
    "cap": "∞",
    "anchor": "behavior",
    "source": "Shao et al., 2402.03300, equations 3 and 4",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "ppo_clip"
    c.loss.ratio_cap = float("inf")
    c.advantage.name = "group_mean_std"
    c.aggregation.name = "seq_mean_token_mean"
    c.reference.coef = 0.04
    return c

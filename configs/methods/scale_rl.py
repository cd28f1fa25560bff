"""ScaleRL (Khatri et al., 2510.13786, section 4), on the embedded default.

The paper: learning rate 5e-7, 48 prompts × 16, 8 batches off-policy (train.staleness has 1).

    python -m experiments.train --config configs/methods/scale_rl.py --workdir runs/scale_rl
"""

from configs import quickstart

METHOD = {
    "title": "ScaleRL",
    "formula": "min(r, C) A",
    "masked": "none",
    "cap": "5",
    "anchor": "behavior",
    "source": "Khatri et al., 2510.13786, section 4",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "cispo"
    c.loss.ratio_cap = 5.0  # the paper: 4 to 8
    c.advantage.name = "batch_norm"
    c.advantage.drop_equal = True
    c.aggregation.name = "prompt_mean_token_mean"
    c.policy.head_float32 = True
    return c

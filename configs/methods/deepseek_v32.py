"""DeepSeek-V3.2's off-policy sequence mask (2512.02556, section 3.1), on the embedded default.

The report gives no δ; 0.1 is ours.

    python -m experiments.train --config configs/methods/deepseek_v32.py --workdir runs/deepseek_v32
"""

from configs import quickstart

METHOD = {
    "title": "DeepSeek-V3.2's off-policy sequence mask",
    "formula": "M min(r, C) A",
    "masked": "PPO's, and the response where A<0 and mean log(μ/π) > δ",
    "cap": "∞",
    "anchor": "behavior",
    "source": "2512.02556, section 3.1",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "deepseek_v32"
    c.advantage.name = "group_mean_std"
    return c

"""The paper's MoE Thinking run (2602.04879, section 7 and appendix E, table 1): Qwen3-30B-A3B, from its chat template.

    python -m experiments.train --config configs/paper/moe_thinking.py --workdir runs/moe_thinking --distributed

As moe_base in all else: mesh, memory and time are what that file says, of programs of the same shapes.
"""

from configs.paper import moe_base


def get_config():
    c = moe_base.get_config()
    c.policy.path = "models/Qwen3-30B-A3B"
    c.policy.shape = "configs/paper/qwen3_30b_a3b.json"  # typed by hand; policy.path wins
    c.data.chat = True
    c.eval.sets.aime24.chat = True
    return c

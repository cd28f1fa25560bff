"""The paper's MoE Base run with rollout router replay (2602.04879, appendix E, table 1): as moe_base, and R3.

    python -m experiments.train --config configs/paper/moe_base_r3.py --workdir runs/moe_base_r3 --distributed

Training sends every token through the experts that the rollout chose. Memory and time as moe_base's, and 384 bytes a
token for the experts, one each of 48 layers x 8.
"""

from configs.paper import moe_base


def get_config():
    c = moe_base.get_config()
    c.rollout.router_replay = True
    return c

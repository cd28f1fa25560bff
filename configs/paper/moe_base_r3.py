"""The paper's MoE Base run with rollout router replay (2602.04879, appendix E, table 1): as moe_base, and R3.

    python -m experiments.train --config configs/paper/moe_base_r3.py --workdir runs/moe_base_r3 --distributed

Training sends every token through the experts that the rollout chose: 384 bytes a token, one each of 48 layers x 8.
The mesh is for v5p:4x4x4: 19.2 GiB a chip in training, 68.1 in the rollout, of 95.7; 300 steps, every response as long
as it may be, take 105 hours without evaluation. Estimates of experiments.compile_for_tpu (docs/pods.md), not made at
shorter lengths. For v6e:8x8, what moe_base says.
"""

from configs.paper import moe_base


def get_config():
    c = moe_base.get_config()
    c.rollout.router_replay = True
    return c

"""The paper's smaller run on OctoThinker-3B-Hybrid-Base (2602.04879), with the settings of dense_base.

    python -m experiments.train --config configs/paper/octothinker_3b.py --workdir runs/octothinker --distributed

The mesh is for v5p:2x2x4, and for v6e:4x4; memory and time: compile_for_tpu says, we did not ask it.
Batch, lengths and thresholds are dense_base's: the paper's table is of the five large runs.
"""

from configs.paper import dense_base


def get_config():
    c = dense_base.get_config()
    c.policy.path = "models/OctoThinker-3B-Hybrid-Base"
    c.policy.shape = "configs/paper/octothinker_3b_hybrid_base.json"  # of Llama-3.2-3B, by hand; policy.path wins
    c.mesh.fsdp = 8
    c.mesh.tensor = 2
    return c

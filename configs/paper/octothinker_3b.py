"""The paper's smaller run on OctoThinker-3B-Hybrid-Base (2602.04879), with the settings of dense_base.

    python -m experiments.train --config configs/paper/octothinker_3b.py --workdir runs/octothinker --distributed

The mesh is for v5p:2x2x4: 9.6 GiB a chip in training, 65.3 in the rollout, of 95.7. 300 steps, every response as long
as it may be, take 22 hours without evaluation. For v6e:4x4, with --config.rollout.slots=256: 9.6 and 18.6, of 31.3; 34
hours. Estimates of experiments.compile_for_tpu (docs/pods.md), not made at shorter lengths.
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

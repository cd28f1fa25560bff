"""The paper's smaller run on Qwen3-1.7B-Base (2602.04879), with the settings of dense_base.

    python -m experiments.train --config configs/paper/qwen3_1_7b.py --workdir runs/qwen3_1_7b --distributed

The mesh is for v5p:2x2x4: 6.2 GiB a chip in training, 63.9 in the rollout, of 95.7. 300 steps, every response as long
as it may be, take 20 hours without evaluation. For v6e:4x4, with --config.rollout.slots=256: 6.3 and 17.2, of 31.3; 31
hours. Estimates of experiments.compile_for_tpu (docs/pods.md), not made at shorter lengths.
Batch, lengths and thresholds are dense_base's: the paper's table is of the five large runs.
"""

from configs.paper import dense_base


def get_config():
    c = dense_base.get_config()
    c.policy.path = "models/Qwen3-1.7B-Base"
    c.policy.shape = "configs/paper/qwen3_1_7b_base.json"  # typed by hand; policy.path wins
    c.mesh.fsdp = 8
    c.mesh.tensor = 2
    return c

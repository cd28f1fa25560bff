"""The paper's MoE Base run with LoRA (2602.04879, section 7 and appendix E, table 1): Qwen3-30B-A3B-Base.

    python -m experiments.train --config configs/paper/moe_base_lora.py --workdir runs/moe_base_lora --distributed

The mesh is for v5p:4x4x4: 8.2 GiB a chip in training, 29.8 in the rollout, of 95.7; 300 steps, every response as long
as it may be, take 10 hours without evaluation. For v6e:8x8, with --config.mesh.fsdp=8 --config.mesh.expert=8: 8.9 and
23.0, of 31.3; 11 hours. Estimates of experiments.compile_for_tpu (docs/pods.md), not made at shorter lengths.
Adapters of rank 32 on every matrix of every layer, experts' too (which matrices is ours). The rollout has them merged.
"""

from configs import base
from configs.paper import moe_base


def get_config():
    c = moe_base.get_config()
    c.lora.rank = 32
    c.lora.alpha = 64.0
    c.optimizer.learning_rate = 1e-5
    c.rollout.prompts = 128
    c.rollout.group_size = 8
    c.rollout.max_new_tokens = 8000
    c.rollout.slots = 0
    c.train.minibatches = 8  # of 16 prompts
    c.eval.every = 10
    for name in base.DPPO_TV:
        c.loss_defaults[name].update(delta_low=0.15, delta_high=0.15)
    return c

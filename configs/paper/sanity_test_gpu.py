"""The paper's sanity test on one GPU of 80 GB: sanity_test with fewer rows at a time, and adapters.

    python -m experiments.train --config configs/paper/sanity_test_gpu.py --workdir runs/sanity_gpu

Float32 weights, moments and gradients of 1.8 billion parameters would take 28 GB, beside a cache that wants the rest:
adapters of rank 32 leave 7 GB of weights (ours; the paper trains all). Not run by us.
"""

from configs.paper import sanity_test


def get_config():
    c = sanity_test.get_config()
    c.lora.rank = 32
    c.lora.alpha = 64.0
    c.optimizer.learning_rate = 1e-5  # the paper's for LoRA
    c.rollout.slots = 128  # a cache of 29 GB
    c.train.micro_rows = 1
    c.mesh.fsdp = 1
    return c

"""Studies on SmolLM2-135M-Instruct, as short as two CPU cores make them: two steps of four updates.

make smollm2
python -m experiments.questions.necessity --separate --config configs/studies/smollm2.py --workdir runs/smollm2 \
    --arms dppo_binary_tv,pg_is --out runs/smollm2
"""

from configs import smollm2_products


def get_config():
    c = smollm2_products.get_config()
    c.steps = 2
    c.rollout.activations = "bfloat16"  # against float32 training: the mismatch
    c.train.epochs = 2
    c.optimizer.learning_rate = 1e-4  # five times that of smollm2_products, so that four updates move the policy
    c.log.regions = ("ppo_clip", "clip_higher", "dppo_binary_tv", "dppo_binary_kl", "minimal_mask", "dppo_topk_tv")
    return c

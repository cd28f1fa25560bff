"""A study on SmolLM2-135M-Instruct, as long as a GPU makes it in minutes: short sums, rollouts in bfloat16.

make smollm2
python -m experiments.questions.necessity --separate --config configs/studies/smollm2_gpu.py --seeds 2 \
    --arms dppo_binary_tv,clip_higher,cispo,pg_is,minirl --workdir runs/smollm2_gpu --out runs/smollm2_gpu/necessity
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 60
    c.policy.path = "models/SmolLM2-135M-Instruct"
    c.policy.matmul = "default"  # float32 products in TensorFloat-32
    c.data.name = "chain_sum"
    c.data.settings = dict(min_terms=2, max_terms=3, min_digits=1, max_digits=1)
    c.data.size = 4000
    c.data.verifier = "last_number"
    c.data.chat = True
    c.data.max_prompt_len = 96
    c.rollout.prompts = 32
    c.rollout.group_size = 8
    c.rollout.max_new_tokens = 64
    c.rollout.dtype = "bfloat16"  # against float32 training: the mismatch
    c.train.minibatches = 8
    c.train.micro_rows = 16
    c.optimizer.learning_rate = 1e-5
    c.checkpoint.every = 0
    c.log.samples = 20
    return c

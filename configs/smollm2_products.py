"""SmolLM2-135M-Instruct learns one-digit products, on two CPU cores.

make smollm2
python -m experiments.train --config configs/smollm2_products.py --workdir runs/smollm2_products
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 25
    c.policy.path = "models/SmolLM2-135M-Instruct"
    c.data.name = "products"
    c.data.settings = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    c.data.size = 1000
    c.data.verifier = "last_number"
    c.data.chat = True
    c.data.max_prompt_len = 56
    c.rollout.prompts = 4
    c.rollout.group_size = 8
    c.rollout.max_new_tokens = 24
    c.train.minibatches = 2
    c.optimizer.learning_rate = 2e-5
    c.log.samples = 5
    return c

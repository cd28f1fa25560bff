"""The embedded tiny model learns to add under DPPO, on a laptop.

make quickstart
python -m experiments.train --config configs/quickstart.py --workdir runs/quickstart
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 60
    c.policy.path = "assets/tiny"
    c.data.name = "chain_sum"
    c.data.settings = dict(min_terms=2, max_terms=3, min_digits=1, max_digits=1)
    c.data.verifier = "last_number"
    c.data.max_prompt_len = 32
    c.rollout.max_new_tokens = 16
    c.optimizer.learning_rate = 3e-4
    return c

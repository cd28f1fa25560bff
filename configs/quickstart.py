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
    c.data.settings = dict(min_terms=2, max_terms=4, min_digits=1, max_digits=1)
    c.data.verifier = "last_number"
    c.data.max_prompt_len = 9
    c.rollout.prompts = 32
    c.rollout.max_new_tokens = 24
    c.rollout.dtype = "bfloat16"  # against float32 training: the mismatch of the plot
    c.train.epochs = 2  # 16 updates a step: the later ones are off-policy, and the mask acts
    c.train.minibatches = 8
    c.optimizer.learning_rate = 3e-4
    c.optimizer.schedule = "linear"
    c.eval.sets.held_out = base.data_section(**{**c.data.to_dict(), "seed": 10_000, "size": 256})
    c.eval.every = 20
    c.eval.prompts = 256
    c.eval.temperature = 1.0
    c.eval.top_p = 1.0
    return c

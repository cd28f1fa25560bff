"""SmolLM2-135M-Instruct on grade-school word problems: GSM8K from the hub, or a stand-in that needs no network.

    make smollm2
    python -m experiments.train --config configs/gsm8k.py --workdir runs/gsm8k
    python -m experiments.train --config configs/gsm8k.py:symbolic --workdir runs/gsm_symbolic

:symbolic generates problems of the same kind, reasoning-gym's gsm_symbolic. Another model: --config.policy.path. What
came of it on two CPU cores is in experiments/recipes/gsm8k/README.md. Batch, lengths and learning rate are ours.
"""

from configs import base

ARGUMENTS = ("hub", "symbolic")


def get_config(argument: str = "hub"):
    c = base.get_config()
    c.policy.path = "models/SmolLM2-135M-Instruct"
    if argument == "symbolic":
        c.data.name = "gsm_symbolic"
        c.data.bad_label = "drop"  # a few labels are negative, which its own scorer does not take
    else:
        c.data.kind, c.data.name, c.data.subset = "hub", "openai/gsm8k", "main"
    c.data.verifier = "last_number"
    c.data.chat = True
    c.data.max_prompt_len = 256
    c.data.too_long = "skip"
    c.rollout.prompts = 32
    c.rollout.max_new_tokens = 256
    c.optimizer.learning_rate = 1e-5
    c.eval.sets.held_out = base.data_section(**c.data.to_dict())
    if argument == "symbolic":
        c.eval.sets.held_out.seed, c.eval.sets.held_out.size = 10_000, 256
    else:
        c.eval.sets.held_out.split = "test"
    c.eval.every = 50
    c.checkpoint.every = 50
    return c

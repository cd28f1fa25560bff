"""SmolLM2-135M-Instruct may have arithmetic worked out by a tool, in a conversation, on two CPU cores.

    make smollm2
    python -m experiments.train --config configs/smollm2_calculator.py --workdir runs/smollm2_calculator

experiments/recipes/calculator/README.md says what came of it.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 10
    c.policy.path = "models/SmolLM2-135M-Instruct"
    c.data.kind = "environment"
    c.data.name = "calculator"  # a turn with <tool>3*4</tool> is answered; any other is the answer to the problem
    c.data.settings = dict(terms=2, digits=1)
    c.data.size = 500
    c.data.max_turns = 3
    c.data.chat = True
    c.data.max_prompt_len = 96
    c.rollout.prompts = 4
    c.rollout.turn_tokens = 24
    c.rollout.max_new_tokens = 128  # three turns, and what is said between them
    c.train.minibatches = 2
    c.optimizer.learning_rate = 2e-5
    c.log.samples = 5
    return c

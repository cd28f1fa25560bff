"""The embedded tiny model learns to answer two sums, one after the other, in one conversation.

    python -m experiments.train --config configs/two_turns.py --workdir runs/two_turns

experiments/recipes/two_turns/README.md says what came of it.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 60
    c.policy.path = "assets/tiny"
    c.data.kind = "environment"
    c.data.name = "two_sums"  # a sum; "ok, " or "no, " and another sum; 1/2 for each right answer
    c.data.settings = dict(min_terms=2, max_terms=3)
    c.data.max_turns = 2
    c.data.max_prompt_len = 9
    c.rollout.prompts = 16
    c.rollout.turn_tokens = 20
    c.rollout.max_new_tokens = 48  # two turns, and what is said between them
    c.train.epochs = 2
    c.train.minibatches = 4
    c.optimizer.learning_rate = 5e-4
    c.optimizer.schedule = "linear"
    return c

"""The reuse regime as the survival map runs it: 60 steps, no evaluation. See experiments/questions/survival/README.md.

python -m experiments.questions.survival --config configs/studies/survival.py --workdir runs/survival
"""

from configs import reuse


def get_config():
    c = reuse.get_config()
    c.steps = 60  # where a run collapses, it has by step 40
    c.eval.every = 0
    c.checkpoint.every = 15
    c.policy.remat = "none"
    c.loss_defaults.binary_tv_unsigned.update(delta_low=0.05, delta_high=0.05)  # as reuse sets its signed ones
    return c

"""The embedded tiny model learns to add from a teacher, without a verifier.

    python -m experiments.train --config configs/quickstart.py --workdir runs/teacher --config.checkpoint.export=True
    python -m experiments.train --config configs/distillation.py --workdir runs/distillation

See experiments/recipes/distillation/README.md.
"""

from configs import quickstart
from configs.methods import set_method


def get_config():
    c = quickstart.get_config()
    set_method(c, "distill")
    c.data.verifier = "none"  # the evaluation set keeps its own, and only measures
    c.steps = 30
    c.rollout.group_size = 4
    c.train.epochs = 1
    c.eval.every = 10
    return c

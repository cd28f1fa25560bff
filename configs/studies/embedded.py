"""Studies on the embedded model: the quickstart, shorter.

python -m experiments.questions.necessity --config configs/studies/embedded.py --workdir DIR --out DIR/F
"""

from configs import quickstart


def get_config():
    c = quickstart.get_config()
    c.steps = 16
    c.policy.remat = "none"  # it fits; time only
    c.eval.every = 0
    return c

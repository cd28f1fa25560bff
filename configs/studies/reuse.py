"""Studies in the reuse regime, with a mismatch: linear layers of the rollout see two bits of mantissa.

python -m experiments.questions.necessity --config configs/studies/reuse.py --workdir DIR --seeds 6 --out DIR/F
"""

from configs import reuse


def get_config():
    c = reuse.get_config()
    c.rollout.activations = "m2"  # mean |π − μ| of 0.002 at first; it grows to 0.005 and beyond, the paper's magnitude
    c.policy.remat = "none"  # it fits; time only
    c.eval.every = 0
    return c

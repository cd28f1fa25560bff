"""Runs that are sick on purpose, one thing done to each, beside the healthy run that they were made of.

    python -m experiments.train --config configs/studies/collapse.py:entropy_rises --workdir DIR

The reuse regime with a rollout of two bits of mantissa: 37,000 parameters, 16 updates a step, 40 steps or as many as it
takes. docs/collapse.md has a section for each symptom, and experiments/questions/collapse trains all and draws them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from configs import reuse
from dppo_jax.errors import lookup

HEALTHY = "healthy"
REWARDS = "experiments/questions/collapse/broken_reward.py"


class Sick(NamedTuple):
    """A run that shows symptoms."""

    symptoms: tuple[str, ...]  # keys of SYMPTOMS
    done: str  # to the healthy run, in words
    sets: Mapping[str, Any]  # the same: config key: its value


SYMPTOMS = {  # its tags; a figure has a panel for each, and one for reward/mean
    "entropy": ("policy/entropy",),
    "mismatch": ("mismatch/abs_prob_diff_mean",),
    "bad_updates": ("trust_region/bad_updates",),
    "length": ("response/length_mean", "response/truncated"),
    "masked": ("trust_region/masked",),
    "resume": ("policy/abs_prob_diff_mean",),
    "equal_groups": ("reward/zero_variance_groups",),
    "verifier": ("reward/failed", "reward/zero_variance_groups"),
}

SICK = {
    "entropy_rises": Sick(
        ("entropy",), "Clip-Higher without its upper bound where μ < 0.1, at 3e-4",
        {"loss.name": "relax_high", "loss.alpha": 0.1, "optimizer.learning_rate": 3e-4},
    ),
    "mismatch_grows": Sick(
        ("mismatch", "masked"), "no mask (CISPO), at 3e-4", {"loss.name": "cispo", "optimizer.learning_rate": 3e-4}
    ),
    "bad_updates": Sick(
        ("mismatch", "bad_updates", "length"), "no mask and no cap (PG-IS), at five times the learning rate",
        {"steps": 20, "loss.name": "pg_is", "optimizer.learning_rate": 9e-4},
    ),
    "masked_noise": Sick(
        ("masked",), "Clip-Higher around a rollout of one bit of mantissa",
        {"loss.name": "clip_higher", "rollout.activations": "m1"},
    ),
    "equal_temperature": Sick(("equal_groups",), "drawn at temperature 0.3", {"rollout.temperature": 0.3}),
    "equal_pairs": Sick(
        ("equal_groups",), "64 groups of 2 in place of 16 of 8", {"rollout.prompts": 64, "rollout.group_size": 2}
    ),
    "verifier_raises": Sick(
        ("verifier",), "a reward function that raises on every reply",
        {"steps": 5, "reward.function": f"{REWARDS}:score"},
    ),
    "verifier_reads_nothing": Sick(
        ("verifier",), "the answer is looked for in a box", {"steps": 5, "data.extract": "boxed"}
    ),
}  # fmt: skip
ARGUMENTS = (HEALTHY, *SICK)  # what get_config takes, for the command line's refusals


def get_config(name: str = HEALTHY):
    c = reuse.get_config()
    c.steps = 40
    c.rollout.activations = "m2"
    c.optimizer.learning_rate = 1.8e-4  # where the survival map has every seed alive
    c.policy.remat = "none"
    c.eval.every = 0
    c.checkpoint.every = 20
    if name != HEALTHY:
        c.update_from_flattened_dict(lookup(SICK, name, "run").sets)
    return c

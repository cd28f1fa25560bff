"""The survival map's regime with a loss more: Clip-Higher that masks whatever the advantage, and so pulls nowhere.

python -m experiments.questions.survival --config configs/studies/pull.py --workdir DIR --losses clip_unsigned

Clip-Higher keeps, of the tokens outside its bounds, those whose update leads back towards mu. Where mu is noisy, they
are there before any update, and what is left of their gradient points at the noise. This loss drops both halves.
"""

import jax.numpy as jnp

from configs.studies import survival
from dppo_jax.losses import LOSSES, from_keep, zero_outside_mask


def clip_unsigned(inputs, *, eps_low, eps_high, ratio_cap):
    """Kept iff 1 - eps_low <= r <= 1 + eps_high, whatever the sign of A."""
    inputs = zero_outside_mask(inputs)
    ratio = jnp.exp(jnp.clip(inputs.logp - inputs.behavior_logp, -20.0, 20.0))
    return from_keep(inputs, (ratio >= 1 - eps_low) & (ratio <= 1 + eps_high), ratio_cap=ratio_cap)


LOSSES["clip_unsigned"] = clip_unsigned


def get_config():
    c = survival.get_config()
    with c.unlocked():
        c.loss_defaults.clip_unsigned = c.loss_defaults.clip_higher.to_dict()
    return c

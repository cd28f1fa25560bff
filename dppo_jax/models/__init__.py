"""Policies: Hugging Face directories in and out, one decoder between."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from dppo_jax import token_head
from dppo_jax.errors import UserError
from dppo_jax.models.config import DTYPES, ModelConfig
from dppo_jax.models.decoder import Params, forward, head_weight
from dppo_jax.models.hf import load_params, place_params, save_hf

__all__ = ["DTYPES", "ModelConfig", "Policy", "load_params", "load_policy", "save_hf"]


@dataclass(frozen=True)
class Policy:
    """A model and its parameters. `logits` is for tests and notebooks; training goes through the token head."""

    config: ModelConfig
    params: Params
    dtype: str

    def logits(self, params: Params, tokens: Int32[Array, "B T"], mask: Array | None = None) -> Float32[Array, "B T V"]:
        """Teacher-forced logits at temperature 1, in the policy's dtype up to the head and float32 from there."""
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        return _logits(self.config, self.dtype, params, tokens, mask)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(config: ModelConfig, dtype: str, params: Params, tokens: Array, mask: Array) -> Array:
    hidden = forward(config, params, tokens, mask, dtype=DTYPES[dtype])
    return token_head.logits(hidden, head_weight(params), temperature=1.0, softcap=config.logit_softcap)


def load_policy(directory: str, dtype: str = "float32") -> Policy:
    """The model in a Hugging Face directory; parameters are kept in float32, `dtype` is what it computes in.

    UserError for a directory, file, field, tensor or dtype that is missing or not supported.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    config, params = place_params(directory)
    return Policy(config, params, dtype)

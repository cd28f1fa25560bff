"""How a rollout samples one token more, what it records of it, and whether the token ends the response."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dppo_jax import sampling, token_head
from dppo_jax.devices.sharding import constrain
from dppo_jax.models.decoder import Params, head_weight
from dppo_jax.rollout.stops import Stops


@dataclasses.dataclass(frozen=True)
class TokenSampler:
    """Fields as those of `Rollout`; `softcap` is that of the model's logits."""

    softcap: float | None
    temperature: float
    top_p: float
    head_float32: bool
    topk: int
    record_entropy: bool
    eos_ids: tuple[int, ...]
    stops: Stops | None

    def distribution(self, published: Params, hidden: Array) -> Array:
        """Logits [b, V] of the distribution that tokens are drawn from."""
        weight = published["head_float32"] if self.head_float32 else head_weight(published)
        hidden = hidden.astype(jnp.float32) if self.head_float32 else hidden
        z = token_head.logits(hidden, weight, temperature=self.temperature or 1.0, softcap=self.softcap)
        z = constrain(z, "batch", "vocab")
        return sampling.nucleus(z, self.top_p) if self.top_p < 1.0 else z

    def draw(self, z: Array, uniforms: Array) -> tuple[Array, Array, Array]:
        """Tokens, their logp, and log sum exp(z)."""
        if self.temperature == 0:
            token, lse = jnp.argmax(z, axis=-1).astype(jnp.int32), token_head.log_normaliser(z)
        else:
            token, lse = sampling.draw(z, uniforms)
        return token, jnp.take_along_axis(z, token[:, None], axis=-1)[:, 0] - lse, lse

    def recorded(self, z: Array, lse: Array) -> tuple[Array, Array, Array | None]:
        """Of the distributions: ids and logp [b, K] of the K likeliest tokens, and the entropy [b] in nats (None: it is
        not recorded)."""
        top, ids = jax.lax.top_k(z, self.topk)
        return ids.astype(jnp.int32), top - lse[:, None], self._entropy(z, lse) if self.record_entropy else None

    def _entropy(self, z: Array, lse: Array) -> Array:
        logp = jnp.where(z > -jnp.inf, z - lse[:, None], 0.0)  # a token that cannot be drawn has no part in it
        return -jnp.sum(jnp.where(z > -jnp.inf, jnp.exp(logp) * logp, 0.0), axis=-1)

    def is_end_token(self, token: Array) -> Array:
        return jnp.isin(token, jnp.asarray(self.eos_ids, jnp.int32))

    def stop_after(self, stop: Array | None, token: Array) -> Array | None:
        """The state of the stop strings' automaton after one token more."""
        return None if self.stops is None or stop is None else self.stops.after(stop, token)

    def ends(self, token: Array, stop: Array | None) -> Array:
        """Whether tokens end their responses; `stop` is the state after them."""
        is_end = self.is_end_token(token)
        return is_end if self.stops is None or stop is None else is_end | self.stops.found(stop)

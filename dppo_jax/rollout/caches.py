"""The two ways in which a rollout keeps keys and values: blocks of columns (`blocks`) and pages (`paged`).

Both have the prompts of the batch in a form of their own, fill an idle slot from them, and give every decode step its
attention. They hold no state: that is in `Slots`, as `cache` and `table`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from dppo_jax.models.config import ModelConfig
from dppo_jax.models.pages import PAGE

FEW = 4 * PAGE  # columns; with so few, a CPU copies pages in the time in which it reads what it need not


class Choice(NamedTuple):
    """How a rollout keeps keys and values, and why so."""

    paged: bool
    attention: str  # of pages.IMPLEMENTATIONS
    why: str


def choose(platform: str, model: ModelConfig, *, dtype: Any, length: int, cache: str = "auto") -> Choice:
    """For rows of at most `length` tokens on a "cpu", "gpu" or "tpu". `cache`: auto, or the one that is wanted.

    Pages where a kernel of jax reads them, else blocks; on a CPU pages where rows may be long enough to gain by them.
    """
    size, slides = model.head_dim, model.window is not None and model.window < length
    obstacle = {
        # The TPU's kernel rounds keys and values to bfloat16.
        "tpu": (jnp.dtype(dtype) != jnp.bfloat16 or size % 128 != 0, f"{jnp.dtype(dtype)} heads of {size}"),
        "gpu": (jnp.dtype(dtype).itemsize != 2 or size & (size - 1) != 0, f"{jnp.dtype(dtype)} heads of {size}"),
    }.get(platform, (True, ""))
    kernel = "xla" if slides or obstacle[0] else f"pallas_{platform}"
    if cache != "auto":
        return Choice(cache == "pages", kernel, "rollout.cache")
    if platform == "cpu":
        return Choice(length > FEW, "xla", f"rows of up to {length} tokens")
    if kernel != "xla":
        return Choice(True, kernel, "the default on its platform")
    return Choice(False, "xla", f"a window of {model.window}" if slides else obstacle[1])

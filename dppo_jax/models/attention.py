"""Self-attention over packed rows, by platform: XLA everywhere, cuDNN on NVIDIA GPUs, splash (Pallas) on TPUs.

    out[t] = sum_s softmax_s(cap(scale q[t] . k[s])) v[s]   over s <= t with segments[s] == segments[t]

where cap(x) = softcap tanh(x / softcap), if there is one, and t - s < window, if there is one: in columns, which is in
positions, since a segment's tokens lie side by side.

Segment 0 is padding: it sees itself, so that every softmax has a term and no gradient is NaN.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int32

from dppo_jax.devices.sharding import mesh_axes, num_shards, spec
from dppo_jax.errors import UserError, lookup

# kernel(q, k, v, segments, scale=, softcap=, window=) -> mixed values
Kernel = Callable[..., Array]

LANES = 128  # splash works on blocks whose sides are multiples of this
LARGEST_BLOCK = 512


def self_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T KV D"],
    v: Float[Array, "B T KV D"],
    segments: Int32[Array, "B T"],
    *,
    implementation: str,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sliding: Bool[Array, ""] | None = None,
) -> Float[Array, "B T H D"]:
    """Causal attention within equal segment numbers, H / KV queries per key head; softmax in float32.

    `implementation` is a name in `KERNELS`. Finite and meaningless where segments is 0. UserError for an unknown name,
    and where the kernel cannot take these shapes; `choose` gives a name that can.
    `scale` None is 1 / sqrt(D). There is a window where `sliding`: data, since layers that differ in it are scanned.
    """
    kernel = lookup(KERNELS, implementation, "attention implementation")
    kernel = functools.partial(kernel, scale=scale, softcap=softcap)
    if window is None:
        return kernel(q, k, v, segments)
    if implementation == "xla":  # whose mask is data
        return kernel(q, k, v, segments, window=jnp.where(sliding, window, q.shape[1]))
    return jax.lax.cond(sliding, functools.partial(kernel, window=window), kernel, q, k, v, segments)


def dot_product(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    implementation: str,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | Array | None = None,
) -> Array:
    """JAX's own. XLA holds [B, H, T, T] scores; cuDNN holds the mask, [B, 1, T, T] in q's dtype, and its gradient."""
    allowed = segments[:, None, :, None] == segments[:, None, None, :]
    if window is not None:
        column = jnp.arange(q.shape[1])
        allowed &= column[:, None] - column < window
    if softcap is not None:
        if implementation != "xla":
            raise UserError(f"{implementation} attention cannot cap scores, as this model does at {softcap}; use xla")
        return capped(q, k, v, allowed, scale=scale, softcap=softcap)
    # Told of the causal half, cuDNN leaves the blocks above the diagonal out.
    return jax.nn.dot_product_attention(
        q, k, v, mask=allowed, is_causal=True, scale=scale, implementation=implementation
    )


def capped(q: Array, k: Array, v: Array, allowed: Array, *, scale: float | None, softcap: float) -> Array:
    """Causal attention with a cap on its scores, which `jax.nn.dot_product_attention` lacks."""
    batch, length, heads, head_dim = q.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    q = q.reshape(batch, length, k.shape[2], -1, head_dim)
    score = scale * jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    score = softcap * jnp.tanh(score / softcap)
    allowed = jnp.tril(allowed)[:, :, None]
    p = jax.nn.softmax(jnp.where(allowed, score, -1e30), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", p, v).reshape(batch, length, heads, head_dim)


def splash_kernel(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    interpret: bool = False,
) -> Array:
    """Blocks above the diagonal are left out; memory linear in T, forward and backward (2205.14135)."""
    length, heads, head_dim = q.shape[1:]
    if length % LANES:
        raise UserError(f"splash attention needs rows whose length is a multiple of {LANES}, not {length}")
    block = max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if length % size == 0)
    square = (length, length)
    mask = splash.CausalMask(square) if window is None else splash.LocalMask(square, (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel does not scale
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    of_rows = _exact_by_default if q.dtype == jnp.bfloat16 else _of_rows
    return of_rows(kernel, q, k, v, splash.SegmentIds(segments, segments)).swapaxes(1, 2)


def _of_rows(kernel: Callable[..., Array], q: Array, k: Array, v: Array, segments: Any) -> Array:
    return jax.vmap(kernel)(q, k, v, segments)


@jax.custom_vjp
def _exact_by_default(kernel: Callable[..., Array], q: Array, k: Array, v: Array, segments: Any) -> Array:
    """The kernel and its backward pass at the default precision, whose products of bfloat16 are exact; Mosaic refuses
    to compile them at a higher one."""
    with jax.default_matmul_precision("default"):
        return _of_rows(kernel, q, k, v, segments)


def _exact_forward(kernel: Callable[..., Array], q: Array, k: Array, v: Array, segments: Any) -> tuple[Array, Any]:
    with jax.default_matmul_precision("default"):
        return jax.vjp(lambda q, k, v: _of_rows(kernel, q, k, v, segments), q, k, v)


def _exact_backward(pullback: Any, cotangent: Array) -> tuple[None, Array, Array, Array, None]:
    with jax.default_matmul_precision("default"):
        of_q, of_k, of_v = pullback(cotangent)
    return None, of_q, of_k, of_v, None


_exact_by_default.defvjp(_exact_forward, _exact_backward)


def per_device(q: Array, k: Array, v: Array, segments: Array, *, kernel: Kernel, **options: Any) -> Array:
    """The kernel on each device's rows and heads of the mesh in force: XLA cannot partition a kernel by itself.

    Where the mesh has more shards of the heads than there are key heads, key heads are repeated to fill them.
    """
    kernel = functools.partial(kernel, **options)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, segments)
    shards = num_shards(mesh, *mesh_axes("heads"))
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % shards:
        raise UserError(
            f"attention cannot share {heads} heads among mesh.{mesh_axes('heads')[0]} = {shards} devices; "
            f"the nearest size that fits is {math.gcd(heads, shards)}"
        )
    repeats = math.lcm(kv_heads, shards) // kv_heads
    if repeats > 1:
        k, v = (jnp.repeat(a, repeats, axis=2) for a in (k, v))
    by_head, by_row = spec("batch", None, "heads", None), spec("batch", None)
    share = jax.shard_map(
        kernel,
        in_specs=(by_head, by_head, by_head, by_row),
        out_specs=by_head,
        check_vma=False,  # pallas_call does not say over which axes its outputs vary
    )
    return share(q, k, v, segments)


def length_multiple(platform: str, length: int) -> int:
    """Row lengths that the kernels of a platform work with, long ones in blocks of a good size."""
    return {"tpu": LANES if length < 4096 else LARGEST_BLOCK, "gpu": 64}.get(platform, 1)


KERNELS: dict[str, Kernel] = {
    "xla": functools.partial(dot_product, implementation="xla"),
    "cudnn": functools.partial(per_device, kernel=functools.partial(dot_product, implementation="cudnn")),
    "splash": functools.partial(per_device, kernel=splash_kernel),
}


class Choice(NamedTuple):
    """A name in `KERNELS`, and why it was chosen, for the log."""

    name: str
    why: str


def choose(platform: str, *, dtype: Any, head_dim: int, length: int, softcap: float | None = None) -> Choice:
    """The best implementation that takes these shapes on a device's `platform`, else "xla" and what stood against it.

    cuDNN's limits are those of its flash attention before Hopper, with a mask, in training; splash's are its tiles'.
    """
    dtype = jnp.dtype(dtype)
    if platform in ("gpu", "cuda"):
        name = "cudnn"
        against = [
            (dtype not in (jnp.bfloat16, jnp.float16), f"takes bfloat16 or float16, not {dtype}"),
            (head_dim > 128 or head_dim % 8, f"needs a head dimension of at most 128 that 8 divides, not {head_dim}"),
            (length % 2, f"needs an even row length, not {length}"),
            (softcap is not None, f"cannot cap scores at {softcap}"),
        ]
    elif platform == "tpu":
        name = "splash"
        against = [
            (dtype not in (jnp.bfloat16, jnp.float32), f"takes bfloat16 or float32, not {dtype}"),
            (length % LANES, f"needs a row length that {LANES} divides, not {length}"),
        ]
    else:
        return Choice("xla", f"there is no kernel for {platform}")
    reasons = [reason for true, reason in against if true]
    return Choice("xla", f"{name} {reasons[0]}") if reasons else Choice(name, f"the kernel for {platform}")

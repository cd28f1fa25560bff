"""Token embeddings from a table that is cut by its vocabulary: each device looks up the rows that it holds."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from dppo_jax.devices.sharding import dividing, mesh_axes, spec


def embed(table: Float[Array, "V E"], tokens: Int32[Array, "B T"]) -> Float[Array, "B T E"]:
    """table[tokens], laid out as the residual stream. Left to XLA, the gradient would be a whole table per device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table[tokens]
    rows, columns = mesh_axes("vocab"), mesh_axes("embed")
    by_token = dividing(mesh, tokens, "batch", "stream")
    # Devices that share the vocabulary and cut the length each keep their share of the sum.
    scattered = by_token[1] is not None and mesh_axes("stream") == rows and rows

    def local(table: Array, tokens: Array) -> Array:
        if columns:  # along a leading axis: along another, XLA sums the whole of the gradient on every device
            table = jnp.moveaxis(jax.lax.all_gather(table, columns), 0, 1).reshape(len(table), -1)
        if not rows:
            return table[tokens]
        index = tokens - jax.lax.axis_index(rows) * len(table)
        on_device = (index >= 0) & (index < len(table))
        embedded = jnp.where(on_device[..., None], table[jnp.clip(index, 0, len(table) - 1)], 0)
        if scattered:
            return jax.lax.psum_scatter(embedded, rows, scatter_dimension=1, tiled=True)
        return jax.lax.psum(embedded, rows)

    out = spec(by_token[0], "stream" if scattered else None, None)
    sharded = jax.shard_map(
        local, in_specs=(spec("vocab", "embed"), spec(by_token[0], None)), out_specs=out, check_vma=False
    )
    return sharded(table, tokens)

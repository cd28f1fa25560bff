"""The paged attention of the platform at hand beside the one that XLA makes: errors, and how fast each reads.

    python -m experiments.benchmark.paged_kernel

Shapes of the paper's sanity test: 12 query heads on 2 key heads of 128, bfloat16, 128 rows of up to 57 pages. Errors
are relative to float64 on the host: ||out - exact|| / ||exact||. Rates are those of the pages that hold tokens.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.errors import run_main
from dppo_jax.models import pages
from dppo_jax.models.pages import PAGE, count_for
from experiments.benchmark import ours
from experiments.benchmark.long_rollout import copy_rate
from experiments.run.cli import Parser

SLOTS, HEADS, KV_HEADS, SIZE, WIDTH, LAYERS = 128, 12, 2, 128, 57, 8
PARTS = (1, 4, 8, 16)  # that the GPU kernel cuts a row's table into


def exact(q, pool, table, length) -> np.ndarray:
    """In float64, row by row."""
    out = []
    for query, numbers, count in zip(q, table, length, strict=True):
        keys, values = (np.asarray(x[:, numbers], np.float64).reshape(KV_HEADS, -1, SIZE)[:, :count] for x in pool)
        by_head = np.asarray(query, np.float64).reshape(KV_HEADS, -1, SIZE)
        scores = np.einsum("kgd,kcd->kgc", by_head, keys) / np.sqrt(SIZE)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out.append(np.einsum("kgc,kcd->kgd", weights, values).reshape(HEADS, SIZE))
    return np.stack(out)


def rows(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
    """Lengths [S], their table [S, M], and how many pages a layer has; no two rows share one."""
    length = np.clip(rng.lognormal(7.5, 1.0, SLOTS), 1, WIDTH * PAGE).astype(np.int32)
    counts = count_for(length)
    order = rng.permutation(counts.sum()).astype(np.int32)
    table: np.ndarray = np.zeros((SLOTS, pages.table_width("pallas_gpu", WIDTH)), np.int32)
    for row, numbers in zip(table, np.split(order, np.cumsum(counts)[:-1]), strict=True):
        row[: len(numbers)] = numbers
    return length, table, len(order)


def all_layers(implementation: str, per_layer: int) -> Callable[..., jax.Array]:
    """The first layer's attention, after that of every layer."""

    def attention(q, pool, table, length):
        def layer(number, out):
            mixed = pages.attend(q, pool, table + number * per_layer, length, implementation=implementation)
            return out + jnp.where(number == 0, mixed, 0 * mixed)

        return jax.lax.fori_loop(0, LAYERS, layer, jnp.zeros_like(q))

    return jax.jit(attention)


def main() -> None:
    """Every implementation that runs here, the GPU's with its table in several numbers of parts."""
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    platform = jax.default_backend()
    kernels = [] if platform == "cpu" else [(f"pallas_{platform}", n) for n in (PARTS if platform == "gpu" else (1,))]
    length, table, per_layer = rows(np.random.default_rng(0))
    keys = jax.random.split(jax.random.key(0), 3)
    shape = KV_HEADS, LAYERS * per_layer, PAGE, SIZE
    pool = jax.random.normal(keys[0], shape, jnp.bfloat16), jax.random.normal(keys[1], shape, jnp.bfloat16)
    q = 4 * jax.random.normal(keys[2], (SLOTS, HEADS, SIZE), jnp.bfloat16)  # peaked, as attention is
    want = exact(*jax.device_get((q, tuple(x[:, :per_layer] for x in pool), table, length)))
    rate, moved = copy_rate(), sum(x.nbytes for x in pool)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: copies {rate / 1e9:,.0f} GB/s")
    print(f"{SLOTS} rows of {length.mean():.0f} tokens in the mean, {length.max()} at most")
    for name, parts in [("xla", 1), *kernels]:
        pages.SPLITS = parts
        attention = all_layers(name, per_layer)
        got = np.asarray(attention(q, pool, table, length), np.float64)
        seconds = ours.seconds(attention, q, pool, table, length)
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        each, share = 1e6 * seconds / LAYERS, moved / seconds / rate
        print(f"{name:12} parts {parts:2}: error {error:.1e}, {each:7.0f} us a layer, {share:.2f} of the copy rate")


if __name__ == "__main__":
    run_main(main)

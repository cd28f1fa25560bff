"""A rollout and two updates of adapters on eight devices, against one.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python -m tests.helpers.lora_devices FILE

tests/test_lora.py starts it, since the number of devices is fixed when jax starts, and reads FILE.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax import packing
from dppo_jax.devices.sharding import batch_sharding, make_mesh
from dppo_jax.sampling import step_key
from dppo_jax.train_step import assemble, jit_update
from experiments.run.rollouts import training_rollout
from experiments.run.setup import ROLLOUT, Setup, Text
from tests.helpers.fixtures import EOS, PAD, TINY, random_params, small_config
from tests.helpers.multi_device import largest_difference, parts, prompt_batch


def run(sizes, devices):
    """(tokens, adapters after two updates, base weights after them, pieces that each adapter is held in)."""
    places = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), sizes, strict=True))
    numbers = dict(lora__rank=3, lora__alpha=6.0, train__micro_rows=1, optimizer__eps=1e-4)
    config = small_config(Path("unused"), **numbers, **places)
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        prompts = prompt_batch(config)
        widths = np.repeat(prompts.mask.sum(axis=1), config.rollout.group_size)
        setup = Setup(config, TINY, mesh, Text(None, (EOS,), PAD), widths.mean())
        state = setup.init_state(random_params())
        generate = setup.on_mesh(training_rollout(setup))
        update = jit_update(setup.update, setup.shardings, mesh)
        rollout = generate(state.policy, prompts, step_key(0, 0, ROLLOUT))
        batch = jax.jit(assemble, out_shardings=batch_sharding(mesh))(prompts, rollout)
        advantages = np.random.default_rng(2).normal(size=batch.tokens.shape[0]).astype(np.float32)
        batch = batch.replace(advantages=jax.device_put(jnp.asarray(advantages), batch_sharding(mesh)))
        lengths = np.asarray(rollout.response_mask).sum(axis=1)
        for index in setup.minibatches(0):
            state, _ = update(state, batch, packing.plan(index, widths, lengths, setup.pack_shape))
        pieces = {name: parts(value) for name, value in state.params["layers"].items()}
        return np.asarray(rollout.tokens), *jax.device_get((state.params, state.frozen)), pieces


def main(file: Path) -> None:
    devices = jax.devices()
    assert len(devices) == 8, devices
    alone, spread = run((1, 1, 1), devices[:1]), run((2, 2, 2), devices)
    found = {
        "same_tokens": bool((alone[0] == spread[0]).all()),
        "adapters": largest_difference(alone[1], spread[1]),
        "largest_b": max(float(np.abs(v).max()) for k, v in alone[1]["layers"].items() if k.endswith("_b")),
        "base": largest_difference(random_params(), spread[2]),
        "pieces": spread[3],
    }
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

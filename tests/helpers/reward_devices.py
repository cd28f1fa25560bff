"""The golden conversations scored by reward models on eight devices, and on one.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python -m tests.helpers.reward_devices FILE

tests/test_reward_model.py starts it, since the number of devices is fixed when jax starts, and reads FILE.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np

from dppo_jax.data.examples import Example
from dppo_jax.devices.hosts import share_over
from dppo_jax.devices.sharding import make_mesh
from experiments.run.reward_model import load_reward_model
from experiments.run.setup import Setup
from tests.golden.reward_models.conversations import CONVERSATIONS
from tests.helpers.fixtures import small_config
from tests.helpers.multi_device import parts
from tests.helpers.places import GOLDEN


def score(family: str, sizes, devices):
    """(scores, how many were cut, pieces of some weights, most compilations of a width, bytes a device)."""
    places = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), sizes, strict=True))
    directory = str(GOLDEN / "reward_models" / family)
    numbers = dict(reward__terms__model=1.0, reward__model__path=directory, reward__model__max_len=96)
    config = small_config(Path("unused"), reward__model__rows=8, **numbers, **places)
    mesh = make_mesh(config.mesh, devices)
    examples = [Example(prompt if isinstance(prompt, str) else tuple(prompt), "") for prompt, _ in CONVERSATIONS]
    pairs = {row: (example, CONVERSATIONS[row][1]) for row, example in enumerate(examples)}
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"), ExitStack() as stack:
        model = load_reward_model(Setup(config, mesh=mesh), examples, stack)
        for _ in range(2):
            scores, cut = model(pairs, share_over(None, len(pairs)))
        body = model._params["body"]
        flat = {"embed": body["embed"], **body["layers"]}
        pieces = {name: parts(flat[name]) for name in ("embed", "q", "down", "attn_norm")}
        compiled = max(function._cache_size() for function in model._score.values())
        return np.asarray(scores).tolist(), cut, pieces, compiled, model.device_bytes


def main(file: Path) -> None:
    devices = jax.devices()
    assert len(devices) == 8, devices
    found = {}
    for family in ("llama", "qwen3", "gemma2"):
        scores, cut, pieces, compiled, size = score(family, (2, 2, 2), devices)
        alone = score(family, (1, 1, 1), devices[:1])
        found[family] = dict(scores=scores, alone=alone[0], cut=cut, pieces=pieces, compiled=compiled, bytes=size)
        found[family]["bytes_alone"] = alone[4]
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

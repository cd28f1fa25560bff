"""The golden conversations scored by reward models on eight devices.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python -m tests.helpers.reward_devices FILE

tests/test_reward_model.py starts it, since the number of devices is fixed when jax starts, and reads FILE.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import jax

from dppo_jax.data.examples import Example
from dppo_jax.devices.hosts import share_over
from dppo_jax.devices.sharding import make_mesh
from experiments.run.reward_model import load_reward_model
from experiments.run.setup import Setup
from tests.golden.reward_models.conversations import CONVERSATIONS
from tests.helpers.fixtures import small_config
from tests.helpers.multi_device import parts
from tests.helpers.places import GOLDEN


def score(family: str, devices) -> dict:
    """On fsdp x tensor = 2 x 2, with the rows over two more."""
    directory = str(GOLDEN / "reward_models" / family)
    numbers = dict(reward__terms__model=1.0, reward__model__path=directory, reward__model__max_len=112)
    numbers |= dict(reward__model__rows=8, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    config = small_config(Path("unused"), **numbers)
    mesh = make_mesh(config.mesh, devices)
    examples = [Example(prompt if isinstance(prompt, str) else tuple(prompt), "") for prompt, _ in CONVERSATIONS]
    pairs = {row: (example, CONVERSATIONS[row][1]) for row, example in enumerate(examples)}
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"), ExitStack() as stack:
        model = load_reward_model(Setup(config, mesh=mesh), examples, stack)
        assert model is not None
        for _ in range(2):
            scores, cut = model(pairs, share_over(None, len(pairs)))
        body = model._params["body"]
        flat = {"embed": body["embed"], **body["layers"]}
        return dict(
            scores=scores.tolist(),
            cut=cut,
            pieces={name: parts(flat[name]) for name in ("embed", "q", "down", "attn_norm")},
            compiled=[function._cache_size() for function in model._score.values()],
            share=model.device_bytes / sum(leaf.nbytes for leaf in jax.tree.leaves(model._params)),
        )


def main(file: Path) -> None:
    devices = jax.devices()
    assert len(devices) == 8, devices
    file.write_text(json.dumps({family: score(family, devices) for family in ("llama", "qwen3", "gemma2")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

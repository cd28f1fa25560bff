"""Writes specs.json: where every parameter of the paper's runs lies, in training and in the rollout.

    python -m tests.golden.make_specs

Look at what changed before you keep it: a weight that no axis cuts is on every chip.
"""

import json
from pathlib import Path

from dppo_jax.devices.sharding import ROLLOUT, TRAINING, spec
from dppo_jax.models.decoder import param_axes
from experiments.run.cli import load_config
from experiments.trace import model_config

PATHS = ("dense_base", "octothinker_3b", "qwen3_1_7b", "moe_base", "moe_base_r3", "moe_thinking")


def specs(path: str) -> dict[str, dict[str, str]]:
    """{table: {parameter: its PartitionSpec}} of a config."""
    axes = param_axes(model_config(load_config(path, [])))
    flat = {name: names for name, names in axes.items() if name != "layers"} | axes["layers"]
    tables = {"training": TRAINING, "rollout": ROLLOUT}
    return {
        table: {name: str(tuple(spec(*names, rules=rules))) for name, names in sorted(flat.items())}
        for table, rules in tables.items()
    }


if __name__ == "__main__":
    found = {path: specs(path) for path in (f"configs/paper/{name}.py" for name in PATHS)}
    Path(__file__).with_name("specs.json").write_text(json.dumps(found, indent=1) + "\n")

"""Evaluates a policy on a config's evaluation sets: avg@n and pass@k.

python -m experiments.eval --config configs/quickstart.py --checkpoint runs/quickstart
"""

import contextlib
import sys
from pathlib import Path

import jax

from dppo_jax import lora
from dppo_jax.devices import peers
from dppo_jax.devices.hosts import is_writer
from dppo_jax.devices.sharding import laid_out, named_shardings
from dppo_jax.errors import UserError
from dppo_jax.models.decoder import abstract_params, param_axes
from dppo_jax.models.hf import load_params
from dppo_jax.storage.checkpoint import restore_params
from experiments.run import cli
from experiments.run.evaluation import Evaluation
from experiments.run.identity import same_config_everywhere
from experiments.run.load import load_setup
from experiments.run.runs import Runs


def evaluate(config, checkpoint: Path) -> dict[str, float]:
    """{"eval/<set>/<metric>": value} of a run's newest checkpoint, one step's folder, or a Hugging Face directory."""
    if not config.eval.sets:
        raise UserError("the config has no evaluation set: eval.sets is empty")
    is_hf = (checkpoint / "config.json").is_file() and any(checkpoint.glob("*.safetensors*"))
    with contextlib.ExitStack() as stack:
        same_config_everywhere(config)
        run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
        unread = ("data", "teacher", "policy") if is_hf else ("data", "teacher")
        setup = load_setup(config, stack, begun=run, directory=checkpoint if is_hf else None, unread=unread)
        config = setup.config
        shardings = named_shardings(setup.mesh, param_axes(setup.model))
        if is_hf:
            params = jax.device_put(load_params(checkpoint)[1], shardings)
        elif config.lora.rank:
            trained_model = setup.trained_model
            axes = named_shardings(setup.mesh, param_axes(trained_model))
            shardings_of_adapters, shapes = (lora.split(x)[0] for x in (axes, abstract_params(trained_model)))
            adapters = restore_params(checkpoint, laid_out(shapes, shardings_of_adapters))
            params = lora.joined(jax.device_put(load_params(setup.directory)[1], shardings), adapters)
        else:
            params = restore_params(checkpoint, laid_out(abstract_params(setup.model), shardings))
        evaluation = Evaluation(Runs([setup]), stack)
        if is_writer() and evaluation.remarks:
            print("\n".join(evaluation.remarks), file=sys.stderr)
        return evaluation.run(0, params, seed=config.seed)


def main() -> None:
    checkpoint = dict(required=True, type=Path, metavar="DIR", help="a run, its checkpoints/STEP, or a model directory")
    flags = {"--checkpoint": checkpoint, **peers.FLAGS}
    config, arguments = cli.parse(__doc__.split("\n")[0], flags, first=peers.join)
    results = evaluate(config, arguments.checkpoint)
    if not is_writer():
        return
    width = max(map(len, results))
    print("\n".join(f"{name:{width}}  {value:.4g}" for name, value in results.items()))


if __name__ == "__main__":
    peers.run_main(main)

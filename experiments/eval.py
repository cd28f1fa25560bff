"""Evaluates a policy on a config's evaluation sets: avg@n and pass@k.

python -m experiments.eval --config configs/quickstart.py --checkpoint runs/quickstart
"""

import contextlib
import sys
from pathlib import Path

import jax

from dppo_jax import lora
from dppo_jax.checkpoint import abstract_state, restore_params
from dppo_jax.errors import UserError
from dppo_jax.hosts import is_writer
from dppo_jax.models.decoder import abstract_params, param_axes
from dppo_jax.models.hf import load_config, load_params
from dppo_jax.sharding import named
from experiments import build, checks, cli, peers
from experiments.compilations import keep_compiled


def evaluate(config, checkpoint: Path) -> dict[str, float]:
    """{"eval/<set>/<metric>": value} of a run's newest checkpoint, one step's folder, or a Hugging Face directory."""
    if not config.eval.sets:
        raise UserError("the config has no evaluation set: eval.sets is empty")
    checks.check(config)
    keep_compiled(config.compile_cache)
    is_hf = (checkpoint / "config.json").is_file() and any(checkpoint.glob("*.safetensors*"))
    directory = checkpoint if is_hf else build.model_directory(config)
    model = load_config(directory)
    checks.check_length(config, model)
    with contextlib.ExitStack() as stack:
        mesh = build.on_devices(config, stack)
        checks.check_mesh(config, mesh, model)
        text = build.text(directory, model)
        shardings = named(mesh, param_axes(model))
        if is_hf:
            params = jax.device_put(load_params(directory)[1], shardings)
        elif config.lora.rank:
            whole = build.adapted(config, model)
            places, shapes = (lora.split(x)[0] for x in (named(mesh, param_axes(whole)), abstract_params(whole)))
            adapters = restore_params(checkpoint, abstract_state(shapes, places))
            params = lora.joined(jax.device_put(load_params(directory)[1], shardings), adapters)
        else:
            params = restore_params(checkpoint, abstract_state(abstract_params(model), shardings))
        evaluation = build.Evaluation(config, model, mesh, text, stack)
        if is_writer() and evaluation.left_out:
            print("\n".join(evaluation.left_out), file=sys.stderr)
        return evaluation.run(0, params)


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

"""Writes the policy of a checkpoint in Hugging Face files, as `checkpoint.export` does at the end of a run.

    python -m experiments.export runs/mine --out exported                          # of the newest whole checkpoint
    python -m experiments.export runs/mine/checkpoints/40 --out exported           # of one step
    python -m experiments.export runs/mine --out exported --adapter                # of LoRA the adapters alone (PEFT)

The config is the one that the checkpoint holds; relative paths in it count from the current folder. All is done in
the host's memory, a weight at a time: no device must hold the model.
"""

from typing import Any

import jax
from ml_collections import ConfigDict

from configs import base
from dppo_jax.errors import UserError, run_main
from dppo_jax.files import Path
from dppo_jax.models.hf import load_config, load_params
from dppo_jax.storage.checkpoint import manifest, restore_params, step_folder
from experiments.run.cli import Parser
from experiments.run.export import write_adapter, write_policy
from experiments.run.load import load_text
from experiments.run.model_files import model_directory
from experiments.run.setup import Setup


def export_step(checkpoint: Path, out: Path, *, adapter: bool = False) -> Path:
    """Writes OUT, from a run's newest whole checkpoint or one step's folder, which is returned. UserError where it
    cannot be read, does not say its config, is of a sweep, or `adapter` is asked of a run without LoRA."""
    step = step_folder(checkpoint)
    config = stored_config(step)
    if adapter and not config.lora.rank:
        raise UserError(f"{step} is of a run without LoRA: leave --adapter out")
    directory = model_directory(config)
    model = load_config(directory)
    setup = Setup(config, model, None, load_text(directory, model))
    trained = restore_params(step, setup.trainable_part(setup.param_shapes))
    if adapter:
        write_adapter(setup, trained, out)
    else:
        frozen = load_params(directory)[1] if config.lora.rank else {}
        with jax.default_matmul_precision(config.policy.matmul):
            write_policy(setup, trained, frozen, out)
    return step


def stored_config(step: Path) -> ConfigDict:
    """The config in a step's manifest; keys that are new since have their defaults. UserError."""
    runs = manifest.about(step).get("runs", {})
    if list(runs) != ["."]:
        why = "is of a sweep" if runs else "was made by an earlier version, which did not store its config"
        raise UserError(f"{step} {why}; with checkpoint.export=True a run leaves its policy/")
    stored, defaults = _values(runs["."]["config"]), base.get_config().to_dict()
    return ConfigDict(
        {
            name: {**(defaults.get(name) or {}), **value} if isinstance(value, dict) else value
            for name, value in {**defaults, **stored}.items()
        }
    )


def _values(value: Any) -> Any:
    """What `run_config.plain` has made plain, as it was."""
    if isinstance(value, dict):
        return {name: _values(one) for name, one in value.items()}
    if isinstance(value, list):
        return tuple(map(_values, value))
    return float(value) if value in ("inf", "-inf", "nan") else value


def main() -> None:
    parser = Parser(prog="python -m experiments.export", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="a run's folder, or its checkpoints/STEP")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model directory that is written")
    parser.add_argument("--adapter", action="store_true", help="of LoRA the adapters, not merged, in PEFT's files")
    arguments = parser.parse_args()
    step = export_step(arguments.checkpoint, arguments.out, adapter=arguments.adapter)
    print(f"wrote {arguments.out}, of {step}")


if __name__ == "__main__":
    run_main(main)

"""Writes the policy of a checkpoint in Hugging Face files, as `checkpoint.export` does at the end of a run.

    python -m experiments.export runs/mine --out exported                          # of the newest whole checkpoint
    python -m experiments.export runs/mine/checkpoints/40 --out exported           # of one step
    python -m experiments.export runs/mine --out exported --adapter                # of LoRA the adapters alone (PEFT)

The config is the one that the checkpoint holds; relative paths in it count from the current folder. All is done in
the host's memory, a weight at a time: no device must hold the model.
"""

import jax
from ml_collections import ConfigDict

from dppo_jax.errors import UserError, run_main
from dppo_jax.files import Path, names_in
from dppo_jax.models.companions import STAGING
from dppo_jax.models.hf import load_config, load_params
from dppo_jax.storage.checkpoint import manifest, restore_params, step_folder
from experiments.run.cli import Parser
from experiments.run.export import write_adapter, write_policy
from experiments.run.load import load_text
from experiments.run.model_files import model_directory
from experiments.run.setup import Setup
from experiments.run.stored_config import stored_config


def export_step(checkpoint: Path, out: Path, *, adapter: bool = False) -> Path:
    """Writes OUT, from a run's newest whole checkpoint or one step's folder, which is returned. UserError where it
    cannot be read, does not say its config, is of a sweep, or `adapter` is asked of a run without LoRA; and where OUT
    is there and holds anything."""
    if out.exists() and not (out.is_dir() and all(name.startswith(STAGING) for name in names_in(out))):
        raise UserError(f"--out {out} is not an empty folder; name a new one, so that nothing there is lost")
    step = step_folder(checkpoint)
    config = config_of(step)
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


def config_of(step: Path) -> ConfigDict:
    """The config in a step's manifest. UserError."""
    runs = manifest.about(step).get("runs", {})
    if list(runs) != ["."]:
        why = "is of a sweep" if runs else "was made by an earlier version, which did not store its config"
        raise UserError(f"{step} {why}; with checkpoint.export=True a run leaves its policy/")
    return stored_config(runs["."]["config"])


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

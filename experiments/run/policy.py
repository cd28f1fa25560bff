"""The policy that is evaluated: a model directory, a name on the hub, or what a run has trained."""

from contextlib import ExitStack
from typing import NamedTuple

from ml_collections import ConfigDict

from dppo_jax import lora
from dppo_jax.devices.sharding import check_divisible, laid_out, named_shardings
from dppo_jax.errors import UserError
from dppo_jax.files import Path, user_path
from dppo_jax.models.decoder import Params, abstract_params, param_axes
from dppo_jax.models.hf import place_params
from dppo_jax.storage import fingerprints, hub
from dppo_jax.storage.checkpoint import agree, restore_params, step_folder
from experiments.run.identity import same_config_everywhere
from experiments.run.load import load_setup
from experiments.run.setup import Setup


class Policy(NamedTuple):
    """A config on its devices, and the parameters that are evaluated."""

    setup: Setup
    params: Params
    step: Path | None  # the folder of the checkpoint that they are of

    def about(self, weights: str) -> dict[str, str]:
        """Where it is from, and a fingerprint; `weights` is that of the model directory. All hosts must call this."""
        c, step = self.setup.config, self.step
        found = {"path": c.policy.path, "commit": c.policy.commit}
        if step is None:
            return found | {"fingerprint": weights}
        trained = agree(lambda: fingerprints.of_files(step))
        fingerprint = f"{weights} {trained}" if c.lora.rank else trained  # adapters alone, or all there is
        return found | {"checkpoint": str(step), "fingerprint": fingerprint}


def load_evaluated(
    config: ConfigDict,
    stack: ExitStack,
    *,
    checkpoint: Path | None = None,
    policy: str | None = None,
    begun: Path | None = None,
    pin: bool = False,
) -> Policy:
    """What --checkpoint or --policy names, one of the two, on the devices of the config until `stack` closes.

    begun: a folder whose config.json has commits, in place of a checkpoint's run. pin: the step is chosen once, so that
    `about` is of it. UserError, one sentence, for whatever the user can mend.
    """
    if (checkpoint is None) == (policy is None):
        both = "are both missing: give one" if policy is None else "are both given: leave one out"
        raise UserError(f"--checkpoint DIR, of a run, and --policy DIR_OR_HUB, a model, {both}")
    if checkpoint is not None and _is_model(checkpoint):
        checkpoint, policy = None, str(checkpoint)
    same_config_everywhere(config)
    if policy is not None:
        config = with_policy(config, policy)
    elif begun is None and checkpoint is not None:
        begun = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    setup = load_setup(config, stack, begun=begun, unread=("data", "reward.model", "teacher"))
    assert setup.mesh is not None
    check_divisible(setup.mesh, {"eval.prompts": config.eval.prompts}, {}, {})
    if checkpoint is None:
        return Policy(setup, place_params(setup.directory, setup.model_shardings)[1], None)
    source = step_folder(checkpoint) if pin else checkpoint
    return Policy(setup, _trained(setup, source), source if pin else None)


def with_policy(config: ConfigDict, policy: str) -> ConfigDict:
    """The config with another policy: a directory, ORG/NAME or ORG/NAME@REVISION. UserError."""
    if not policy:
        raise UserError("--policy is empty: name a model directory, or ORG/NAME on the hub")
    config = config.copy_and_resolve_references()
    path, revision = policy, ""
    if not user_path(policy, "--policy").is_dir():
        name, at, after = policy.rpartition("@")
        if at and hub.is_name(name):
            path, revision = name, after
            if not after:
                raise UserError(f"--policy {policy} names no revision after its @; write {name}, or {name}@REVISION")
        elif not hub.is_name(policy):
            raise UserError(f"--policy: there is no directory {policy!r:.200}, and it is no name ORG/NAME on the hub")
    config.policy.path, config.policy.revision, config.policy.commit = path, revision, ""
    return config


def _is_model(folder: Path) -> bool:
    """Whether a folder is a Hugging Face directory."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors*"))


def _trained(setup: Setup, checkpoint: Path) -> Params:
    """The parameters of a run's checkpoint; of adapters, beside those of the model directory."""
    if not setup.config.lora.rank:
        return restore_params(checkpoint, laid_out(abstract_params(setup.model), setup.model_shardings))
    trained_model = setup.trained_model
    axes = named_shardings(setup.mesh, param_axes(trained_model))
    shardings_of_adapters, shapes = (lora.split(x)[0] for x in (axes, abstract_params(trained_model)))
    adapters = restore_params(checkpoint, laid_out(shapes, shardings_of_adapters))
    return lora.joined(place_params(setup.directory, setup.model_shardings)[1], adapters)

"""The trained policy, in Hugging Face files."""

from typing import Any

from dppo_jax.devices import hosts, peers
from dppo_jax.devices.sharding import to_host
from dppo_jax.errors import Stopped, writing
from dppo_jax.files import Path
from dppo_jax.lora import joined
from dppo_jax.models import save_hf
from dppo_jax.models.adapters import ADAPTER
from dppo_jax.models.decoder import LOG_SIGMA, Params
from dppo_jax.models.hf import stored_dtype
from dppo_jax.models.peft import save_adapters
from experiments.run.model_files import hub_name
from experiments.run.saving import AGAIN
from experiments.run.setup import Setup


def export(setup: Setup, trained: Params, frozen: Params, folder: Path) -> None:
    """Writes FOLDER/policy, adapters merged, and of LoRA FOLDER/adapter. All hosts must call this; one writes.

    `Stopped` where the run was asked to stop before; one that is under way is finished.
    """
    if peers.asked_to_stop():
        raise Stopped(f"asked to stop, after the last step and before {folder} has its model; {AGAIN} and writes that")
    write_policy(setup, trained, frozen, folder / "policy")
    if setup.config.lora.rank:
        write_adapter(setup, trained, folder / "adapter")


def write_policy(setup: Setup, trained: Params, frozen: Params, folder: Path) -> None:
    """Writes a model directory, adapters merged. All hosts must call this; one writes.

    A weight of one layer is merged and cast at a time, and a block of it gathered: the parameters stay where they are.
    """
    params = {key: value for key, value in joined(frozen, trained).items() if key != LOG_SIGMA}
    text, directory, config = setup.text, setup.directory, setup.config
    dtype, merge = config.checkpoint.export_dtype or stored_dtype(directory), setup.merge

    def merged_layer(layers: dict[str, Any], name: str, number: Any) -> Any:
        assert merge is not None
        own = {part: layers[part][number] for part in (name, *(name + a for a in ADAPTER)) if part in layers}
        return merge({"layers": own})["layers"][name]

    of_layer = None if merge is None else merged_layer
    with writing(folder):
        save_hf(
            folder,
            setup.model,
            params,
            text.tokenizer,
            dtype,
            eos_ids=text.eos_ids,
            source=directory,
            of_layer=of_layer,
        )


def write_adapter(setup: Setup, trained: Params, folder: Path) -> None:
    """Writes the adapters of LoRA in PEFT's files. All hosts must call this; one writes."""
    adapters, name = to_host(trained), hub_name(setup.config)
    commit = setup.config.policy.commit if name else None
    with writing(folder):
        if hosts.is_writer():
            save_adapters(folder, setup.trained_model, adapters, name or str(setup.directory), commit)

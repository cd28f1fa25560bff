"""The trained policy, in Hugging Face files."""


import jax

from dppo_jax.devices import hosts
from dppo_jax.devices.sharding import to_host
from dppo_jax.errors import writing
from dppo_jax.files import Path
from dppo_jax.models import save_hf
from dppo_jax.models.decoder import LOG_SIGMA
from dppo_jax.models.peft import save_adapters
from dppo_jax.train_step import TrainState
from experiments.run.model_files import hub_name
from experiments.run.setup import Setup


def export(setup: Setup, state: TrainState, folder: Path) -> None:
    """Writes FOLDER/policy, adapters merged, and of LoRA FOLDER/adapter. All hosts must call this; one writes."""
    policy = state.policy if setup.merge is None else jax.jit(setup.merge)(state.policy)
    params = {key: value for key, value in to_host(policy).items() if key != LOG_SIGMA}
    adapters = to_host(state.params) if setup.config.lora.rank else None
    if not hosts.is_writer():
        return
    text, directory = setup.text, setup.directory
    with writing(folder):
        save_hf(folder / "policy", setup.model, params, text.tokenizer, eos_ids=text.eos_ids, source=directory)
        if adapters:
            name = hub_name(setup.config)
            commit = setup.config.policy.commit if name else None
            save_adapters(folder / "adapter", setup.trained_model, adapters, name or str(directory), commit)

"""experiments.export: the policy of any checkpoint, as the run itself would have exported it there."""

import pytest

from dppo_jax.errors import UserError
from experiments.export import export_step
from tests.helpers.fixtures import contents, hurried, run, small_config, tiny


@pytest.mark.parametrize("rank", [0, 2])
def test_a_checkpoint_is_exported_as_its_run_did_to_the_bit(tmp_path, tmp_path_factory, rank):
    changes = dict(lora__rank=rank, checkpoint__export=True, checkpoint__every=1, loss__delta_high=float("inf"))
    changes |= dict(loss__delta_low=0.1, steps=2)
    with hurried(tmp_path_factory):
        run(small_config(tiny(tmp_path_factory), **changes), tmp_path / "run")
    assert export_step(tmp_path / "run", tmp_path / "newest").name == "2"
    assert contents(tmp_path / "newest") == contents(tmp_path / "run" / "policy")
    assert export_step(tmp_path / "run" / "checkpoints" / "1", tmp_path / "earlier").name == "1"
    names = {name: data != contents(tmp_path / "newest")[name] for name, data in contents(tmp_path / "earlier").items()}
    assert names.keys() == contents(tmp_path / "newest").keys() and names["model.safetensors"]
    if rank:
        export_step(tmp_path / "run", tmp_path / "adapter", adapter=True)
        assert contents(tmp_path / "adapter") == contents(tmp_path / "run" / "adapter")
    else:
        with pytest.raises(UserError, match="is of a run without LoRA: leave --adapter out"):
            export_step(tmp_path / "run", tmp_path / "adapter", adapter=True)
    (tmp_path / "killed" / ".saving-1").mkdir(parents=True)  # what a killed export leaves
    (tmp_path / "killed" / ".saving-1" / "model.safetensors").write_bytes(b"half")
    export_step(tmp_path / "run", tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "newest")
    own, before = tmp_path / "run", contents(tmp_path / "run")
    for out in (own, own / "checkpoints", tmp_path / "newest", own / "config.json"):
        with pytest.raises(UserError, match="is not an empty folder; name a new one"):
            export_step(own, out)
    assert contents(own) == before

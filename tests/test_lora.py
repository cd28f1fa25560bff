"""Adapters: the same as merged weights, trained alone, kept alone, and written as PEFT writes them."""

import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from configs import quickstart
from dppo_jax import lora
from dppo_jax.errors import UserError
from dppo_jax.models import load_policy
from dppo_jax.models.config import MATRICES, Lora
from dppo_jax.models.decoder import forward, init_params, param_axes
from dppo_jax.models.hf import load_params, save_hf
from dppo_jax.models.peft import load_adapters, save_adapters
from dppo_jax.packing import plan
from dppo_jax.storage.run_log import read_scalars
from dppo_jax.types import TrainBatch
from experiments import eval
from experiments.run import checks
from experiments.run.setup import Setup
from experiments.sweep import Run as SweptRun
from experiments.sweep import train as sweep
from tests.helpers.fixtures import HURRIED_FLAGS, TINY, Run, hurried, run, run_config, same, tiny, tokenizer
from tests.helpers.places import ROOT
from tests.models.test_moe import MOE

FAMILIES = {
    "qwen3, tied": TINY,
    "llama, untied": dataclasses.replace(TINY, model_type="llama", qk_norm=False, tie_embeddings=False),
    "qwen2, biased": dataclasses.replace(TINY, model_type="qwen2", qk_norm=False, qkv_bias=True),
    "qwen3_moe": MOE,
}
EVERY = Lora(rank=3, alpha=6.0, targets=MATRICES)
SETTINGS = dict(lora__rank=3, lora__alpha=6.0)


def adapted(family: str, chosen: Lora = EVERY):
    """(plain config, config with adapters, parameters whose B is not 0)."""
    plain = FAMILIES[family]
    whole = dataclasses.replace(plain, lora=chosen)
    params = init_params(whole, jax.random.key(0))
    params["embed"] = 50 * params["embed"]
    draw = np.random.default_rng(0).normal
    for name, value in params["layers"].items():
        if name.endswith("_lora_b"):
            params["layers"][name] = jnp.asarray(0.1 * draw(size=value.shape), jnp.float32)
    return plain, whole, params


def states(config, params, dtype=jnp.float32):
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 11)).astype(np.int32)
    with jax.default_matmul_precision("highest"):
        return forward(config, params, tokens, np.ones(tokens.shape, bool), dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [MATRICES, ("v", "down")])
def test_merged_weights_compute_what_the_adapters_do(family, targets):
    chosen = dataclasses.replace(EVERY, targets=targets)
    plain, whole, params = adapted(family, chosen)
    with jax.default_matmul_precision("highest"):
        merged = lora.merged(params, chosen.scale)
    assert not any("lora" in name for name in merged["layers"])
    beside = states(whole, params)
    np.testing.assert_allclose(states(plain, merged), beside, atol=1e-5)
    assert np.abs(states(plain, lora.split(params)[1]) - beside).max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_through_merged_weights(family):
    plain, whole, params = adapted(family)
    trained, frozen = lora.split(params)
    probe = jnp.asarray(np.random.default_rng(2).normal(size=states(plain, frozen).shape), jnp.float32)

    def beside(trained):
        return jnp.vdot(probe, states(whole, lora.joined(frozen, trained)))

    def through(trained):
        return jnp.vdot(probe, states(plain, lora.merged(lora.joined(frozen, trained), EVERY.scale)))

    found, right = (jax.jit(jax.grad(function))(trained) for function in (beside, through))
    assert len(found["layers"]) == 14
    for name, gradient in found["layers"].items():
        scale = np.abs(right["layers"][name]).max()
        assert scale > 1e-3, name
        np.testing.assert_allclose(gradient, right["layers"][name], atol=1e-5 * max(1, scale), err_msg=name)


@pytest.mark.parametrize("family", ["qwen3, tied", "qwen3_moe"])
def test_adapters_begin_as_nothing_and_shard_as_their_weights(family):
    plain, whole = FAMILIES[family], dataclasses.replace(FAMILIES[family], lora=EVERY)
    params = init_params(whole, jax.random.key(0))
    trained, frozen = lora.split(params)
    jax.tree.map(np.testing.assert_array_equal, frozen, init_params(plain, jax.random.key(0)))
    np.testing.assert_array_equal(states(whole, params), states(plain, frozen))
    axes = param_axes(whole)["layers"]
    for name in MATRICES:
        *several, inner, outer = axes[name]
        assert axes[name + "_lora_a"] == (*several, inner, "rank")
        assert axes[name + "_lora_b"] == (*several, "rank", outer)
        a = trained["layers"][name + "_lora_a"]
        bound = 1 / math.sqrt(frozen["layers"][name].shape[-2])
        assert 0.9 * bound < np.abs(a).max() <= bound and a.dtype == jnp.float32
        assert not trained["layers"][name + "_lora_b"].any()


@pytest.mark.parametrize("family", ["qwen2, biased", "qwen3_moe"])
def test_peft_files_have_its_names_and_shapes_and_are_read_back(family, tmp_path):
    _, whole, params = adapted(family)
    save_adapters(tmp_path, whole, params, "some/model")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    mlp = "mlp.experts.5." if whole.num_experts else "mlp."
    d, width = whole.hidden_size, whole.intermediate_size
    for module, shape in {
        "self_attn.k_proj": (d, 16),
        "self_attn.o_proj": (32, d),
        mlp + "down_proj": (width, d),
    }.items():
        name = f"base_model.model.model.layers.1.{module}.lora_"
        assert tensors[name + "A.weight"].shape == (3, shape[0])
        assert tensors[name + "B.weight"].shape == (shape[1], 3)
    assert len(tensors) == 2 * whole.num_layers * (4 + 3 * max(1, whole.num_experts))
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA" and fields["base_model_name_or_path"] == "some/model"
    assert fields["r"] == 3 and fields["lora_alpha"] == 6
    projections = {f"{name}_proj" for name in MATRICES}
    assert set(fields["target_modules"]) == projections
    found, adapters = load_adapters(tmp_path, FAMILIES[family])
    assert found == EVERY
    jax.tree.map(np.testing.assert_array_equal, adapters, jax.device_get(lora.split(params)[0]))
    with pytest.raises(UserError, match="which this model has no place for|has no 'base_model"):
        load_adapters(tmp_path, dataclasses.replace(FAMILIES[family], num_layers=1))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="holds no adapters that can be read"):
        load_adapters(tmp_path, FAMILIES[family])


# --- runs ---


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Run:
    return run(run_config(folder, **SETTINGS), tmp_path_factory.mktemp("lora") / "run")


def saved(folder: Path, step: int):
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        return manager.restore(step, args=ocp.args.StandardRestore())


def test_a_checkpoint_holds_adapters_and_their_moments_alone(finished):
    state = saved(finished.folder, 4)
    assert state["params"].keys() == {"layers"}
    assert all("_lora_" in name for name in state["params"]["layers"])
    moments = [leaf for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim]
    assert sum(m.size for m in moments) == 2 * sum(p.size for p in jax.tree.leaves(state["params"]))
    for name, value in saved(finished.folder, 2)["params"]["layers"].items():
        assert (value != state["params"]["layers"][name]).any(), name


def test_the_export_is_the_base_with_the_adapters_merged(finished, folder):
    base = load_params(folder / "model")[1]
    chosen, adapters = load_adapters(finished.folder / "adapter", TINY)
    jax.tree.map(np.testing.assert_array_equal, adapters, saved(finished.folder, 4)["params"])
    assert chosen == EVERY
    right = lora.merged(lora.joined(base, adapters), chosen.scale)
    found = load_policy(finished.folder / "policy").params
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found, jax.device_get(right))
    for name in ("embed", "final_norm"):
        np.testing.assert_array_equal(found[name], base[name])
    for name in ("attn_norm", "q_norm", "mlp_norm"):
        np.testing.assert_array_equal(found["layers"][name], base["layers"][name])
    assert np.abs(found["layers"]["q"] - base["layers"]["q"]).max() > 1e-3


def test_the_eval_command_says_the_same_of_run_checkpoint_and_export(finished):
    of_run = eval.evaluate(finished.config, finished.folder)
    assert eval.evaluate(finished.config, finished.folder / "policy") == of_run
    assert eval.evaluate(finished.config, finished.folder / "checkpoints" / "4") == of_run


def test_a_checkpoint_of_other_adapters_is_refused_in_a_sentence(finished, folder, tmp_path):
    for changes in ({}, SETTINGS | dict(lora__rank=2), SETTINGS | dict(lora__targets=("q",))):
        with pytest.raises(UserError, match="checkpoint 4 of this run does not fit the config's model"):
            eval.evaluate(run_config(folder, **changes), finished.folder)
        copied = shutil.copytree(finished.folder, tmp_path / str(len(list(tmp_path.iterdir()))))
        with pytest.raises(UserError, match="with another config: lora"):
            run(run_config(folder, steps=5, **changes), copied)


def test_base_weights_stay_to_the_bit_and_adapters_move(folder):
    config = run_config(folder, **SETTINGS)
    base = load_params(folder / "model")[1]
    setup = Setup(config, TINY)
    state = setup.init_state(base)
    before = jax.device_get(state.policy)
    batch, plan = a_batch(config, setup.pack_shape)
    update = jax.jit(setup.update, donate_argnums=0)
    for _ in range(3):
        state, metrics = update(state, batch, plan)
    after = jax.device_get(state.policy)
    moved = {name for name in after["layers"] if (after["layers"][name] != before["layers"][name]).any()}
    assert moved == {name for name in after["layers"] if "_lora_" in name}
    jax.tree.map(np.testing.assert_array_equal, state.frozen, base)
    assert metrics.sums["grad_norm"][0] > 0


def a_batch(config, layout):
    """Random responses with random advantages, and the plan of all of them."""
    rng = np.random.default_rng(0)
    count, length = 8, config.rollout.max_new_tokens
    tokens = lambda width: rng.integers(2, TINY.vocab_size, (count, width)).astype(np.int32)  # noqa: E731
    batch = TrainBatch(
        prompt_tokens=tokens(config.data.max_prompt_len),
        prompt_mask=np.ones((count, config.data.max_prompt_len), bool),
        tokens=tokens(length),
        mask=np.ones((count, length), bool),
        behavior_logp=np.full((count, length), -2.6, np.float32),
        advantages=rng.normal(size=count).astype(np.float32),
        group=np.arange(count, dtype=np.int32) // config.rollout.group_size,
    )
    widths = np.full(count, config.data.max_prompt_len)
    return batch, plan(np.arange(count), widths, np.full(count, length), layout)


# Everything that keeps parameters of its own beside the policy's.
COMPANY = {
    "plain": {},
    "lag and exact": dict(rollout__lag=3, loss__name="dppo_exact_tv", loss__delta_low=0.01, loss__delta_high=0.01),
    "reference and noise": dict(reference__coef=0.1, alp__sigma=0.01),
    "critic and proximal": dict(advantage__name="gae", loss__name="dppo_binary_tv_proximal"),
    "ahead": dict(train__staleness=1),
}


@pytest.mark.parametrize("name", COMPANY)
def test_a_resumed_run_is_the_one_that_was_never_stopped(name, folder, tmp_path):
    changes = SETTINGS | COMPANY[name] | dict(checkpoint__every=2)
    run(run_config(folder, **changes), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for gone in ("checkpoints/4", "policy", "adapter"):
        shutil.rmtree(tmp_path / "parts" / gone)
    run(run_config(folder, **changes), tmp_path / "parts")
    same(tmp_path / "whole", tmp_path / "parts")
    scalars = read_scalars(tmp_path / "whole")
    assert (scalars["grad_norm"][1] > 0).all()
    mismatch = scalars["mismatch/abs_prob_diff_max"][1]
    if name in ("plain", "critic and proximal"):
        assert (mismatch < 1e-5).all()  # merged weights in the rollout, adapters beside them in training
    if name == "reference and noise":
        assert scalars["loss/reference_kl"][1][0] < 0.1 < 10 * scalars["loss/reference_kl"][1][-1] + 0.1
    files = [load_file(tmp_path / part / "adapter" / "adapter_model.safetensors") for part in ("whole", "parts")]
    jax.tree.map(np.testing.assert_array_equal, *files)


def test_a_mixture_is_trained_and_exported(folder, tmp_path):
    model = dataclasses.replace(MOE, vocab_size=TINY.vocab_size)
    broken = shutil.copytree(folder, tmp_path / "folder")
    save_hf(broken / "model", model, init_params(model, jax.random.key(1)), tokenizer())
    run(run_config(broken, rollout__router_replay=True, **SETTINGS), tmp_path / "run")
    base, found = (load_params(path)[1]["layers"] for path in (broken / "model", tmp_path / "run" / "policy"))
    moved = {name for name in base if (base[name] != found[name]).any()}
    assert moved == set(MATRICES)  # the router among those that stay
    assert (read_scalars(tmp_path / "run")["mismatch/abs_prob_diff_max"][1] < 1e-4).all()


def test_eight_devices_train_the_same_adapters(tmp_path):
    flags = f"--xla_force_host_platform_device_count=8 {HURRIED_FLAGS}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "tests.helpers.lora_devices", str(tmp_path / "found.json")]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["same_tokens"] and found["base"] == 0
    assert found["adapters"] < 1e-5 < 1e-3 < found["largest_b"]
    assert set(found["pieces"].values()) == {2}  # the side that is not the rank, over fsdp or tensor


def test_the_embedded_model_learns_to_add(tmp_path):
    """configs/quickstart.py with adapters: from 0.54 to 0.9 in six steps."""
    config = quickstart.get_config()
    config.lora.rank, config.lora.alpha, config.optimizer.learning_rate = 8, 16.0, 1e-3
    config.steps, config.eval.every, config.compile_cache = 6, 0, ""
    run(config, tmp_path / "run")
    reward = read_scalars(tmp_path / "run")["reward/mean"][1]
    assert reward[0] < 0.65 and reward[-2:].mean() > 0.8


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(lora__rank=-1), "lora.rank must be at least 0, not -1"),
        (dict(lora__rank=2, lora__alpha=0.0), "lora.alpha must be above 0, not 0.0"),
        (dict(lora__rank=2, lora__targets=()), "must name at least one matrix"),
        (dict(lora__rank=2, lora__targets=("q", "q")), "lora.targets names 'q' twice"),
        (dict(lora__rank=2, lora__targets=("q", "gates")), "lora.targets.*'gate'"),
    ],
)
def test_what_cannot_be_is_refused(folder, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        checks.check(run_config(folder, **changes))


def test_a_sweep_does_without(folder, tmp_path):
    with pytest.raises(UserError, match="a sweep does without lora.rank"):
        sweep(run_config(folder, eval__every=0, **SETTINGS), [SweptRun("cispo", 0, 1.0)], tmp_path)

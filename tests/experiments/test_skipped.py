"""Updates that are not finite: skipped to the bit, counted, kept, and run again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from dppo_jax import teacher_forced
from dppo_jax.errors import UserError
from dppo_jax.losses import LOSSES
from dppo_jax.metrics import Metrics
from dppo_jax.optimizer import make_optimizer, make_schedule
from dppo_jax.skipping import taken_if_finite
from dppo_jax.storage.run_config import flatten, plain
from dppo_jax.storage.run_log import read_scalars
from dppo_jax.train_step import TrainState, init_state
from experiments.replay import read_kept, replay
from experiments.run import cli
from experiments.run.stored_config import stored_config
from experiments.sft import tune
from tests.helpers.fixtures import VOCABULARY, hurried, run, small_config, tiny

LAYER, MATRIX, PAIR = 1, "down", (" ", "+")  # a gradient of NaN where a row has this pair of tokens

# A loss of a user's own, on exact divergences.
OWN = """
from pathlib import Path

from dppo_jax.losses import LOSSES, from_keep, require
from tests.helpers.fixtures import small_config


def own(inputs, *, most, ratio_cap):
    return from_keep(inputs, require(inputs, "exact.tv") <= most, ratio_cap=ratio_cap)


LOSSES["own"] = own


def get_config():
    config = small_config(Path({folder!r}), **{changes!r})
    config.loss.update(name="own", most=0.1, ratio_cap=2.0)
    return config
"""

SLOWLY = dict(steps=3, optimizer__learning_rate=1e-4)  # so that replies stay as varied as they were


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture
def planted(monkeypatch):
    plant(monkeypatch, MATRIX, PAIR)


def plant(monkeypatch, matrix: str, of_tokens: tuple[str, str]) -> None:
    """Makes the gradient of the training pass NaN in one matrix of one layer where the pair is among the tokens."""

    @jax.custom_vjp
    def fault(weight, present):
        return weight

    def backward(present, grad):
        return jnp.where(present, grad.at[LAYER, 1].set(jnp.nan), grad), None

    fault.defvjp(lambda weight, present: (weight, present), backward)
    forward, (first, second) = teacher_forced.forward_routed, (VOCABULARY[token] for token in of_tokens)

    def forward_routed(config, params, tokens, segments, *arguments, **settings):
        pair = (tokens[:, :-1] == first) & (tokens[:, 1:] == second)
        present = jnp.any(pair & (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0))
        if matrix not in params["layers"]:  # the behavior policy's, merged
            return forward(config, params, tokens, segments, *arguments, **settings)
        layers = {**params["layers"], matrix: fault(params["layers"][matrix], present)}
        return forward(config, {**params, "layers": layers}, tokens, segments, *arguments, **settings)

    monkeypatch.setattr(teacher_forced, "forward_routed", forward_routed)
    jax.clear_caches()


def test_a_planted_nan_is_skipped_counted_kept_and_named(tmp_path_factory, tmp_path, planted, capsys):
    config = small_config(tiny(tmp_path_factory), **SLOWLY, train__max_skipped=50, train__minibatches=4)
    done = run(config, tmp_path / "run")
    skipped = read_scalars(tmp_path / "run")["update/skipped"][1]
    assert 0 < skipped.sum() < 12 and done.said.count("is skipped, since its gradient is not finite") == skipped.sum()
    assert all(np.isfinite(values).all() for _, values in read_scalars(tmp_path / "run").values())
    kept = sorted((tmp_path / "run" / "skipped").iterdir())
    assert len(kept) == min(skipped.sum(), 3)
    for folder in kept:
        found = read_kept(folder)
        wanted = {}
        for row in found.plan.batch_rows.tolist():
            reply = found.batch.tokens[row][found.batch.mask[row]].tolist()
            last = found.batch.prompt_tokens[row][-1:].tolist()
            pairs = list(zip(last + reply, reply, strict=False))
            bad = tuple(VOCABULARY[token] for token in PAIR)
            if bad in pairs:
                wanted[row] = pairs.index(bad)
        assert wanted
        capsys.readouterr()
        sentence, printed = replay(folder), capsys.readouterr().out
        assert f"the gradient of layer {LAYER}, in {MATRIX}, is not finite, because of" in sentence
        for row, position in wanted.items():
            assert f"row {row}, position {position}: '{PAIR[1]}' after" in printed
        assert printed.count("position") == len(wanted)


def test_without_the_fault_a_replay_says_so(tmp_path_factory, tmp_path, monkeypatch):
    """And a run ends with the sentence after so many in a row: one of LoRA, under a loss of its own config file."""
    changes = dict(**SLOWLY, train__max_skipped=1, lora__rank=2)
    (tmp_path / "own.py").write_text(OWN.format(folder=str(tiny(tmp_path_factory)), changes=changes))
    config = cli.load_config(str(tmp_path / "own.py"), [])
    matrix = f"{MATRIX}_lora_b"
    plant(monkeypatch, matrix, PAIR)
    with pytest.raises(UserError, match="so training stops; its minibatch is kept in .*; there is no checkpoint"):
        run(config, tmp_path / "run")
    (folder,) = (tmp_path / "run" / "skipped").iterdir()
    del LOSSES["own"]
    with pytest.raises(UserError, match="no loss is called 'own' here: name the config file that adds it"):
        replay(folder)
    found = replay(folder, str(tmp_path / "own.py"))
    assert f"the gradient of layer {LAYER}, in {matrix}, is not finite, because of row" in found
    monkeypatch.undo()
    jax.clear_caches()
    with pytest.raises(UserError, match="the fault is not there again: all gradients are finite here"):
        replay(folder, str(tmp_path / "own.py"))
    with pytest.raises(UserError, match="holds no update.safetensors"):
        replay(tmp_path)
    kept = load_file(folder / "update.safetensors")
    assert kept[f"params/layers/{matrix}"].shape == (2, 2, 32) and "params/layers/down" not in kept
    assert kept[f"behavior_params/layers/{matrix}"].shape == (2, 2, 32)
    assert flatten(plain(stored_config(plain(config.to_dict())).to_dict())) == flatten(plain(config.to_dict()))


def test_an_update_of_sft_is_replayed(tmp_path_factory, tmp_path, monkeypatch, capsys):
    """Its faulty token is the first of a completion."""
    plant(monkeypatch, MATRIX, ("=", "2"))
    config = small_config(tiny(tmp_path_factory), sft__batch=18, sft__column="answer", train__max_skipped=1)
    with pytest.raises(UserError, match="step 0: the update 0 was skipped"):
        tune(config, tmp_path / "run")
    capsys.readouterr()
    sentence, printed = replay(tmp_path / "run" / "skipped" / "0_0"), capsys.readouterr().out
    assert f"step 0, update 0: the gradient of layer {LAYER}, in {MATRIX}, is not finite, because of row" in sentence
    assert printed.count("position 0: '2' after") == printed.count("position") == 9  # 3 of 6 sums, in 3 forms


@pytest.mark.parametrize("fault", ["loss", "norm", None])
def test_a_skipped_update_leaves_the_state_to_the_bit(fault):
    schedule = make_schedule(learning_rate=0.1, warmup=0, schedule="linear", updates=10)
    optimizer = make_optimizer(schedule, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
    before = init_state({"w": jnp.arange(1.0, 5.0)}, optimizer)
    measured = Metrics({"policy/entropy": (jnp.float32(np.nan), jnp.float32(2.0))}, {}, {})

    @jax.jit
    def update(state, bad):
        grads = {"w": jnp.full(4, 0.5)}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        after = TrainState(optax.apply_updates(state.params, updates), opt_state, state.updates + 1)
        loss, norm = (jnp.where(bad[name], jnp.nan, 1.0) for name in ("loss", "norm"))
        return taken_if_finite(state, after, measured, loss=loss, norm=norm)

    none = {"loss": False, "norm": False}
    after, found = update(before, none | ({fault: True} if fault else {}))
    assert int(after.updates) == 1 and int(found.sums["update/skipped"][0]) == (fault is not None)
    (adam, _, counted) = after.opt_state[1]
    assert int(counted.count) == 1 and int(adam.count) == (fault is None)
    if fault is None:
        assert (np.asarray(after.params["w"]) != np.asarray(before.params["w"])).all()
        return
    np.testing.assert_array_equal(after.params["w"], before.params["w"])
    np.testing.assert_array_equal(adam.mu["w"], before.opt_state[1][0].mu["w"])
    assert found.sums["policy/entropy"] == (0.0, 0.0)
    assert found.histograms["not_finite/update/skipped"].sum() == 1

"""Every row of LOSSES against float64, and what a loss must do with masked, extreme and missing inputs."""

import functools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.errors import UserError
from dppo_jax.losses import LOSSES, LossInputs, LossOutput, TopKPair, bind_loss, policy_objective, required_fields
from tests.helpers.places import GOLDEN

LOSSES_FILE = GOLDEN / "losses" / "losses.npz"
RUN = {"eager": lambda f: f, "jit": jax.jit}
CASES = [("k1", "jit"), ("k3", "jit"), ("k3", "eager"), ("k20", "jit"), ("ties", "jit")]
TRACKED = ("topk.logp", "topk.behavior_logp", "topk.proximal_logp")
FIELDS = ("logp", "behavior_logp", "advantages", "proximal_logp", *TRACKED)


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(LOSSES_FILE) as file:
        return dict(file)


def table(case: str) -> dict[str, list[dict]]:
    return json.loads(str(golden()["json/ties" if case == "ties" else "json/settings"]))


SETTINGS = table("k1")
NAMES = sorted(SETTINGS)
NEEDS = {
    name: frozenset(
        ({"topk"} if "topk" in name else set())
        | ({"proximal_logp"} if name.endswith("_proximal") or name.startswith("minirl") else set())
    )
    for name in NAMES
}


def arrays(case: str) -> dict[str, np.ndarray]:
    return {name.split("/")[1]: x for name, x in golden().items() if name.startswith(case + "/")}


def rows(case: str, name: str) -> list[int]:
    """Where the settings of one loss stand in the golden arrays."""
    flat = [n for n, several in table(case).items() for _ in several]
    return [i for i, n in enumerate(flat) if n == name]


def inputs_of(z: dict[str, np.ndarray]) -> LossInputs:
    x = {name: jnp.asarray(value) for name, value in z.items()}
    tracked = TopKPair(
        logp=x["topk_logp"],
        behavior_logp=x["topk_behavior_logp"],
        has_sampled=x["has_sampled"],
        proximal_logp=x["topk_proximal_logp"],
    )
    names = ("logp", "behavior_logp", "advantages", "mask", "proximal_logp")
    return LossInputs(**{name: x[name] for name in names}, topk=tracked)


def only(inputs: LossInputs, needs: frozenset[str]) -> LossInputs:
    """The inputs without the optional fields that are not needed."""
    if "topk" not in needs:
        inputs = inputs.replace(topk=None)
    if "proximal_logp" not in needs:
        inputs = inputs.replace(proximal_logp=None)
        if inputs.topk is not None:
            inputs = inputs.replace(topk=inputs.topk.replace(proximal_logp=None))
    return inputs


def spoil(inputs: LossInputs, field: str, value: float) -> LossInputs:
    """`value` outside the mask of one field ("topk.logp" reaches into the pair)."""
    if field.startswith("topk."):
        return inputs.replace(topk=spoil_one(inputs.topk, field[5:], inputs.mask, value))
    return spoil_one(inputs, field, inputs.mask, value)


def spoil_one(holder, field, mask, value):
    x = getattr(holder, field)
    where = mask if x.ndim == mask.ndim else mask[..., None]
    return holder.replace(**{field: jnp.where(where, x, value)})


def value_and_grad(loss, inputs: LossInputs, weights):
    """(the loss's output, objective, its gradient with respect to logp through the loss as well)."""

    def objective(logp):
        out = loss(inputs.replace(logp=logp))
        return policy_objective(out.coef, weights, logp, inputs.mask), out

    (value, out), grad = jax.value_and_grad(objective, has_aux=True)(inputs.logp)
    return out, value, grad


def every_loss(settings: dict[str, list[dict]], inputs: LossInputs, weights) -> dict[str, list]:
    """Each loss under each of its settings, given only the fields that it needs."""
    return {
        name: [value_and_grad(partial(LOSSES[name], **h), only(inputs, NEEDS[name]), weights) for h in several]
        for name, several in settings.items()
    }


def compiled(settings: dict[str, list[dict]], run: str):
    return RUN[run](partial(every_loss, settings))


# Golden values


WEIGHTS = np.random.RandomState(0).uniform(0.001, 0.1, (6, 40)).astype(np.float32)


def worst(got, want) -> float:
    return (np.abs(np.asarray(got, np.float64) - want) / np.maximum(1, np.abs(want))).max()


@pytest.mark.parametrize("case, run", CASES)
def test_coefficients_masks_and_gradients_equal_the_float64_definition(case, run):
    z = arrays(case)
    found = compiled(table(case), run)(inputs_of(z), WEIGHTS)
    for name in NAMES:
        for row, (out, value, grad) in zip(rows(case, name), found[name], strict=True):
            want, keep = z["coef"][row], z["keep"][row]
            np.testing.assert_array_equal(out.keep, keep, name)
            assert worst(out.coef, want) <= 2e-5, name
            assert (np.asarray(out.coef)[~keep] == 0).all(), name
            assert np.isfinite(value), name
            assert worst(grad, -WEIGHTS * want) <= 2e-5, name
            check_output(out, z["mask"], name)


def check_output(out: LossOutput, mask: np.ndarray, name: str) -> None:
    assert isinstance(out, LossOutput)
    for x, dtype in ((out.coef, jnp.float32), (out.keep, bool)):
        assert x.shape == mask.shape and x.dtype == dtype, name
    for key, (metric, where) in out.metrics.items():
        assert metric.shape == where.shape == mask.shape, (name, key)
        assert metric.dtype == jnp.float32 and where.dtype == bool, (name, key)
        assert not (where & ~mask).any(), (name, key)


def test_every_loss_is_in_the_golden_file():
    assert set(NAMES) <= set(LOSSES)  # the others: test_methods
    for name in NAMES:  # and the file's data makes each mask act
        cases = map(arrays, ("k1", "k3", "k20"))
        masked = sum((~z["keep"][i] & z["mask"]).sum() for z in cases for i in rows("k1", name))
        assert (masked == 0) == (name in ("pg_is", "cispo"))


# Conventions of the table, by hand


def one(logp, behavior_logp, advantage, proximal_logp) -> LossInputs:
    """A single token, which is also the only tracked one."""
    pi, mu, prox, adv = (jnp.full((1, 1), x, jnp.float32) for x in (logp, behavior_logp, proximal_logp, advantage))
    yes = jnp.ones((1, 1), bool)
    tracked = TopKPair(logp=pi[..., None], behavior_logp=mu[..., None], has_sampled=yes, proximal_logp=prox[..., None])
    return LossInputs(logp=pi, behavior_logp=mu, advantages=adv, mask=yes, proximal_logp=prox, topk=tracked)


def kept(name, inputs, **hyperparameters) -> bool:
    return bool(LOSSES[name](inputs, **hyperparameters, ratio_cap=5.0).keep[0, 0])


def test_losses_are_equal_if_their_function_and_numbers_are():
    numbers = dict(delta_low=0.1, delta_high=0.2, ratio_cap=5.0)
    one, same, other = (bind_loss("dppo_binary_tv", numbers | more) for more in ({}, {}, {"delta_low": 0.2}))
    assert one == same and hash(one) == hash(same) and one != other
    assert one != bind_loss("dppo_binary_kl", numbers)


@pytest.mark.parametrize("name", NAMES)
def test_the_cap_truncates_the_weight_and_does_not_remove_it(name):
    for log_ratio in (0.0, 1.0, 5.0, 20.0, 39.0):
        inputs = one(-0.5, -0.5 - log_ratio, -2.0, -0.5)
        for cap in (3.0, float("inf")):
            out = LOSSES[name](inputs, **{**SETTINGS[name][0], "ratio_cap": cap})
            assert out.coef[0, 0] == pytest.approx(-2 * min(np.exp(log_ratio), cap), rel=1e-5)


def test_a_divergence_equal_to_its_threshold_is_kept_but_minimal_mask_drops_it():
    fallen, risen = one(-np.inf, 0, -1, 0), one(0, -np.inf, 1, -np.inf)  # |pi - mu| is exactly 1
    for name in ("dppo_binary_tv", "dppo_topk_tv", "dppo_binary_tv_proximal", "dppo_topk_tv_proximal"):
        assert kept(name, fallen, delta_low=1.0, delta_high=0.5)
        assert kept(name, risen, delta_low=0.5, delta_high=1.0)
        assert not kept(name, fallen, delta_low=0.999, delta_high=2.0)
        assert not kept(name, risen, delta_low=2.0, delta_high=0.999)
    assert not kept("minimal_mask", fallen, delta_low=1.0)
    assert kept("minimal_mask", fallen, delta_low=1.001)
    assert kept("minimal_mask", risen, delta_low=0.1)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("pg_is", "cispo")])
def test_thresholds_guard_their_own_side_and_zero_advantage_is_kept(name):
    """high guards A > 0, low guards A < 0; an update that brings pi back towards its anchor passes."""

    def thresholds(low, high):  # alpha = 0 lifts nothing
        side = {"low": low, "high": high}
        return {key: side.get(key.split("_")[-1], 0.0) for key in SETTINGS[name][0] if key != "ratio_cap"}

    for advantage in (-1.0, 0.0, 1.0):
        for pi, anchor in ((0.1, 0.9), (0.9, 0.1)):
            inputs = one(np.log(pi), np.log(anchor), advantage, np.log(anchor))
            assert kept(name, inputs, **thresholds(low=0.01, high=99)) == (not (advantage < 0 and pi < anchor))
            if name != "minimal_mask":
                assert kept(name, inputs, **thresholds(low=99, high=0.01)) == (not (advantage > 0 and pi > anchor))


def test_relaxed_clips_are_lifted_only_below_alpha_and_on_their_side():
    eps = dict(eps_low=0.2, eps_high=0.2)
    for mu, alpha, lifted in ((0.1, 0.2, True), (0.3, 0.2, False), (1.0, 1.0, False)):  # mu = alpha: not lifted
        down = one(np.log(mu / 2), np.log(mu), -1, 0)
        assert kept("relax_low", down, **eps, alpha=alpha) == lifted
        assert not kept("relax_high", down, **eps, alpha=alpha)
        assert kept("relax_both", down, **eps, alpha=alpha) == lifted
    for mu, lifted in ((0.1, True), (0.3, False)):
        up = one(np.log(mu * 2), np.log(mu), 1, 0)
        assert kept("relax_high", up, **eps, alpha=0.2) == lifted
        assert not kept("relax_low", up, **eps, alpha=0.2)
        assert kept("relax_both", up, **eps, alpha=0.2) == lifted


def test_the_proximal_policy_anchors_the_mask_and_never_the_weight():
    """The default of one name for both anchors silently changed the algorithm elsewhere."""
    rare, likely = np.log(0.2), np.log(0.8)
    near_proximal, near_behavior = one(likely, rare, 1, likely), one(likely, likely, 1, rare)
    for name in ("minirl", *(n for n in NAMES if n.endswith("_proximal"))):
        plain = {"minirl": "clip_higher"}.get(name, name.removesuffix("_proximal"))
        h = SETTINGS[name][0] | {"ratio_cap": 5.0}
        assert LOSSES[name](near_proximal, **h).coef[0, 0] == pytest.approx(4.0, rel=1e-5)
        assert not LOSSES[plain](near_proximal, **h).keep[0, 0]
        assert not LOSSES[name](near_behavior, **h).keep[0, 0]
        assert LOSSES[plain](near_behavior, **h).coef[0, 0] == 1


# Masked, extreme and missing inputs


FIRST = {name: several[:1] for name, several in SETTINGS.items()}
UNCAPPED = {name: [{**several[0], "ratio_cap": float("inf")}] for name, several in SETTINGS.items()}


@pytest.mark.parametrize("run", RUN)
def test_what_is_outside_the_mask_is_never_seen(run):
    z = arrays("k3")
    inputs = inputs_of(z)
    at_once = functools.reduce(lambda x, field: spoil(x, field, np.nan), FIELDS, inputs)
    variants = [at_once, spoil(inputs, "logp", np.inf)]
    if run == "jit":
        variants += [spoil(inputs, field, v) for field in FIELDS for v in (np.nan, np.inf, -np.inf)]
    evaluate = compiled(FIRST, run)
    plain = evaluate(inputs, WEIGHTS)
    for variant in variants:
        for name, ((out, value, grad),) in evaluate(variant, WEIGHTS).items():
            ((clean, clean_value, clean_grad),) = plain[name]
            np.testing.assert_array_equal(out.coef, clean.coef, name)
            np.testing.assert_array_equal(out.keep, clean.keep, name)
            np.testing.assert_allclose(value, clean_value, rtol=1e-6, err_msg=name)
            np.testing.assert_array_equal(grad, clean_grad, name)
            assert (np.asarray(grad)[~z["mask"]] == 0).all(), name
            for metric, where in out.metrics.values():
                assert np.isfinite(metric[where]).all(), name


def test_masked_equals_subset():
    z = arrays("k3")
    mask = z["mask"]
    subset = {key: x[mask][None] for key, x in z.items() if x.shape[:2] == mask.shape}
    evaluate = compiled(FIRST, "jit")
    parts = evaluate(inputs_of(subset), WEIGHTS[mask][None])
    for name, ((whole, value, grad),) in evaluate(inputs_of(z), WEIGHTS).items():
        ((part, part_value, part_grad),) = parts[name]
        np.testing.assert_allclose(whole.coef[mask], part.coef[0], rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(whole.keep[mask], part.keep[0], name)
        np.testing.assert_allclose(value, part_value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(grad[mask], part_grad[0], rtol=1e-6, err_msg=name)
        for key, (metric, where) in whole.metrics.items():
            np.testing.assert_allclose(metric[mask], part.metrics[key][0][0], rtol=1e-5, atol=1e-7, err_msg=name)
            np.testing.assert_array_equal(where[mask], part.metrics[key][1][0], name)


@pytest.mark.parametrize("run", RUN)
def test_finite_at_probabilities_zero_and_one(run):
    extreme = np.array([0, -1e-38, -1e-10, -1e-3, -0.7, -20, -90, -1e4, -np.inf], np.float32)
    grid = np.meshgrid(extreme, extreme, extreme[::2], [-1.5, 0, 1.5], indexing="ij")
    pi, mu, prox, adv = (x.reshape(1, -1).astype(np.float32) for x in grid)
    without_mass = np.broadcast_to(np.array([-np.inf, -90.0], np.float32), (*pi.shape, 2))
    z = {"logp": pi, "behavior_logp": mu, "proximal_logp": prox, "advantages": adv, "mask": np.ones(pi.shape, bool)}
    z["has_sampled"] = np.arange(pi.size).reshape(pi.shape) % 2 == 0
    for key, x in (("topk_logp", pi), ("topk_behavior_logp", mu), ("topk_proximal_logp", prox)):
        z[key] = np.concatenate([x[..., None], without_mass], axis=-1)
    for name, ((out, value, grad),) in compiled(UNCAPPED, run)(inputs_of(z), np.ones(pi.shape, np.float32)).items():
        assert np.isfinite(out.coef).all() and np.isfinite(value) and np.isfinite(grad).all(), name
        for metric, _ in out.metrics.values():
            assert np.isfinite(metric).all(), name
        anchor = prox if "proximal_logp" in NEEDS[name] else mu
        away = ((pi > anchor) & (adv > 0)) | ((pi < anchor) & (adv < 0))
        assert np.asarray(out.keep)[~away].all(), name


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_flows_through_a_coefficient(name):
    inputs = one(np.log(0.5), np.log(0.52), 1.0, np.log(0.51))
    grads = jax.grad(lambda x: LOSSES[name](x, **FIRST[name][0]).coef.sum(), allow_int=True)(inputs)
    for field in ("logp", "behavior_logp", "advantages", "proximal_logp", "topk"):
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(getattr(grads, field)) if leaf.dtype == jnp.float32)


@pytest.mark.parametrize("run", RUN)
def test_the_objective_has_minus_weight_times_coef_as_gradient(run):
    mask = jnp.array([[True, True, False], [False, True, False]])
    coef, weights = jnp.array([[2.0, 0.0, 3.0], [1.0, -4.0, 1.0]]), jnp.array([[0.5, 0.5, 0.5], [0.25, 0.25, 0.25]])
    logp = jnp.array([[-1.0, -np.inf, np.nan], [np.inf, -2.0, -np.inf]])
    value, grads = RUN[run](jax.value_and_grad(policy_objective, argnums=(0, 2)))(coef, weights, logp, mask)
    assert value.shape == () and value.dtype == jnp.float32 and np.isfinite(value)
    np.testing.assert_array_equal(grads[1], [[-1.0, 0, 0], [0, 1.0, 0]])
    np.testing.assert_array_equal(grads[0], np.zeros((2, 3)))  # c_t carries no gradient


# Selecting by name


@pytest.mark.parametrize("name", NAMES)
def test_bind_and_required_fields(name):
    loss = bind_loss(name, SETTINGS[name][0])
    assert required_fields(loss) == NEEDS[name]
    inputs = only(inputs_of(arrays("k3")), NEEDS[name])
    np.testing.assert_array_equal(loss(inputs).coef, LOSSES[name](inputs, **SETTINGS[name][0]).coef)
    for field in NEEDS[name]:
        with pytest.raises(UserError, match=field):
            loss(inputs.replace(**{field: None}))
    if len(NEEDS[name]) == 2:
        with pytest.raises(UserError, match="proximal_logp"):
            loss(inputs.replace(topk=inputs.topk.replace(proximal_logp=None)))
    for key in SETTINGS[name][0]:
        with pytest.raises(UserError, match=key):
            bind_loss(name, {k: v for k, v in SETTINGS[name][0].items() if k != key})


@pytest.mark.parametrize("name, hyperparameters, names", [
    ("cispoo", dict(ratio_cap=3.0), ("cispoo", "cispo")),
    ("dppo_tv", dict(delta_low=0.2, delta_high=0.2, ratio_cap=5.0), ("dppo_tv", "dppo_")),
    ("cispo", dict(ratio_cap=3.0, delta_low=0.1), ("delta_low",)),
    ("dppo_binary_tv", dict(delta_low=0.2, delta_hgih=0.2, ratio_cap=5.0), ("delta_hgih", "delta_high")),
    ("ppo_clip", dict(eps_low=0.2, ratio_cap=5.0), ("eps_high",)),
    ("dppo_binary_tv", dict(delta_low=0.2, delta_high=0.2, ratio_cap=5.0, proximal=True), ("proximal",)),
])
def test_bind_refuses_in_one_sentence(name, hyperparameters, names):
    with pytest.raises(UserError) as caught:
        bind_loss(name, hyperparameters)
    message = str(caught.value)
    assert all(n in message for n in names) and "\n" not in message


def test_hyperparameters_are_keyword_only_and_have_no_default():
    inputs = inputs_of(arrays("k3"))
    for name in NAMES:
        with pytest.raises(TypeError):
            LOSSES[name](inputs)
        with pytest.raises(TypeError):
            LOSSES[name](inputs, *SETTINGS[name][0].values())


def test_a_loss_of_ones_own_is_one_function_and_one_entry(monkeypatch):
    def tv_floor(inputs: LossInputs, *, floor: float, ratio_cap: float) -> LossOutput:
        """Binary TV that never masks tokens rarer than `floor`."""
        mu, pi = jnp.exp(inputs.behavior_logp), jnp.exp(inputs.logp)
        keep = inputs.mask & ((mu < floor) | (jnp.abs(pi - mu) <= 0.2))
        ratio = jnp.exp(inputs.logp - inputs.behavior_logp)  # pi / mu would be 0 / 0 for the rarest tokens
        coef = jnp.where(keep, jnp.minimum(ratio, ratio_cap) * inputs.advantages, 0.0)
        return LossOutput(coef=coef, keep=keep, metrics={"tv_floor/rare": ((mu < floor).astype(jnp.float32), keep)})

    monkeypatch.setitem(LOSSES, "tv_floor", tv_floor)
    loss = bind_loss("tv_floor", {"floor": 0.05, "ratio_cap": 3.0})
    assert required_fields(loss) == frozenset()
    z = arrays("k3")
    out, value, grad = jax.jit(partial(value_and_grad, loss))(only(inputs_of(z), frozenset()), np.ones(z["mask"].shape))
    assert np.isfinite(out.coef).all()
    np.testing.assert_allclose(grad, -out.coef)  # policy_objective holds the gradient that the function forgot to stop
    assert np.isfinite(value) and 0 < out.keep.sum() < z["mask"].sum()
    with pytest.raises(UserError, match="floor"):
        bind_loss("tv_floor", {"flor": 0.05, "ratio_cap": 3.0})

"""The methods beside the paper's own against float64: packed sequences, three policies, a reference penalty."""

import functools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.advantages import ADVANTAGES
from dppo_jax.errors import UserError
from dppo_jax.losses import (
    LOSSES,
    ExactDivergence,
    LossInputs,
    SlopeSums,
    TopKPair,
    bind_loss,
    required_fields,
    with_reference_kl,
)
from dppo_jax.losses.core import MissingField
from dppo_jax.rewards.shaping import overlong_penalty
from dppo_jax.weights import WEIGHTS
from tests.helpers.places import GOLDEN

FOLDER = GOLDEN / "losses"
RUN = {"eager": lambda f: f, "jit": jax.jit}
CASES = ("packed", "rows", "tokens", "ties")
COMPILED = [(case, "jit") for case in CASES]
ONE_EAGER = [*COMPILED, ("tokens", "eager")]  # operation by operation it takes long
SUMS = ("gap", "square", "signed", "signed_square")
TRACKED = ("topk.logp", "topk.behavior_logp")
OTHERS = ("proximal_logp", "reference_logp", "teacher_logp", "behavior_entropy", "exact.tv", "exact.kl", *TRACKED)
OTHERS += tuple(f"exact.slope.{name}" for name in SUMS)
VOCABULARY = 48  # the golden script's
FIELDS = ("logp", "behavior_logp", "advantages", *OTHERS)


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "methods.npz") as file:
        return dict(file)


def stored(key: str):
    return json.loads(str(golden()[f"json/{key}"]))


SETTINGS, TIES, BASES, STRENGTHS = stored("settings"), stored("ties"), stored("bases"), stored("strengths")
NAMES, ESTIMATORS = sorted(SETTINGS), ("k1", "k2", "k3")
FROM_PROXIMAL = {"ppo_clip_recomputed", "token_tis", "sequence_tis", "token_mis", "sequence_mis", "icepop"}
NEVER_MASKED = {"reinforce", "sapo", "drpo", "vespo", "minpro"}


def needs(name: str) -> frozenset[str]:
    if name.startswith("dppo_exact"):
        return frozenset({"exact"})
    if name.startswith("pdm_exact"):
        return frozenset({"exact", "exact.slope"})
    if name.startswith("pdm_topk"):
        return frozenset({"topk"})
    if name in ("distill", "estr"):
        return frozenset({"teacher_logp" if name == "distill" else "behavior_entropy"})
    return frozenset({"proximal_logp"} if name in FROM_PROXIMAL else ())


def arrays(case: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(case + "/"): x for key, x in golden().items() if key.startswith(case + "/")}


def inputs_of(z: dict[str, np.ndarray]) -> LossInputs:
    names = ("logp", "behavior_logp", "advantages", "mask", "segments", "proximal_logp", "reference_logp")
    names += ("behavior_entropy",)
    x = {name: jnp.asarray(value) for name, value in z.items()}
    exact = ExactDivergence(tv=x["tv"], kl=x["kl"], slope=SlopeSums(**{name: x[name] for name in SUMS}))
    topk = TopKPair(
        logp=x["topk_logp"],
        behavior_logp=x["topk_behavior_logp"],
        has_sampled=x["has_sampled"],
        outside=VOCABULARY - x["topk_logp"].shape[-1] - ~x["has_sampled"],
    )
    teacher = x["reference_logp"]  # as in the golden script
    return LossInputs(**{name: x[name] for name in names if name in x}, teacher_logp=teacher, exact=exact, topk=topk)


def only(inputs: LossInputs, fields: frozenset[str]) -> LossInputs:
    """The inputs without the optional fields that are not needed."""
    every = {"proximal_logp", "reference_logp", "teacher_logp", "behavior_entropy", "exact", "topk"}
    inputs = inputs.replace(**{field: None for field in every - fields})
    if inputs.exact is not None and "exact.slope" not in fields:
        inputs = inputs.replace(exact=inputs.exact.replace(slope=None))
    return inputs


def every_loss(settings: dict[str, list[dict]], inputs: LossInputs) -> dict[str, list]:
    """Each loss under each of its settings, given only the fields that it needs."""
    return {name: [LOSSES[name](only(inputs, needs(name)), **h) for h in several] for name, several in settings.items()}


def penalised(inputs: LossInputs) -> dict[str, list]:
    inputs = only(inputs, frozenset({"reference_logp"}))
    return {
        f"{base}/{estimator}": [
            with_reference_kl(partial(LOSSES[base], **h), coef=beta, estimator=estimator)(inputs) for beta in STRENGTHS
        ]
        for base, h in BASES.items()
        for estimator in ESTIMATORS
    }


@functools.cache
def compiled(run: str, ties: bool = False):
    return RUN[run](partial(every_loss, TIES if ties else SETTINGS))


compiled_penalised = functools.cache(lambda run: RUN[run](penalised))


def worst(got, want) -> float:
    return (np.abs(np.asarray(got, np.float64) - want) / np.maximum(1, np.abs(want))).max()


def assert_same(found: dict[str, list], wanted: dict[str, list], at, wanted_at, exactly: bool = True) -> None:
    """The positions `at` of one answer equal the positions `wanted_at` of the other."""
    for name, several in wanted.items():
        for out, want in zip(found[name], several, strict=True):
            got, expected = np.asarray(out.coef)[at], np.asarray(want.coef)[wanted_at]
            assert np.array_equal(got, expected) if exactly else worst(got, expected) <= 5e-6, name
            np.testing.assert_array_equal(np.asarray(out.keep)[at], np.asarray(want.keep)[wanted_at], name)


# Golden values


def test_every_loss_has_reference_values():
    with np.load(FOLDER / "losses.npz") as file:
        others = json.loads(str(file["json/settings"]))
    assert set(LOSSES) == set(others) | set(SETTINGS)


@pytest.mark.usefixtures("optimized")  # ties are decided by the last bit
@pytest.mark.parametrize("case, run", ONE_EAGER)
def test_coefficients_and_masks_equal_the_float64_definition(case, run):
    z = arrays(case)
    for name, several in compiled(run, case == "ties")(inputs_of(z)).items():
        for out, coef, keep in zip(several, z[f"coef/{name}"], z[f"keep/{name}"], strict=True):
            np.testing.assert_array_equal(out.keep, keep, name)
            assert worst(out.coef, coef) <= 2e-5, name
            assert out.coef.dtype == jnp.float32 and out.coef.shape == z["mask"].shape, name
            assert (np.asarray(out.coef)[~z["mask"]] == 0).all(), name
            for key, (metric, where) in out.metrics.items():
                assert metric.shape == where.shape == z["mask"].shape, (name, key)
                assert np.isfinite(metric[where]).all() and not (where & ~z["mask"]).any(), (name, key)


@pytest.mark.parametrize("case", ["packed", "rows", "tokens"])
def test_the_tight_settings_make_each_mask_act(case):
    z = arrays(case)
    for name in NAMES:
        kept = z[f"keep/{name}"][-1][z["mask"]]
        assert kept.any() and kept.all() == (name in NEVER_MASKED), name


@pytest.mark.parametrize("case, run", ONE_EAGER)
def test_a_reference_penalty_adds_its_term_to_masked_tokens_too(case, run):
    z = arrays(case)
    inputs = inputs_of(z)
    for name, several in compiled_penalised(run)(inputs).items():
        base = name.split("/")[0]
        keep = LOSSES[base](inputs, **BASES[base]).keep
        for out, want in zip(several, z[f"reference/{name}"], strict=True):
            assert worst(out.coef, want) <= 2e-5, name
            np.testing.assert_array_equal(out.keep, keep, name)
            assert (np.asarray(out.coef)[~z["mask"]] == 0).all(), name
    assert case != "packed" or (~np.asarray(keep) & z["mask"] & (want != 0)).any()


@pytest.mark.parametrize("run", RUN)
def test_the_reward_itself_as_advantage(run):
    rewards, group = (jnp.asarray(golden()[f"reward/{key}"]) for key in ("rewards", "group"))
    got = RUN[run](partial(ADVANTAGES["reward"], num_groups=4))(rewards, group)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, golden()["reward/reward"])


@pytest.mark.parametrize("run", RUN)
def test_prompt_mean_token_mean_gives_every_prompt_the_same(run):
    """A prompt with ragged responses, one with an empty response, one without a token, and no token at all."""
    z = {key: golden()[f"weights/{key}"] for key in ("mask", "group", "prompt_mean_token_mean")}
    weigh = RUN[run](partial(WEIGHTS["prompt_mean_token_mean"], constant=stored("constant")))
    for mask, group, want in zip(*z.values(), strict=True):
        got = np.asarray(weigh(jnp.asarray(mask), group=jnp.asarray(group)))
        assert got.shape == mask.shape and got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=0)
        relabelled = weigh(jnp.asarray(mask), group=jnp.asarray(17 - 5 * group))
        np.testing.assert_array_equal(relabelled, got)


def test_the_overlong_penalty_falls_from_zero_to_minus_one():
    for h, want in zip(stored("overlong"), golden()["overlong/penalty"], strict=True):
        got = overlong_penalty(golden()["overlong/lengths"], **h)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


# What must not matter


def changed(holder, field: str, change):
    """The same with another value of one field (dots reach into it)."""
    name, _, inner = field.partition(".")
    x = getattr(holder, name)
    return holder.replace(**{name: changed(x, inner, change) if inner else change(x)})


def spoil(inputs: LossInputs, field: str, value: float) -> LossInputs:
    """`value` outside the mask of one field."""

    def change(x):
        return jnp.where(inputs.mask.reshape(inputs.mask.shape + (1,) * (x.ndim - inputs.mask.ndim)), x, value)

    return changed(inputs, field, change)


@pytest.mark.parametrize("case, run", COMPILED[:2])
def test_what_is_outside_the_mask_is_never_seen(case, run):
    inputs = inputs_of(arrays(case))
    variants = [functools.reduce(lambda x, field: spoil(x, field, np.nan), FIELDS, inputs)]
    if run == "jit":
        variants += [spoil(inputs, field, v) for field in FIELDS for v in (np.nan, np.inf, -np.inf)]
    if inputs.segments is not None:
        variants += [spoil(inputs, "segments", v) for v in (0, 1, -7, 2**31 - 1)]
    evaluate, evaluate_penalised = compiled(run), compiled_penalised(run)
    plain, plain_penalised = evaluate(inputs), evaluate_penalised(inputs)
    for variant in variants:
        assert_same(evaluate(variant), plain, ..., ...)
        assert_same(evaluate_penalised(variant), plain_penalised, ..., ...)


@pytest.mark.parametrize("case, run", [("packed", "eager"), ("packed", "jit"), ("tokens", "jit")])
def test_packed_sequences_equal_rows_of_their_own(case, run):
    """Each in a row of its own, its tokens one after another: neither neighbours nor holes matter."""
    z = arrays(case)
    fields = [key for key, x in z.items() if x.dtype != np.int32 and key != "mask" and "/" not in key]
    sequences = [
        (np.full(n.sum(), b), np.flatnonzero(n))
        for b, (row, mask) in enumerate(zip(z["segments"], z["mask"], strict=True))
        for n in ((row == s) & mask for s in np.unique(row[mask]))
    ]
    assert len(sequences) > len(z["mask"])
    alone = {field: np.zeros((len(sequences), *z[field].shape[1:]), z[field].dtype) for field in fields}
    alone["mask"] = np.zeros((len(sequences), 40), bool)
    for i, (b, t) in enumerate(sequences):
        alone["mask"][i, : len(t)] = True
        for field in fields:
            alone[field][i, : len(t)] = z[field][b, t]
    at = tuple(np.concatenate(x) for x in zip(*sequences, strict=True))
    found, packed = compiled(run)(inputs_of(alone)), compiled(run)(inputs_of(z))
    assert_same(found, packed, alone["mask"], at, exactly=False)


def test_a_sequence_is_known_by_its_number_and_not_by_its_place():
    inputs = inputs_of(arrays("packed"))
    numbers = jnp.array([0, 3, 1, 2])
    found = compiled("jit")(inputs.replace(segments=numbers[inputs.segments]))
    assert_same(found, compiled("jit")(inputs), ..., ..., exactly=False)


def test_without_segments_a_row_is_one_sequence():
    inputs = inputs_of(arrays("rows"))
    found = compiled("jit")(inputs.replace(segments=inputs.mask.astype(jnp.int32)))
    assert_same(found, compiled("jit")(inputs), ..., ..., exactly=False)


@pytest.mark.parametrize("run", RUN)
def test_finite_at_probabilities_zero_and_one(run):
    extreme = np.array([0, -1e-38, -1e-10, -1e-3, -0.7, -20, -90, -1e4, -np.inf], np.float32)
    grid = np.meshgrid(extreme, extreme, extreme[::2], [-1.5, 0, 1.5], indexing="ij")
    pi, mu, pr, adv = (x.reshape(-1, 27).astype(np.float32) for x in grid)
    z = {"logp": pi, "behavior_logp": mu, "proximal_logp": pr, "advantages": adv, "mask": np.ones(pi.shape, bool)}
    z |= {"reference_logp": np.roll(pr, 1), "tv": np.full(pi.shape, 0.5), "kl": np.full(pi.shape, 87.0)}
    z["behavior_entropy"] = np.zeros(pi.shape, np.float32)
    z |= {name: np.full(pi.shape, 1e-30, np.float32) for name in SUMS} | {"has_sampled": np.arange(27) % 2 == pi * 0}
    z |= {"topk_logp": np.stack([pi, pr], axis=-1), "topk_behavior_logp": np.stack([mu, pi], axis=-1)}
    inputs = inputs_of(z)
    for name, several in (compiled(run)(inputs) | compiled_penalised(run)(inputs)).items():
        for out in several:
            assert np.isfinite(out.coef).all(), name
            assert all(np.isfinite(metric).all() for metric, _ in out.metrics.values()), name


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_flows_through_a_coefficient(name):
    inputs = inputs_of(arrays("packed"))
    grads = jax.grad(lambda x: LOSSES[name](x, **SETTINGS[name][0]).coef.sum(), allow_int=True)(inputs)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads) if leaf.dtype == jnp.float32)


# Selecting by name


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_field_is_named_in_one_sentence(name):
    loss = bind_loss(name, SETTINGS[name][0])
    assert required_fields(loss) == needs(name)
    inputs = inputs_of(arrays("packed"))
    for field in needs(name):
        with pytest.raises(MissingField, match=rf"^this loss needs LossInputs\.{field}, which is None$") as caught:
            loss(changed(inputs, field, lambda _: None))
        assert caught.value.field == field and isinstance(caught.value, UserError)
    for key in SETTINGS[name][0]:
        with pytest.raises(UserError, match=key):
            bind_loss(name, {k: v for k, v in SETTINGS[name][0].items() if k != key})


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "icepop", "dppo_exact_kl"])
def test_a_reference_penalty_needs_the_reference_policy_and_what_its_loss_needs(name):
    loss = with_reference_kl(
        bind_loss(name, {**SETTINGS, **{k: [h] for k, h in BASES.items()}}[name][0]), coef=0.1, estimator="k3"
    )
    assert required_fields(loss) == needs(name) | {"reference_logp"}
    with pytest.raises(MissingField, match=r"LossInputs\.reference_logp") as caught:
        loss(inputs_of(arrays("packed")).replace(reference_logp=None))
    assert caught.value.field == "reference_logp"


def test_an_unknown_estimator_is_refused_in_one_sentence():
    with pytest.raises(UserError, match="k4") as caught:
        with_reference_kl(bind_loss("ppo_clip", BASES["ppo_clip"]), coef=0.1, estimator="k4")
    assert "k3" in str(caught.value) and "\n" not in str(caught.value)

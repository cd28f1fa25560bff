"""Every dataclass that crosses a boundary holds what its annotations say, is a pytree, and is frozen."""

import dataclasses

import beartype
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import jaxtyped

import dppo_jax.types as types
from dppo_jax.losses import LOSSES, hyperparameters, words

CLASSES = {name: c for name, c in vars(types).items() if isinstance(c, type) and dataclasses.is_dataclass(c)}
N, G, P, B, R, K, M, T, Q, L, k, X = 2, 7, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13


def f32(*shape):
    return jnp.zeros(shape, jnp.float32)


def i32(*shape):
    return jnp.zeros(shape, jnp.int32)


def yes(*shape):
    return jnp.ones(shape, bool)


TOPK = dict(
    logp=f32(B, R, K), behavior_logp=f32(B, R, K), has_sampled=yes(B, R), proximal_logp=f32(B, R, K), outside=i32(B, R)
)
ROUTING = dict(load=f32(L, X), entropy=f32(L), tokens=f32())
SLOPE = dict(gap=f32(B, R), square=f32(B, R), signed=f32(B, R), signed_square=f32(B, R))
EXACT = dict(tv=f32(B, R), kl=f32(B, R), slope=types.SlopeSums(**SLOPE))
FULL = {
    "PromptBatch": dict(tokens=i32(N, P), mask=yes(N, P), group=i32(N), limit=i32(N, G)),
    "RolloutBatch": dict(
        tokens=i32(B, R), response_mask=yes(B, R), behavior_logp=f32(B, R), truncated=yes(B), group=i32(B),
        topk_ids=i32(B, R, K), topk_logp=f32(B, R, K), prompt_experts=i32(N, P, L * k), experts=i32(B, R, L * k),
        own=yes(B, R), behavior_entropy=f32(B, R),
    ),
    "TrainBatch": dict(
        prompt_tokens=i32(B, P), prompt_mask=yes(B, P), tokens=i32(B, R), mask=yes(B, R), behavior_logp=f32(B, R),
        advantages=f32(B), group=i32(B), topk_ids=i32(B, R, K), topk_behavior_logp=f32(B, R, K),
        proximal_logp=f32(B, R), topk_proximal_logp=f32(B, R, K), reference_logp=f32(B, R),
        teacher_logp=f32(B, R), prompt_experts=i32(B, P, L * k), experts=i32(B, R, L * k), own=yes(B, R),
        behavior_entropy=f32(B, R),
    ),
    "PackedBatch": dict(
        tokens=i32(M, T), segments=i32(M, T), positions=i32(M, T), columns=i32(M, Q), targets=i32(M, Q), mask=yes(M, Q),
        weights=f32(M, Q), behavior_logp=f32(M, Q), advantages=f32(M, Q), topk_ids=i32(M, Q, K),
        topk_behavior_logp=f32(M, Q, K), proximal_logp=f32(M, Q), topk_proximal_logp=f32(M, Q, K),
        reference_logp=f32(M, Q), teacher_logp=f32(M, Q), experts=i32(M, T, L * k), behavior_entropy=f32(M, Q),
    ),
    "TopKPair": TOPK,
    "SlopeSums": SLOPE,
    "ExactDivergence": EXACT,
    "LossInputs": dict(
        logp=f32(B, R), behavior_logp=f32(B, R), advantages=f32(B, R), mask=yes(B, R), segments=i32(B, R),
        proximal_logp=f32(B, R), reference_logp=f32(B, R), teacher_logp=f32(B, R), topk=types.TopKPair(**TOPK),
        exact=types.ExactDivergence(**EXACT), behavior_entropy=f32(B, R),
    ),
    "LossOutput": dict(coef=f32(B, R), keep=yes(B, R), metrics={"ratio": (f32(B, R), yes(B, R))}),
    "Routing": ROUTING,
    "HeadOutput": dict(
        logp=f32(B, R), entropy=f32(B, R), ids_logp=f32(B, R, K), exact=types.ExactDivergence(**EXACT),
        routing=types.Routing(**ROUTING), vocabulary=i32(),
    ),
}  # fmt: skip


def checked(cls):
    """A twin of the dataclass, with its fields' own annotations, that checks them when constructed.

    A twin, because JAX also fills the real one with tracers' shapes, axis names and None.
    """
    fields = [(f.name, f.type, dataclasses.field(default=f.default)) for f in dataclasses.fields(cls)]
    return jaxtyped(typechecker=beartype.beartype)(dataclasses.make_dataclass(f"Checked{cls.__name__}", fields))


def optional(cls) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.default is None]


def test_every_dataclass_is_checked_here():
    assert set(CLASSES) == set(FULL)


@pytest.mark.parametrize("name", FULL)
def test_the_right_shapes_and_dtypes_pass(name):
    cls, twin = CLASSES[name], checked(CLASSES[name])
    assert set(FULL[name]) == {f.name for f in dataclasses.fields(cls)}
    twin(**FULL[name])
    least = {key: x for key, x in FULL[name].items() if key not in optional(cls)}
    twin(**least)
    assert all(getattr(cls(**least), field) is None for field in optional(cls))


def wrong_versions(name):
    for key, x in FULL[name].items():
        if isinstance(x, jax.Array):
            yield key, "one dimension more", x[None]
            if x.ndim:
                yield key, "one dimension less", x[0]
            yield key, "another dtype", x.astype(jnp.float32 if x.dtype != jnp.float32 else jnp.bfloat16)
            yield key, "a list", x.tolist()
            alone = (name, key) in {("RolloutBatch", "prompt_experts")}  # the only one with a row per prompt
            if len(FULL[name]) > 1 and not alone and x.ndim:
                yield key, "another number of rows", jnp.concatenate([x, x])
    if name == "LossOutput":
        yield "metrics", "no mask", {"ratio": f32(B, R)}
        yield "metrics", "a reduced value", {"ratio": (f32(), yes(B, R))}
        yield "metrics", "a mask of another dtype", {"ratio": (f32(B, R), f32(B, R))}


@pytest.mark.parametrize("name", FULL)
def test_wrong_shapes_and_dtypes_are_refused(name):
    twin = checked(CLASSES[name])
    for key, what, value in wrong_versions(name):
        with pytest.raises(Exception, match=f"'?{key}'?") as caught:
            twin(**{**FULL[name], key: value})
        assert type(caught.value).__name__ in ("TypeCheckError", "BeartypeCallHintParamViolation"), (key, what)
    for key in FULL[name]:
        if key not in optional(CLASSES[name]):
            with pytest.raises(Exception, match=key):
                twin(**{**FULL[name], key: None})
            with pytest.raises(TypeError, match=key):
                CLASSES[name](**{k: x for k, x in FULL[name].items() if k != key})


@pytest.mark.parametrize("name", FULL)
def test_each_is_a_pytree_of_its_arrays(name):
    value = CLASSES[name](**FULL[name])
    leaves, structure = jax.tree.flatten(value)
    assert leaves and all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert len(leaves) == len(jax.tree.leaves(FULL[name]))
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is CLASSES[name]
    doubled = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + leaf, x))(value)
    assert type(doubled) is CLASSES[name]
    assert jax.tree.map(jnp.shape, doubled) == jax.tree.map(jnp.shape, value)
    names = {path[0].name for path, _ in jax.tree_util.tree_leaves_with_path(value)}
    assert names == set(FULL[name])


@pytest.mark.parametrize("name", FULL)
def test_each_is_frozen(name):
    value = CLASSES[name](**FULL[name])
    for field in FULL[name]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, None)
    key = next(iter(FULL[name]))
    changed = value.replace(**{key: None})
    assert getattr(changed, key) is None and getattr(value, key) is not None


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_loss_returns_is_a_loss_output(name):
    numbers = dict.fromkeys(hyperparameters(LOSSES[name]), 0.5)
    texts = {key: known[0] for key, known in words(LOSSES[name]).items()}

    def run(inputs):
        out = LOSSES[name](inputs, **{**numbers, **texts})
        checked(types.LossOutput)(coef=out.coef, keep=out.keep, metrics=out.metrics)  # a tracer is a jax.Array
        return out

    assert type(jax.eval_shape(run, types.LossInputs(**FULL["LossInputs"]))) is types.LossOutput

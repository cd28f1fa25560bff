"""Self-attention by its definition, packed against separate, and the kernels of GPUs and TPUs as far as a CPU can tell.

Splash runs interpreted here; for CUDA and TPU the functions are lowered, not run. As a program, for the sharded test:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 JAX_PLATFORMS=cpu python -m tests.models.test_attention
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from dppo_jax.devices.sharding import make_mesh
from dppo_jax.errors import UserError
from dppo_jax.models.attention import KERNELS, choose, per_device, self_attention, splash_kernel
from tests.helpers.fixtures import HURRIED_FLAGS
from tests.helpers.places import ROOT

HEADS, KV_HEADS, HEAD_DIM, LENGTH = 4, 2, 64, 128

interpreted = functools.partial(per_device, kernel=functools.partial(splash_kernel, interpret=True))
ON_CPU = {"xla": KERNELS["xla"], "splash": interpreted}


def inputs(batch=2, length=LENGTH, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, seed=0):
    numbers = np.random.default_rng(seed)
    return [
        jnp.asarray(numbers.normal(size=(batch, length, h, head_dim)), jnp.float32) for h in (heads, kv_heads, kv_heads)
    ]


def segments_of(*rows, length=LENGTH):
    """Each row a list of (segment, how many tokens); padding to the end."""
    filled = [np.repeat(*np.array(row).T) for row in rows]
    return jnp.asarray(np.stack([np.pad(row, (0, length - len(row))) for row in filled]), jnp.int32)


# Packed, padded on both sides, and a number that comes back after another.
SEGMENTS = segments_of([(1, 40), (2, 1), (3, 50)], [(0, 7), (5, 60), (4, 20), (5, 41)])


# Of Gemma-2: scores reach several times the cap, and rows are several windows long.
GEMMA = dict(scale=0.4, softcap=2.0, window=11)


def by_definition(q, k, v, segments, scale=None, softcap=None, window=LENGTH):
    """Token by token in float64; NaN at padding."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.full(q.shape, np.nan)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        if segments[b, t] != 0:
            seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t] and t - s < window]
            score = k[b, seen, h // group] @ q[b, t, h] * (scale or 1 / np.sqrt(q.shape[3]))
            score = score if softcap is None else softcap * np.tanh(score / softcap)
            weight = np.exp(score - score.max())
            out[b, t, h] = weight @ v[b, seen, h // group] / weight.sum()
    return out


def plain(q, k, v, segments):
    """The same with scores of every pair, for its gradient."""
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    score = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[3])
    seen = np.tril(np.ones(score.shape[2:], bool)) & (segments[:, :, None] == segments[:, None, :])[:, None]
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(seen, score, -1e30), axis=-1), v)


@functools.cache
def jitted(attend):
    def loss(q, k, v, segments, weight):
        out = attend(q, k, v, segments)
        return jnp.sum(jnp.where(weight != 0, out * weight, 0)), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def weights(shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def outputs_and_gradients(attend, qkv, segments, where=None):
    """(out, dq, dk, dv) of a weighted sum over the tokens where `where`: the real ones, if it is not given."""
    where = segments != 0 if where is None else where
    gradients, out = jitted(attend)(*qkv, segments, jnp.where(where[..., None, None], weights(qkv[0].shape), 0))
    return out, *gradients


def real(x, segments=SEGMENTS):
    return np.asarray(x)[np.asarray(segments) != 0]


def test_xla_is_the_definition_under_jit_and_eagerly():
    qkv = inputs()
    expected = by_definition(*qkv, np.asarray(SEGMENTS))
    attend = functools.partial(self_attention, implementation="xla")
    for run in (attend, jax.jit(attend)):
        np.testing.assert_allclose(real(run(*qkv, SEGMENTS)), real(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("left_out", [None, *GEMMA])
@pytest.mark.parametrize("name", ON_CPU)
def test_scale_cap_and_window_are_the_definition(name, left_out, monkeypatch):
    """Of contiguous segments, where columns are positions; in a layer that slides, and in one that does not."""
    monkeypatch.setitem(KERNELS, name, ON_CPU[name])
    options = {key: value for key, value in GEMMA.items() if key != left_out}
    qkv, segments = inputs(), segments_of([(1, 40), (2, 1), (3, 50)], [(0, 7), (5, 60), (4, 20)])

    @jax.jit
    def run(q, k, v, sliding):
        return self_attention(q, k, v, segments, implementation=name, sliding=sliding, **options)

    for sliding in (True, False):
        there = options if sliding else {key: value for key, value in options.items() if key != "window"}
        expected = by_definition(*qkv, np.asarray(segments), **there)
        np.testing.assert_allclose(real(run(*qkv, sliding), segments), real(expected, segments), rtol=0, atol=5e-6)
        for key in there:  # each of them is far from nothing
            without = by_definition(*qkv, np.asarray(segments), **{k: v for k, v in there.items() if k != key})
            assert np.abs(real(expected - without, segments)).max() > 0.1, key


@pytest.mark.slow
@pytest.mark.parametrize("sliding", [True, False])
def test_splash_is_xla_with_scale_cap_and_window(sliding, monkeypatch):
    """Gradients too, where a window spans several blocks or ends within one."""
    monkeypatch.setitem(KERNELS, "splash", interpreted)
    qkv = inputs(1, 640, 4, 2, HEAD_DIM)
    segments = segments_of([(1, 400), (2, 200)], length=640)
    for window in (40, 300):
        options = dict(GEMMA, window=window)

        def attend(implementation, options=options):
            return lambda *args: self_attention(
                *args, implementation=implementation, sliding=jnp.asarray(sliding), **options
            )

        found, expected = (outputs_and_gradients(attend(name), qkv, segments) for name in ("splash", "xla"))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(real(one, segments), real(other, segments), rtol=0, atol=2e-5)
            assert np.abs(real(other, segments)).max() > 0.1


@pytest.mark.parametrize("name", ON_CPU)
def test_values_and_gradients_are_those_of_the_plain_sum(name):
    qkv = inputs()
    found = outputs_and_gradients(ON_CPU[name], qkv, SEGMENTS)
    expected = outputs_and_gradients(plain, qkv, SEGMENTS)
    np.testing.assert_allclose(real(found[0]), real(expected[0]), rtol=0, atol=2e-6)
    for one, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads, kv_heads, head_dim, length", [(4, 4, 128, 256), (3, 1, 64, 640)])
def test_splash_is_xla_for_other_heads_and_over_many_blocks(heads, kv_heads, head_dim, length):
    qkv = inputs(1, length, heads, kv_heads, head_dim)
    segments = segments_of([(1, length // 3), (2, length // 2)], length=length)
    found = outputs_and_gradients(interpreted, qkv, segments)
    expected = outputs_and_gradients(KERNELS["xla"], qkv, segments)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(real(one, segments), real(other, segments), rtol=0, atol=2e-5)


def test_splash_is_xla_in_bfloat16():
    """Both round the weights of the sum to 8 bits, at different scales: an error of 2^-9 of values of size 3."""
    qkv = [a.astype(jnp.bfloat16) for a in inputs()]
    found, expected = (attend(*qkv, SEGMENTS) for attend in (interpreted, KERNELS["xla"]))
    assert found.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(real(found).astype(float), real(expected).astype(float), rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ON_CPU)
def test_packed_is_separate(name):
    lengths = [40, 1, 50]
    qkv = inputs(1)
    packed = outputs_and_gradients(ON_CPU[name], qkv, segments_of([(i + 1, n) for i, n in enumerate(lengths)]))
    for start, n in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
        part = slice(start, start + n)
        weight = weights(qkv[0].shape)[:, part]
        gradients, out = jitted(plain)(*(a[:, part] for a in qkv), jnp.ones((1, n), jnp.int32), weight)
        for one, other in zip(packed, (out, *gradients), strict=True):
            np.testing.assert_allclose(one[:, part], other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ON_CPU)
def test_padding_neither_matters_nor_gives_nan(name):
    qkv, others = inputs(), inputs(seed=2)
    swapped = [jnp.where((SEGMENTS != 0)[..., None, None], a, 100 * b) for a, b in zip(qkv, others, strict=True)]
    found = outputs_and_gradients(ON_CPU[name], qkv, SEGMENTS)
    for one, other in zip(found, outputs_and_gradients(ON_CPU[name], swapped, SEGMENTS), strict=True):
        np.testing.assert_array_equal(real(one), real(other))
    for gradient in found[1:]:
        assert not np.asarray(gradient)[np.asarray(SEGMENTS) == 0].any()
    for segments in (SEGMENTS, jnp.zeros_like(SEGMENTS)):
        for one in outputs_and_gradients(ON_CPU[name], swapped, segments, where=jnp.ones_like(segments, bool)):
            assert np.isfinite(one).all()


def on_every_mesh():
    """Splash over four devices against XLA on one; tensor = 4 is more than the two key heads."""
    qkv = inputs(4)
    segments = jnp.concatenate([SEGMENTS, SEGMENTS[::-1]])
    expected = outputs_and_gradients(KERNELS["xla"], qkv, segments)
    for fsdp, tensor in ((2, 2), (1, 4)):
        with jax.set_mesh(make_mesh(dict(data=1, fsdp=fsdp, tensor=tensor))):
            found = outputs_and_gradients(interpreted, qkv, segments)
            both = [outputs_and_gradients(sliding(name), qkv, segments) for name in ("xla", "interpreted")]
        for one, other in zip([*found, *both[1]], [*expected, *both[0]], strict=True):
            np.testing.assert_allclose(real(one, segments), real(other, segments), rtol=0, atol=1e-5)


def sliding(name):
    """Of a layer whose kernel is chosen by data."""
    KERNELS["interpreted"] = interpreted
    return lambda *args: self_attention(*args, implementation=name, sliding=jnp.asarray(True), **GEMMA)


@pytest.mark.slow
def test_splash_over_four_devices_is_xla_on_one():
    flags = f"--xla_force_host_platform_device_count=4 {HURRIED_FLAGS}"
    env = os.environ | dict(XLA_FLAGS=flags, JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    command = [sys.executable, "-m", "tests.models.test_attention"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def lowered(platform, implementation, dtype, **options):
    """The text of forward and backward for a platform that is not here, on a mesh of one device."""

    def loss(q, k, v, segments):
        out = self_attention(q, k, v, segments, implementation=implementation, **options)
        return jnp.sum(out.astype(jnp.float32))

    qkv = [a.astype(dtype) for a in inputs(length=256)]
    segments = segments_of([(1, 100), (2, 100)], [(1, 256)], length=256)
    with jax.set_mesh(make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*qkv, segments)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def test_splash_for_tpu_is_three_kernels():
    text = lowered("tpu", "splash", jnp.bfloat16)
    assert text.count("custom_call @tpu_custom_call") == 3  # forward, dq, dk and dv
    assert f"tensor<2x{HEADS}x256x256x" not in text  # nobody holds the scores


def test_splash_for_tpu_has_kernels_for_layers_that_slide_and_for_others():
    text = lowered("tpu", "splash", jnp.bfloat16, sliding=jnp.asarray(True), **GEMMA)
    assert text.count("custom_call @tpu_custom_call") == 6
    assert f"tensor<2x{HEADS}x256x256x" not in text


def test_cudnn_for_cuda_is_the_fused_call_both_ways(monkeypatch):
    """cuDNN's version is all that jax asks of it here, and there is none without a GPU."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    text = lowered("cuda", "cudnn", jnp.bfloat16)
    assert "__cudnn$fmhaScaleBiasSoftmax(" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in text
    assert "\\22mask_type\\22: \\22CAUSAL\\22" in text
    assert f"tensor<2x{HEADS}x256x256x" not in text


@pytest.mark.parametrize(
    "platform, dtype, head_dim, length, name, why",
    [
        ("cpu", "float32", 64, 128, "xla", "no kernel for cpu"),
        ("rocm", "bfloat16", 64, 128, "xla", "no kernel for rocm"),
        ("gpu", "bfloat16", 64, 130, "cudnn", "kernel for gpu"),
        ("cuda", "float16", 128, 128, "cudnn", "kernel for cuda"),
        ("cuda", "float32", 64, 128, "xla", "cudnn takes bfloat16 or float16, not float32"),
        ("cuda", "bfloat16", 256, 128, "xla", "at most 128 that 8 divides, not 256"),
        ("cuda", "bfloat16", 100, 128, "xla", "at most 128 that 8 divides, not 100"),
        ("cuda", "bfloat16", 64, 127, "xla", "even row length, not 127"),
        ("tpu", "bfloat16", 64, 128, "splash", "kernel for tpu"),
        ("tpu", "float32", 256, 1664, "splash", "kernel for tpu"),
        ("tpu", "float16", 128, 128, "xla", "splash takes bfloat16 or float32, not float16"),
        ("tpu", "bfloat16", 128, 1000, "xla", "row length that 128 divides, not 1000"),
    ],
)
def test_choice_by_platform(platform, dtype, head_dim, length, name, why):
    choice = choose(platform, dtype=dtype, head_dim=head_dim, length=length)
    assert choice.name == name and choice.name in KERNELS
    assert why in choice.why
    capped = choose(platform, dtype=dtype, head_dim=head_dim, length=length, softcap=50.0)
    if choice.name == "cudnn":
        assert capped == ("xla", "cudnn cannot cap scores at 50.0")
    else:
        assert capped == choice


def test_bad_input_is_one_sentence():
    qkv, segments = inputs(1), SEGMENTS[:1]
    with pytest.raises(UserError, match="unknown attention implementation 'spash'; the nearest is 'splash'"):
        self_attention(*qkv, segments, implementation="spash")
    with pytest.raises(UserError, match="length is a multiple of 128, not 100"):
        self_attention(*(a[:, :100] for a in qkv), segments[:, :100], implementation="splash")
    with pytest.raises(UserError, match="cudnn attention cannot cap scores, as this model does at 50.0; use xla"):
        self_attention(*qkv, segments, implementation="cudnn", softcap=50.0)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, 1, 8), ("data", "fsdp", "tensor"))):
        with pytest.raises(UserError, match="4 heads among mesh.tensor = 8 devices; the nearest size that fits is 4"):
            jax.eval_shape(functools.partial(self_attention, implementation="splash"), *qkv, segments)


def test_shapes_are_checked():
    checked = jaxtyped(typechecker=beartype)(self_attention)
    q, k, v = inputs(1)
    checked(q, k, v, SEGMENTS[:1], implementation="xla")
    with pytest.raises(TypeCheckError):
        checked(q, k[:, :64], v, SEGMENTS[:1], implementation="xla")


if __name__ == "__main__":
    on_every_mesh()

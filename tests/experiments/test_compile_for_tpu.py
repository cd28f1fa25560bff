"""Two layers of the paper's models, compiled for a pod of 64 chips: what fits, what is exchanged, what is never held.

Needs `make libtpu`, which `.ci/run` does; without it, only the reading of compiled text is tested.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dppo_jax.devices.chips import CHIPS
from experiments.compile_for_tpu.hlo import Module, buffers
from experiments.compile_for_tpu.report import kernel_cycles, real_systems, too_large
from experiments.compile_for_tpu.steps import NAMES
from tests.helpers.fixtures import unhurried_environment
from tests.helpers.places import ROOT

LIBTPU = ROOT / "build" / "libtpu"
needs_libtpu = pytest.mark.skipif(
    not LIBTPU.is_dir() and "CI" not in os.environ, reason="the TPU compiler is not here: make libtpu"
)

TEXT = """HloModule jit_f, is_scheduled=true

%fused (p0: bf16[6,64,128], p1: s32[]) -> bf16[64,32] {
  %p0 = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[] parameter(1)
  %slice = bf16[1,64,128]{2,1,0} dynamic-slice(%p0, %p1, %p1, %p1), dynamic_slice_sizes={1,64,128}
  %flat = bf16[64,128]{1,0} bitcast(%slice)
  %w = bf16[128,32]{1,0} constant({...})
  ROOT %product = bf16[64,32]{1,0} convolution(%flat, %w), dim_labels=bf_io->bf
}

%all-reduce-scatter.1 (input: bf16[64,32]) -> bf16[16,32] {
  %input = bf16[64,32]{1,0} parameter(0)
  %all-reduce.5 = bf16[64,32]{1,0} all-reduce(%input), replica_groups=[16,4]<=[64], to_apply=%add
  ROOT %part = bf16[16,32]{1,0} dynamic-slice(%all-reduce.5), dynamic_slice_sizes={16,32}
}

%cond (c: (s32[], bf16[6,64,128])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[6,64,128]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %n = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (b: (s32[], bf16[6,64,128])) -> (s32[], bf16[6,64,128]) {
  %b = (s32[]{:T(128)}, bf16[6,64,128]{2,1,0}) parameter(0)
  %number = s32[]{:T(128)} get-tuple-element(%b), index=0
  %stack = bf16[6,64,128]{2,1,0} get-tuple-element(%b), index=1
  %fusion.1 = bf16[64,32]{1,0} fusion(%stack, %number), calls=%fused, backend_config={"estimated_cycles":"600"}
  %fusion.2 = bf16[16,32]{1,0} fusion(%fusion.1), kind=kCustom, calls=%all-reduce-scatter.1
  %all-gather.3 = bf16[64,32]{1,0} all-gather(%fusion.2), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %out = (s32[]{:T(128)}, bf16[6,64,128]{2,1,0}) tuple(%number, %stack)
}

ENTRY %main (a: bf16[6,64,128]) -> bf16[6,64,128] {
  %a = bf16[6,64,128]{2,1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[6,64,128]{2,1,0}) tuple(%zero, %a)
  %while.1 = (s32[]{:T(128)}, /*index=1*/bf16[6,64,128]{2,1,0}) while(%start), condition=%cond, body=%body
  ROOT %end = bf16[6,64,128]{2,1,0} get-tuple-element(%while.1), index=1
}
"""


def test_sizes_of_arrays():
    found = buffers("(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, f32[3]{0}, pred[], s4[8]{0}, f8e4m3fn[2,2])")
    assert [b.bytes for b in found] == [64, 12, 1, 4, 4]
    assert [b.in_hbm for b in found] == [False, True, True, True, True]


def test_a_loop_counts_by_its_trips():
    module = Module(TEXT)
    times = {i.name: (n, in_loop) for i, n, in_loop in module.executed}
    assert times["fusion.1"] == (6, True) and times["while.1"] == (1, False)


def test_collectives_are_found_inside_fusions():
    scatter, gather = Module(TEXT).collectives()
    assert (scatter.kind, scatter.count, scatter.bytes, scatter.group) == ("reduce-scatter", 6, 64 * 32 * 2, 4)
    assert (gather.kind, gather.count, gather.bytes, gather.group) == ("all-gather", 6, 64 * 32 * 2, 4)
    assert gather.received == 6 * 64 * 32 * 2 * 3 / 4 and gather.in_loop


def test_a_slice_that_is_read_counts_as_a_slice():
    """64 x 128 of bfloat16 read and 64 x 32 written, in each of six turns."""
    module = Module(TEXT)
    i = module.computations["body"]["fusion.1"]
    assert module.moved(i) == 2 * (64 * 128 + 64 * 32) + 4  # and the number


def test_estimates_of_slices_are_cut_to_what_moves_but_not_below_the_products():
    module = Module(TEXT)
    read, written, number = 2 * 64 * 128, 2 * 64 * 32, 4
    share = (read + number + written) / (6 * read + number + written)
    scatter = 2 * (64 * 32 + 16 * 32)  # without an estimate: its bytes, at one a cycle
    fast = module.cycles(lambda i, m: 0.0, 1.0, 1e12)
    assert fast == pytest.approx(6 * (600 * share + scatter))
    bound = module.cycles(lambda i, m: 0.0, 1.0, 2 * 64 * 128 * 32 / 500)
    assert bound == pytest.approx(6 * (500 + scatter))


PAGED = """HloModule jit_g

ENTRY %main (a: bf16[2,64,128,128]) -> f32[8,128] {
  %a = bf16[2,64,128,128]{3,2,1,0} parameter(0)
  ROOT %paged_attention.1 = f32[8,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"
}
"""


def test_a_kernel_that_reads_pages_takes_the_time_of_their_bytes():
    """Not of the whole pool, which is its operand."""
    module, chip = Module(PAGED), CHIPS["v5p"]
    cycles = module.cycles(kernel_cycles(chip, 1.0, paged_bytes=2765e6), 1.0, 1.0)
    assert cycles == pytest.approx(1e-3 * chip.clock)
    assert module.traffic() == 2 * 2 * 64 * 128 * 128 + 4 * 8 * 128 and module.traffic(lambda i: 7) == 7


IN_PLACE = """HloModule jit_h

ENTRY %main (a: bf16[512,128], b: bf16[64,128,256]) -> bf16[512,256] {
  %a = bf16[512,128]{1,0} parameter(0)
  %b = bf16[64,128,256]{2,1,0} parameter(1)
  ROOT %gmm.1 = bf16[512,256]{1,0} custom-call(%a, %b), custom_call_target="tpu_custom_call",
operand_layout_constraints={bf16[512,128]{1,0}, bf16[64,128,256]{2,1,0}}, metadata={op_name="jit(h)/SCOPE/gmm"}
}
""".replace(",\noperand", ", operand")


@pytest.mark.parametrize(("scope", "experts"), [("shard_map", 64), ("in_place", 16)])
def test_a_product_in_place_reads_one_layers_experts(scope, experts):
    """A quarter of its operand, of a model of four layers."""
    chip = CHIPS["v5p"]._replace(flops=1e30)  # the bytes alone
    module = Module(IN_PLACE.replace("SCOPE", scope))
    seconds = module.cycles(kernel_cycles(chip, 1.0, layers=4), 1.0, 1.0) / chip.clock
    assert seconds == pytest.approx(2 * (512 * 128 + 512 * 256 + experts * 128 * 256) / chip.bandwidth)


def test_predictions_carry_the_range_of_real_systems(tmp_path, monkeypatch):
    entries = [dict(step="decode", ratio=1.25), dict(step="decode", ratio=None), dict(step="decode", ratio=2.5)]
    (tmp_path / "calibration.json").write_text(json.dumps([*entries, dict(step="train", ratio=9.0)]))
    monkeypatch.setattr("experiments.compile_for_tpu.report.CALIBRATION", tmp_path / "calibration.json")
    assert real_systems("decode") == real_systems("rollout")
    assert real_systems("decode") == "; real systems took 1.2 to 2.5 times this (docs/pods.md)"
    monkeypatch.setattr("experiments.compile_for_tpu.report.CALIBRATION", tmp_path / "missing.json")
    assert real_systems("decode") == ""


def test_what_does_not_fit_says_what_to_change():
    said = too_large("decode", "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 120.5G of 95.74G hbm. ...")
    assert said == (
        "decode does not fit: it would use 120.5G of 95.74G; lower rollout.slots (rows decoded at a time) or "
        "rollout.max_new_tokens, or raise mesh.tensor"
    )


def run(folder: Path, config: str, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.compile_for_tpu", "--config", f"configs/paper/{config}.py"]
    environment = unhurried_environment()  # the compiler's own work is what is looked at
    return subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module", params=["dense_base", "moe_base"])
def steps(request, tmp_path_factory) -> tuple[str, Path, dict]:
    """(config, the folder of the compiled text, {step: what --json says})"""
    folder = tmp_path_factory.mktemp("tpu")
    more = ["--topology", "v5p:4x4x4", "--layers", "2", "--json", str(folder / "found.json"), "--hlo", str(folder)]
    of_rollout = ["--steps", "prefill,decode", "--lengths", "uniform:100:8000"]
    more += ["--steps", "train,decode"] if request.param == "moe_base" else of_rollout
    done = run(folder, request.param, *more)
    assert done.returncode == 0, done.stderr
    return request.param, folder, {step["step"]: step for step in json.loads((folder / "found.json").read_text())}


def exchanged(step: dict, kind: str, in_loop: bool) -> list[dict]:
    return [c for c in step["collectives"] if c["kind"] == kind and c["in_loop"] == in_loop]


@needs_libtpu
def test_two_layers_for_a_pod(steps):
    name, folder, found = steps
    for step in (found[name] for name in NAMES if name in found):
        assert step["peak_gib"] <= 0.9 * step["hbm_gib"] == 0.9 * CHIPS["v5p"].memory / 2**30
        assert not exchanged(step, "all-to-all", True)
        assert 0 < step["predicted_seconds"] and 0 < step["ideal_seconds"]
        assert step["step"] in ("prefill", "rollout") or step["alias_fraction"] >= 0.99
    decode = found["decode"]
    if name == "moe_base":
        check_train(found["train"])
        for step in found:  # a chip gathers a quarter of a layer's experts, never all of them
            compiled = (folder / f"{step}.txt").read_text()
            experts = {int(count) for count, _ in re.findall(r"\[(\d+),(2048,768|768,2048|2048,1536)\]", compiled)}
            assert max(experts) == 32, step
    # The cache is written in place: what is temporary beside it does not grow with it.
    assert decode["temp_gib"] * 2**30 < 0.15 * decode["cache_bytes"], "2% at full depth"
    assert decode["moved_bytes"] <= 1.4 * (decode["weight_bytes"] + decode["read_bytes"])
    if name == "dense_base":
        check_rollout(found["rollout"], decode)


def check_train(train: dict) -> None:
    assert train["largest_buffer_bytes"] < train["logits_bytes"]
    # Gradients are summed where they are kept. What is summed whole: small ones, the hidden states' at the head.
    assert exchanged(train, "reduce-scatter", True)
    # No vocabulary is cut over tensor.
    assert max(c["largest_bytes"] for c in exchanged(train, "all-reduce", True)) < 2 * 2048 * 4096


def check_rollout(rollout: dict, decode: dict) -> None:
    """Of all 1,024 rows at once: one wave, as long as its longest row."""
    assert rollout["slots"] == 1024 and 7000 < rollout["decode_steps"] < 8000 and rollout["put_back"] == 0
    assert rollout["decode_steps_without_tail"] == pytest.approx(4050, rel=0.05)
    assert rollout["pages_live"] <= rollout["pages_read"] and 0.4 < rollout["live_share"] < 0.6
    assert 0 < rollout["ideal_seconds"] < rollout["predicted_seconds"]
    assert rollout["predicted_seconds"] < rollout["prefill_seconds"] + 8000 * decode["predicted_seconds"]


@needs_libtpu
@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--topology", "v5p"], "topology 'v5p' is not CHIP:SHAPE, such as v5p:4x4x4 or v6e:8x8"),
        (["--topology", "v9:4x4"], "unknown chip 'v9'; the nearest is 'v4'"),
        (["--topology", "v5p:4x4x4", "--steps", "trian"], "unknown step 'trian'; the nearest is 'train'"),
        (["--topology", "v5p:4x4x4", "--lengths", "normal:3"], "lengths 'normal:3' are neither lognormal:MEAN:SIGMA"),
        (
            ["--topology", "v5p:4x4x4", "--lengths", "uniform:1:2", "--steps", "train"],
            "--lengths needs the step prefill",
        ),
        (["--topology", "v5p:2x2x1"], "does not use exactly the 4 devices there are"),
    ],
)
def test_what_is_bad_is_refused_in_one_sentence(tmp_path, more, sentence):
    done = run(tmp_path, "dense_base", *more)
    assert done.returncode != 0 and sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1

"""What was found of each compiled step, as numbers for scripts and as text for people."""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dppo_jax.devices.chips import GIB, Chip
from dppo_jax.models import ModelConfig
from dppo_jax.models.flops import attention_flops, forward_flops, trained_flops, weight_flops
from dppo_jax.models.moe import FIRST, IN_PLACE
from experiments.compile_for_tpu.hlo import Instruction, Module
from experiments.compile_for_tpu.steps import Step
from experiments.run.setup import Setup


def flops(config: ConfigDict, model: ModelConfig, step: Step) -> tuple[float, float]:
    """(of the model, as counted for MFU; of the program, with what is computed again), over all chips."""
    prompt, response = config.data.max_prompt_len, config.rollout.max_new_tokens
    length = prompt + response
    if step.name == "train":
        rows, again = step.tokens / length, 0 if config.policy.remat == "none" else 1
        useful = trained_flops(Setup(config, model).trained_model, length, response)
        layers, head = weight_flops(model, length, 0), weight_flops(model, 0, response)
        # The kernel's backward pass makes the scores anew: half of a forward pass.
        attention = (0.5 + again) * attention_flops(model, 0, length)
        recomputed = attention + head + (layers if config.policy.remat == "full" else 0)
        return rows * useful, rows * (useful + recomputed)
    if step.name == "prefill":
        forward = step.tokens / prompt * forward_flops(model, 0, prompt, 1)
        return forward, forward
    forward = step.tokens * forward_flops(model, length - 1, length, 1)
    return forward, forward


PAGED = "paged_attention"  # what the kernel that reads pages is called


def kernel_cycles(chip: Chip, rows_share: float, paged_bytes: float = 0.0, layers: int = 1):
    """Cycles of a Pallas kernel: its products at the chip's full rate, or its bytes at the speed of the memory where
    that takes longer (a grouped product of few tokens reads every expert) or is all there is (attention to pages).
    `rows_share`: real rows of a grouped product; `paged_bytes`: what one call reads of the pages; `layers`: of the
    model, one of which a product in place reads."""

    def cycles(i: Instruction, module: Module) -> float:
        if i.name.startswith(PAGED):
            return paged_bytes / chip.bandwidth * chip.clock
        if i.name.startswith(("splash", "ragged-dot", "gmm", "tgmm")) and "metadata" not in i.name:
            products = _kernel_flops(i, module, rows_share) / chip.flops
            moved = 0 if i.name.startswith("splash") else module.moved(i)
            if IN_PLACE in i.op_name.split("/"):
                moved -= _experts_bytes(i) * (layers - 1) // layers
            return max(products, moved / chip.bandwidth) * chip.clock
        return 0.0

    return cycles


def _experts_bytes(i: Instruction) -> int:
    """Of the experts that a grouped product is given, in bfloat16."""
    shapes = (s.split(",") for s in re.findall(r"bf16\[([\d,]+)\]\{", i.text))
    return 2 * next(math.prod(map(int, s)) for s in shapes if len(s) == 3)


def _kernel_flops(i: Instruction, module: Module, rows_share: float) -> float:
    shapes = [tuple(int(n) for n in s.split(",")) for s in re.findall(r"(?:bf16|f32)\[([\d,]+)\]\{", i.text)]
    if i.name.startswith("splash"):
        queries = max((s for s in shapes if len(s) >= 3), key=math.prod)  # [..., heads, length, size]
        products = next(n for name, n in {"fwd": 2, "dkv": 4, "dq": 3}.items() if name in i.name)
        return float(products * math.prod(queries) * queries[-2])  # causal: half the scores, two operations each
    _, inner, outer = next(s for s in shapes if len(s) == 3)
    rows = max(math.prod(s) for s in shapes if len(s) == 2) // max(inner, outer)
    return 2.0 * rows_share * rows * inner * outer


def facts(config: ConfigDict, model: ModelConfig, step: Step, program: Any, seconds: float, chip: Chip, chips: int):
    """The object of one step that --json writes."""

    def turns(loop: Instruction) -> int:
        # A mixture's load is taken to be even: its first expert chunk is the only one.
        return 0 if "shard_map" in loop.op_name else step.microbatches

    def reads(i: Instruction) -> int | None:
        return step.read_bytes // model.num_layers if i.name.startswith(PAGED) else None

    memory, module = program.memory_analysis(), Module(program.as_text(), turns)
    speeds = chip.bandwidth / chip.clock, chip.flops / chip.clock
    kernels = kernel_cycles(chip, 1 / FIRST, step.read_bytes / model.num_layers, model.num_layers)
    predicted = module.cycles(kernels, *speeds) / chip.clock
    useful, executed = flops(config, model, step)
    exchanged: dict[tuple[str, bool], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for c in module.collectives():
        sums = exchanged[c.kind, c.in_loop]
        sums[0] += c.count
        sums[1] += c.received
        sums[2] = max(sums[2], c.bytes)
    largest, where = module.largest()
    donated = memory.alias_size_in_bytes
    expected = _donated_bytes(step, memory)
    result = {
        "step": step.name,
        "compile_seconds": round(seconds, 1),
        "peak_gib": memory.peak_memory_in_bytes / GIB,
        "hbm_gib": chip.memory / GIB,
        "argument_gib": memory.argument_size_in_bytes / GIB,
        "output_gib": memory.output_size_in_bytes / GIB,
        "alias_gib": donated / GIB,
        "temp_gib": memory.temp_size_in_bytes / GIB,
        "alias_fraction": donated / expected if expected else None,
        "largest_buffer_bytes": largest,
        "largest_buffer": where,
        "logits_bytes": step.logits_bytes,
        "collectives": [
            {"kind": kind, "count": int(n), "bytes": int(size), "largest_bytes": int(most), "in_loop": in_loop}
            for (kind, in_loop), (n, size, most) in sorted(exchanged.items())
        ],
        "predicted_seconds": predicted,
        "exchange_seconds": sum(size for _, size, _ in exchanged.values()) / chip.links,
        "ideal_seconds": executed / chips / chip.flops,
        "mfu": useful / chips / chip.flops / predicted,
        "moved_bytes": module.traffic(reads),
    }
    if step.name == "decode":
        roofline = (step.weight_bytes + step.read_bytes) / chip.bandwidth
        result |= {
            "cache_bytes": step.cache_bytes,
            "read_bytes": step.read_bytes,
            "weight_bytes": step.weight_bytes,
            "roofline_seconds": roofline,
            "ideal_seconds": roofline,
            "predicted_seconds": max(predicted, result["moved_bytes"] / chip.bandwidth),
        }
    return result


def _donated_bytes(step: Step, memory: Any) -> int:
    """What comes out of a step that takes its state in: all outputs but the metrics."""
    return memory.output_size_in_bytes if step.name in ("train", "decode") else 0


def text(step_facts: dict[str, Any]) -> str:
    """One step for people."""
    f = step_facts
    lines = [
        f"{f['step']}: compiled in {f['compile_seconds']:.0f} s",
        f"  memory     peak {f['peak_gib']:.2f} of {f['hbm_gib']:.2f} GiB: arguments {f['argument_gib']:.2f}, outputs "
        f"{f['output_gib']:.2f} ({f['alias_gib']:.2f} in place of arguments), temporary {f['temp_gib']:.2f}",
        f"  largest    {f['largest_buffer_bytes'] / 2**20:,.0f} MiB: {f['largest_buffer']}"
        f" (all logits: {f['logits_bytes'] / 2**20:,.0f} MiB)",
    ]
    for c in f["collectives"]:
        lines.append(
            f"  {c['kind']:<18} {c['count']:>6} x {'in loops ' if c['in_loop'] else 'outside  '}"
            f"{c['bytes'] / 2**20:>12,.1f} MiB to each chip, the largest {c['largest_bytes'] / 2**20:,.1f}"
        )
    lines.append(
        f"  time       {_time(f['predicted_seconds'])} predicted, estimate{real_systems(f['step'])}; ideal "
        f"{_time(f['ideal_seconds'])}; ratio {f['predicted_seconds'] / f['ideal_seconds']:.2f}; exchanges, if none "
        f"overlap: {_time(f['exchange_seconds'])}"
    )
    if f["step"] == "decode":
        least = f["weight_bytes"] + f["read_bytes"]
        lines.append(
            f"  bytes      {f['moved_bytes'] / GIB:.2f} GiB moved a step, weights and cache {least / GIB:.2f}; ratio "
            f"{f['moved_bytes'] / least:.2f}; temporary / cache {f['temp_gib'] * GIB / f['cache_bytes']:.4f}"
        )
    else:
        lines.append(f"  MFU        {100 * f['mfu']:.0f}%, estimate (the model's operations at bfloat16 peak)")
    return "\n".join(lines)


CALIBRATION = (
    Path(__file__).parent / "result" / "calibration.json"
)  # written by experiments.compile_for_tpu.calibration


def real_systems(step: str) -> str:
    """How much longer real systems took than what is predicted for them, of the measured shapes of that kind; nothing
    where none is. A rollout is as decoding is, a prefill as training."""
    kind = {"rollout": "decode", "prefill": "train"}.get(step, step)
    entries = json.loads(CALIBRATION.read_text()) if CALIBRATION.is_file() else []
    ratios = [entry["ratio"] for entry in entries if entry["step"] == kind and entry["ratio"] is not None]
    if not ratios:
        return ""
    return f"; real systems took {min(ratios):.1f} to {max(ratios):.1f} times this (docs/pods.md)"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def whole_run(config: ConfigDict, step_facts: list[dict[str, Any]]) -> str:
    """How long the run would take if every response were as long as it may be."""
    c, seconds = config, {f["step"]: f["predicted_seconds"] for f in step_facts}
    rows = c.rollout.prompts * c.rollout.group_size
    waves = math.ceil(rows / min(c.rollout.slots or rows, rows))
    rollout = seconds["prefill"] + waves * c.rollout.max_new_tokens * seconds["decode"]
    updates = c.train.epochs * c.train.minibatches * seconds["train"]
    return (
        f"a step of the run, every response as long as it may be: {rollout:,.0f} s of rollout, {updates:,.0f} s of "
        f"updates; {c.steps} steps, without evaluation: {c.steps * (rollout + updates) / 3600:.0f} hours, estimate"
    )


def rollout_text(f: dict[str, Any]) -> str:
    """A whole rollout, from `whole_rollout.facts`, for people."""
    read, ratio = f["pages_read"] / max(f["pages_live"], 1), f["predicted_seconds"] / f["ideal_seconds"]
    lines = [
        f"rollout at lengths {f['lengths']}, a cache of {f['cache']}",
        f"  decode     {f['decode_steps']:,.0f} steps of {f['slots']:,} slots, {100 * f['live_share']:.0f}% of them "
        f"live; {f['decode_steps_without_tail']:,.0f} steps if all were",
        f"  cache      read / live {read:.2f}; rows that made room {f['put_back']:,.0f}",
        f"  time       {_time(f['predicted_seconds'])} predicted, estimate{real_systems(f['step'])}; ideal "
        f"{_time(f['ideal_seconds'])}; ratio {ratio:.2f}",
        f"             of it the prompts {_time(f['prefill_seconds'])}, rows that go on {_time(f['resume_seconds'])}",
    ]
    return "\n".join(lines)


def run_at_lengths(config: ConfigDict, step_facts: list[dict[str, Any]], turns: tuple[int, int]) -> str:
    """How long the run would take. `turns`: microbatches of a training step, at these lengths and at most."""
    c, seconds = config, {f["step"]: f["predicted_seconds"] for f in step_facts}
    updates = c.train.epochs * c.train.minibatches * seconds["train"] * turns[0] / turns[1]
    hours = c.steps * (seconds["rollout"] + updates) / 3600
    return (
        f"a step of the run at these lengths: {seconds['rollout']:,.0f} s of rollout, {updates:,.0f} s of updates "
        f"({turns[0]:,} microbatches of {turns[1]:,}); {c.steps} steps, without evaluation: {hours:.1f} hours, estimate"
    )


ADVICE = {
    "train": "train.micro_rows, or raise mesh.tensor or mesh.fsdp; policy.remat=full keeps least",
    "prefill": "rollout.prompts or data.max_prompt_len, or raise mesh.tensor",
    "decode": "rollout.slots (rows decoded at a time) or rollout.max_new_tokens, or raise mesh.tensor",
}


def too_large(step: str, error: str) -> str:
    """Why a step does not fit, and what to change."""
    match = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", error)
    by = f"{match[1]} of {match[2]}" if match else "more memory than a chip has"
    return f"{step} does not fit: it would use {by}; lower {ADVICE[step]}"

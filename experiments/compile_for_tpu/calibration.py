"""What the predictor says of shapes that others have measured on TPUs: predicted, measured, and their ratio.

    python -m experiments.compile_for_tpu.calibration --out experiments/compile_for_tpu/result

Writes DIR/calibration.json, from which every prediction takes its range of real systems, and DIR/calibration.md. Shapes
that the file has already are not compiled again: remove it after a change to the predictor. The measured systems are
others' code on the same shapes, so that a ratio holds what a real system adds, and what that system does otherwise:
MaxText trains without our loss, sglang-jax serves requests that arrive. Half an hour on two cores.
"""

from experiments.compile_for_tpu.__main__ import compile_all  # noqa: F401  first: it sets jax up

# isort: split
import dataclasses
import json
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import base
from dppo_jax.devices import chips
from dppo_jax.errors import run_main
from dppo_jax.files import Path, make_folder, write_text
from dppo_jax.models import ModelConfig
from dppo_jax.models.config import config_from_hf
from dppo_jax.models.pages import PAGE, count_for
from experiments.compile_for_tpu import lengths, report, steps, whole_rollout
from experiments.run import cli
from experiments.run.memory import page_bytes
from experiments.run.rollouts import training_rollout
from experiments.run.setup import Setup

MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext/blob/main/docs/reference/models/tiering.md"
SGLANG = "https://github.com/sgl-project/sglang-jax/blob/main/docs/cookbook/autoregressive/Qwen/Qwen3.md"

LLAMA = dict(model_type="llama", num_key_value_heads=8, rms_norm_eps=1e-5, tie_word_embeddings=False)
LARGE = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
QWEN = dict(model_type="qwen3", num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, vocab_size=151936)
MODELS: dict[str, dict[str, Any]] = {
    "Llama-2-70B": dict(**LLAMA, **LARGE, vocab_size=32000, max_position_embeddings=4096),
    "Llama-3.1-70B": dict(**LLAMA, **LARGE, vocab_size=128256, rope_theta=500000.0, max_position_embeddings=131072),
    "Llama-3.1-8B": dict(
        **LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=128256, rope_theta=500000.0, max_position_embeddings=131072,
    ),
    "Qwen3-8B": dict(
        **QWEN, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        rope_theta=1000000.0, max_position_embeddings=40960, tie_word_embeddings=False,
    ),
    "Qwen3-32B": dict(
        **QWEN, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
        rope_theta=1000000.0, max_position_embeddings=40960, tie_word_embeddings=False,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape, and what was measured: of training tokens a second and chip, of decoding milliseconds a token."""

    step: str  # train, decode
    model: str
    topology: str
    rows: int  # of training, on each chip; of decoding, all
    prompt: int
    response: int
    measured: float
    source: str
    why_not: str = ""  # there is no prediction

    @property
    def shape(self) -> str:
        """In words."""
        if self.step == "train":
            return f"rows of {self.prompt + self.response:,}"
        return f"{self.prompt:,} + {self.response:,} tokens, batch {self.rows}"


PROMPT = 128  # tokens of a row of training that are not predicted, in ours
FULL = "the measured server has no room for that many rows, and does not say how many it had"
CASES = [
    # v5p-512 counts TensorCores: 256 chips. The rows a chip are ours.
    Case("train", "Llama-2-70B", "v5p:8x8x4", 4, PROMPT, 4096 - PROMPT, 692, MAXTEXT),
    Case("train", "Llama-3.1-8B", "v6e:16x16", 2, PROMPT, 8192 - PROMPT, 7207, MAXTEXT),
    Case("train", "Llama-3.1-70B", "v6e:16x16", 1, PROMPT, 8192 - PROMPT, 960, MAXTEXT),
    Case("train", "Mixtral-8x7B", "v5p:8x4x4", 4, PROMPT, 4096 - PROMPT, 2909, MAXTEXT, "a family that is not here"),
    Case("decode", "Qwen3-8B", "v6e:2x2", 64, 1024, 1024, 11.11, SGLANG),
    Case("decode", "Qwen3-8B", "v6e:2x2", 256, 1024, 1024, 30.00, SGLANG),
    Case("decode", "Qwen3-8B", "v6e:2x2", 64, 4096, 1024, 21.13, SGLANG),
    Case("decode", "Qwen3-8B", "v6e:2x2", 64, 8192, 1024, 31.98, SGLANG),
    Case("decode", "Qwen3-32B", "v6e:2x2", 64, 1024, 1024, 29.48, SGLANG),
    Case("decode", "Qwen3-32B", "v6e:2x2", 256, 1024, 1024, 34.27, SGLANG, FULL),
    Case("decode", "Qwen3-32B", "v6e:2x2", 64, 4096, 1024, 35.32, SGLANG, FULL),
    Case("decode", "Qwen3-32B", "v6e:2x2", 64, 8192, 1024, 33.43, SGLANG, FULL),
]


def config_of(case: Case, num_chips: int) -> ConfigDict:
    """A config of ours with that shape: training over fsdp, decoding over tensor."""
    c = base.get_config()
    c.policy.dtype = c.rollout.dtype = "bfloat16"
    c.policy.remat, c.policy.matmul = "full", "default"
    c.data.max_prompt_len, c.rollout.max_new_tokens, c.rollout.group_size = case.prompt, case.response, 1
    c.train.minibatches = 1
    if case.step == "train":
        c.rollout.prompts, c.train.micro_rows, c.mesh.fsdp = case.rows * num_chips, case.rows, num_chips
    else:
        c.rollout.prompts, c.mesh.fsdp, c.mesh.tensor = case.rows, 1, num_chips
        own = count_for(case.prompt + case.response - 1) - case.prompt // PAGE
        c.rollout.pages = case.rows * own  # the prompts' full pages are there already
    return c


def predicted(case: Case, layers: int | None = None) -> float:
    """In the unit of what was measured."""
    num_chips, chip = len(steps.devices(case.topology)), chips.of_topology(case.topology)
    config, model = config_of(case, num_chips), config_from_hf(MODELS[case.model], case.model)
    model = dataclasses.replace(model, num_layers=layers or model.num_layers)
    mesh = steps.mesh_of(config, case.topology)
    with steps.in_force(config, mesh):
        if case.step == "train":
            step = steps.train(config, model, mesh)
        else:
            step = next(s for s in steps.rollout(config, model, mesh) if s.name == case.step)
        program, seconds = steps.compiled(step)
        facts = report.facts(config, model, step, program, seconds, chip, num_chips)
        if case.step == "train":
            return step.tokens / facts["predicted_seconds"] / num_chips
        return 1e3 * _seconds_a_token(config, model, mesh, facts, chip)


def _seconds_a_token(config: ConfigDict, model: ModelConfig, mesh: Mesh, decode: dict, chip: chips.Chip) -> float:
    """A decode step, on average over responses that all begin and end together."""
    setup, rows = Setup(config, model, mesh), config.rollout.prompts
    policy = training_rollout(setup)
    prompts, responses = np.full(rows, config.data.max_prompt_len), np.full(rows, config.rollout.max_new_tokens)
    found = lengths.decoding(prompts, responses, whole_rollout.settings_of(setup, policy))
    cache_bytes = found.slowest_pages * page_bytes(setup, policy) / found.decode_steps
    return decode["predicted_seconds"] + (cache_bytes - decode["read_bytes"]) / chip.bandwidth


def row(case: Case) -> dict[str, Any]:
    """The object of a case that calibration.json has; `ratio` is the measured time over the predicted one."""
    entry: dict[str, Any] = dataclasses.asdict(case) | {"predicted": None, "ratio": None}
    if not case.why_not:
        entry["predicted"] = predicted(case)
        speed = case.step == "train"
        entry["ratio"] = entry["predicted"] / case.measured if speed else case.measured / entry["predicted"]
    return entry


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one row a shape."""
    lines = ["| | chips | shape | predicted | measured | measured / predicted time |", "|---|---|---|---|---|---|"]
    for entry in rows:
        case = Case(**{field.name: entry[field.name] for field in dataclasses.fields(Case)})
        unit = "tokens/s a chip" if case.step == "train" else "ms a token"
        where = "MaxText" if case.source == MAXTEXT else "sglang-jax"
        number = ",.0f" if case.step == "train" else ",.1f"
        said = "-" if entry["predicted"] is None else format(entry["predicted"], number)
        ratio = f"- ({case.why_not})" if entry["ratio"] is None else f"{entry['ratio']:.2f}"
        lines.append(
            f"| {case.step}, {case.model} | {case.topology} | {case.shape} | {said} | "
            f"{format(case.measured, number)} {unit}, {where} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the table goes")
    arguments = parser.parse_args()
    make_folder(arguments.out)
    file = arguments.out / "calibration.json"
    before = json.loads(file.read_text()) if file.is_file() else []
    rows: list[dict[str, Any]] = []
    for case in CASES:
        kept = [entry for entry in before if dataclasses.asdict(case).items() <= entry.items()]
        rows.append(kept[0] if kept else row(case))
        told = f"predicted {rows[-1]['predicted']}, measured {case.measured}"
        print(f"{case.step} {case.model} {case.shape}: {told}", flush=True)
        rest = [entry for entry in before if entry not in rows]
        write_text(file, json.dumps(rows + rest, indent=2) + "\n")
    write_text(file, json.dumps(rows, indent=2) + "\n")
    write_text(arguments.out / "calibration.md", table(rows))


if __name__ == "__main__":
    run_main(main)

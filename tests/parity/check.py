"""Makes every golden value anew and compares; then has PyTorch transformers load what save_hf writes.

    make parity        or, where torch is installed beside the requirements:  python -m tests.parity.check

1. Every tests/golden/**/make_*.py runs with --check.
2. Each golden model goes through load_params and save_hf. transformers must load the copy without a missing or
   unexpected tensor, to the golden logits, with left padding; loosely where the weights are stored in bfloat16. So do
   the variants of its config, on their row.
3. Each model under assets/ must give the same logits here and in transformers.

Prints a line per check with its worst error, relative to the largest logit, and exits 1 if one fails.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from dppo_jax.models import load_policy, save_hf
from dppo_jax.models.hf import load_params
from tests.helpers.variants import VARIANTS, write_variant

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
LIMITS = {"float32": 1e-4, "bfloat16": 0.05}  # of the largest logit


def run_generators() -> list[tuple[str, str, bool]]:
    rows = []
    for script in sorted(GOLDEN.glob("**/make_*.py")):
        name = str(script.relative_to(ROOT))
        print(f"-- {name} --check", flush=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        status = subprocess.run([sys.executable, str(script), "--check"], cwd=ROOT, env=environment).returncode
        rows.append((name, "as stored" if status == 0 else f"differs (exit status {status})", status == 0))
    return rows


def transformers_logits(directory: Path, tokens: np.ndarray, mask: np.ndarray, stored: str | None = None) -> np.ndarray:
    """f32[B, T, V], computed in float32. ValueError if it does not load cleanly, or not in the dtype `stored`."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    wrong = {kind: names for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"does not load cleanly: {wrong}")
    if stored is not None and model.dtype != getattr(torch, stored):
        raise ValueError(f"loads as {model.dtype}, not {stored}")
    position = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        out = model.eval().float()(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(position, dtype=torch.long),
        )
    return out.logits.numpy()


def compare(name: str, logits: np.ndarray, expected: np.ndarray, mask: np.ndarray, limit: float):
    error = float(np.abs(logits - expected)[mask].max() / np.abs(expected[mask]).max())
    return name, f"{error:.1e} (limit {limit:.0e})", error <= limit


def check_exports() -> list[tuple[str, str, bool]]:
    with np.load(GOLDEN / "models" / "golden.npz") as file:
        golden = dict(file)
    rows = []
    for directory in sorted(path.parent for path in (GOLDEN / "models").glob("*/config.json")):
        config, params = load_params(directory)
        for dtype, limit in LIMITS.items():
            name = f"save_hf {directory.name} {dtype}"
            with tempfile.TemporaryDirectory() as copy:
                save_hf(copy, config, params, dtype=dtype)
                try:
                    logits = transformers_logits(Path(copy), golden["tokens"], golden["mask"], dtype)
                except ValueError as error:
                    rows.append((name, str(error), False))
                    continue
            rows.append(compare(name, logits, golden[directory.name], golden["mask"], limit))
    return rows + [check_variant(name, golden) for name in VARIANTS]


def check_variant(variant: str, golden: dict[str, np.ndarray]) -> tuple[str, str, bool]:
    name, expected = f"save_hf {variant}", golden[variant]
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as copy:
        save_hf(copy, *load_params(write_variant(variant, Path(scratch))))
        try:
            logits = transformers_logits(Path(copy), golden["tokens"][:1], golden["mask"][:1])[0, -len(expected) :]
        except ValueError as error:
            return name, str(error), False
    return compare(name, logits, expected, np.ones(len(expected), bool), LIMITS["float32"])


def check_assets() -> list[tuple[str, str, bool]]:
    rows = []
    for directory in sorted(path.parent for path in (ROOT / "assets").glob("**/config.json")):
        policy = load_policy(str(directory))
        tokens = np.random.RandomState(0).randint(0, policy.config.vocab_size, (3, 32)).astype(np.int32)
        mask = np.arange(32)[None, :] >= np.array([0, 5, 20])[:, None]
        expected = transformers_logits(directory, tokens, mask)
        ours = np.asarray(policy.logits(policy.params, tokens, mask))
        rows.append(compare(str(directory.relative_to(ROOT)), ours, expected, mask, LIMITS["float32"]))
    return rows


def main() -> None:
    logging.disable_progress_bar()
    rows = run_generators() + check_exports() + check_assets()
    width = max(len(name) for name, _, _ in rows)
    print(f"\n{'check':{width}}  worst error, of the largest logit")
    for name, result, passed in rows:
        print(f"{name:{width}}  {result}{'' if passed else '   FAILED'}")
    failed = [name for name, _, passed in rows if not passed]
    if failed:
        sys.exit(f"error: parity fails for {', '.join(failed)}")
    print("parity holds")


if __name__ == "__main__":
    main()

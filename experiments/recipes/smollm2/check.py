"""Checks a converted SmolLM2 against `transformers`' own reading of the GGUF file. Needs PyTorch and accelerate.

    python -m experiments.recipes.smollm2.check --gguf FILE.gguf --model models/SmolLM2-135M-Instruct

`transformers` has its own name table for GGUF and its own undoing of llama.cpp's row order. Against it are checked:
the converted weights, bit for bit; the logits of the converted directory in `transformers`, and in dppo_jax; the
tokenizer. Worst logit error allowed: 1e-4 of the largest logit. Exit status 1 where a check fails.
"""

import os
import sys

import numpy as np

from dppo_jax.errors import UserError, run_main
from dppo_jax.files import Path
from experiments.run.cli import Parser

TOLERANCE = 1e-4  # largest difference of logits, relative to the largest logit

CHATS = [
    "Solve the following multiplication: 6 * 2. Give only the result as your final answer.",
    "What is the capital of France?",
    "Name three primes above 100, and add 12345 to 67890.",
]
PLAIN = [
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n\nprint(add(2,  40))  # 42",
    "1 + 1 = 2, 12 * 12 = 144, 2024-11-05 17:45; " * 3,
]
# Beyond the prompts: digits after runs of white space (where dropping the digit splitter shows), numerals that are not
# ASCII, special tokens, contractions, bytes.
TEXTS = [
    "1234567890", "=   7", "\n\n5 apples\n\n\n66 pears", "\t8\t 9", "x² + ½ of Ⅷ and ٣", "3.14159e-10, 1,000,000",
    "it's we'll I'd THEY'RE", "naïve café 東京 🙂", " leading and trailing  ", "<|im_start|>user\n7 * 8<|im_end|>\n",
]  # fmt: skip


def make_prompts(tokenizer) -> list[str]:
    """The prompts as text, chats in the model's own template."""
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in CHATS
    ]
    return chats + PLAIN


def padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens i32[N,T], real bool[N,T]); padded right with 0, which causal attention cannot see."""
    lengths = np.array([len(row) for row in rows])
    real = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(real.shape, np.int32)
    tokens[real] = np.concatenate(rows)
    return tokens, real


def check_tokenizer(tokenizer, reference, prompts: list[str]) -> list[str]:
    """Against `transformers`' tokenizer of the GGUF file, with the digit splitter that it drops put back."""
    from tokenizers import pre_tokenizers

    texts = prompts + TEXTS
    ours, bare = tokenizer(texts).input_ids, reference(texts).input_ids
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    theirs = reference(texts).input_ids

    failures = [f"tokens differ for {t!r}: {a} and {b}" for t, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    failures += [f"{t!r} decodes to another text" for t, a in zip(texts, ours, strict=True) if tokenizer.decode(a) != t]
    for token_text in (tokenizer.decode([token]) for token in sorted({token for row in ours for token in row})):
        if len(token_text) > 1 and any(c.isdecimal() for c in token_text):
            failures.append(f"a digit shares the token {token_text!r}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
        if getattr(tokenizer, name) != getattr(reference, name):
            failures.append(f"{name} is {getattr(tokenizer, name)!r}, not {getattr(reference, name)!r}")
    differing = sum(a != b for a, b in zip(ours, bare, strict=True))
    print(f"tokenizer: {len(texts)} texts, {len(failures)} failures ({differing} texts need the digit splitter)")
    return failures


def check_logits(name: str, logits: np.ndarray, expected: np.ndarray) -> list[str]:
    """Both [N,V], over the true tokens. A NaN is as bad as can be."""
    largest = np.abs(expected).max()
    error = float(np.nan_to_num(np.abs(logits - expected).max() / largest, nan=np.inf))
    print(f"logits, {name}: worst error {error:.1e} of the largest logit, {largest:.1f}, over {len(expected)} tokens")
    return [] if error <= TOLERANCE else [f"logits of {name} are off by {error:.1e}, more than {TOLERANCE:.0e}"]


def check(gguf: Path, model: Path) -> list[str]:
    """Prints every comparison; returns a sentence per failed one."""
    if not gguf.is_file():
        raise UserError(f"no GGUF file at {str(gguf)!r}")
    if not (model / "config.json").is_file():
        raise UserError(f"no model in {str(model)!r}: run experiments.recipes.smollm2.convert first")
    os.environ["TQDM_DISABLE"] = "1"  # before transformers: its GGUF bar has no other switch
    try:
        import accelerate  # noqa: F401  (transformers reads GGUF through it)
        import torch
    except ImportError as error:
        raise UserError(f"this check needs torch and accelerate, as in .venv-parity: {error}") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dppo_jax.models import load_policy

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = make_prompts(tokenizer)
    failures = check_tokenizer(tokenizer, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name), prompts)

    reference = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    converted = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    theirs, ours = reference.state_dict(), converted.state_dict()
    different = sorted(theirs.keys() ^ ours.keys())
    different += [name for name in ours if name in theirs and not torch.equal(ours[name], theirs[name])]
    print(f"weights: {len(ours)} tensors, {len(different)} differ from transformers' reading of the GGUF file")
    if different:
        failures.append(f"weights differ, {different[0]!r} first")

    tokens, real = padded(tokenizer(prompts).input_ids)

    def hf_logits(net) -> np.ndarray:
        with torch.inference_mode():
            return net(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()[real]

    expected = hf_logits(reference)
    failures += check_logits("transformers, converted directory", hf_logits(converted), expected)
    policy = load_policy(str(model), dtype="float32")
    failures += check_logits("dppo_jax", np.asarray(policy.logits(policy.params, tokens))[real], expected)
    return failures


def main() -> None:
    parser = Parser(description="Check a converted SmolLM2 against transformers.")
    parser.add_argument("--gguf", type=Path, required=True, help="the GGUF file that was converted")
    parser.add_argument("--model", type=Path, required=True, help="the converted directory")
    args = parser.parse_args()
    if failures := check(args.gguf, args.model):
        print("\n".join(f"FAILED: {line}" for line in failures), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)

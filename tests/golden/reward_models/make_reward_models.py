"""Makes tiny random reward models, as PyTorch `transformers` saves them, and the scores that it gives conversations.

    python tests/golden/reward_models/make_reward_models.py            writes <family>/ and golden.npz beside this file
    python tests/golden/reward_models/make_reward_models.py --check    compares; exits 1 on a difference

Needs torch and transformers. The models are those of ../models with a score of one label in place of the head, and a
tokenizer of characters with a chat template. Llama's padding is the token that ends every turn, as is common: a score
is read at the last token that is none. Conversations are tokenized by apply_chat_template and scored in float64 with
eager attention, each by itself; padded on the right in one batch they must have the same scores, but for Gemma-2 and
Mistral, whose windows make NaN of padding there.

golden.npz: tokens i32[7, T] and lengths i32[7] of CONVERSATIONS, which are the same for all families, and for each its
scores f32[7]; the last row is the longest conversation cut to CUT tokens.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging

from tests.golden.models.make_models import COMMON, CONFIGS, draw
from tests.golden.reward_models.conversations import CONVERSATIONS, CUT, messages

HERE = Path(__file__).parent
FAMILIES = ("llama", "qwen3", "gemma2", "mistral")
TOLERANCE = 1e-6  # of the largest value

SPECIAL = ("<pad>", "<eos>", "<unk>", "<bos>", "<turn>", "<end>")
TOKENS = [*SPECIAL, *"0123456789+-=?!., abcdefghijklmnopqrstuvwxyz:<>YN"]
VOCAB = 64
TEMPLATE = (
    "<bos>{% for m in messages %}<turn>{{ m['role'] }}:{{ m['content'] | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant:{% endif %}"
)
PADDING = {"llama": "<end>", "qwen3": "<pad>", "gemma2": "<pad>", "mistral": "<pad>"}
WINDOWS = ("gemma2", "mistral")

def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A token a character, and those of SPECIAL."""
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.add_special_tokens(list(SPECIAL))
    backend.decoder = decoders.Fuse()
    names = dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token=PADDING[family])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="right", **names)
    made.chat_template = TEMPLATE
    return made


def write_model(directory: Path, family: str) -> None:
    """Saved by transformers."""
    fields = {**CONFIGS[family], **COMMON, **CONFIGS[family], "vocab_size": VOCAB, "num_labels": 1}
    fields["pad_token_id"] = TOKENS.index(PADDING[family])
    for name in ("architectures", "use_cache", "torch_dtype", "cache_implementation"):
        fields.pop(name, None)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    random, one = np.random.RandomState(100 + FAMILIES.index(family)), 0.0 if family == "gemma2" else 1.0
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = {name: torch.tensor(draw(name, shapes[name], one, random)) for name in sorted(shapes)}
    model.load_state_dict(weights)
    model.save_pretrained(directory)
    tokenizer(family).save_pretrained(directory)


def scores_of(directory: Path, rows: list[list[int]]) -> np.ndarray:
    """f32[rows], of rows of tokens."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
    )
    if wrong := {kind: names for kind, names in info.items() if names}:
        raise SystemExit(f"error: transformers does not load {directory} as it is: {wrong}")
    pad, longest = model.config.pad_token_id, max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        score = model.eval()
        alone = np.array([score(input_ids=torch.tensor([row])).logits[0, 0].item() for row in rows])
        together = score(input_ids=ids, attention_mask=mask).logits[:, 0].numpy()
    if not np.isfinite(alone).all() or (directory.name not in WINDOWS and np.abs(alone - together).max() > 1e-6):
        raise SystemExit(f"error: transformers gives {directory} other scores with padding")
    return alone.astype(np.float32)


def make(root: Path) -> None:
    golden: dict[str, np.ndarray] = {}
    for family in FAMILIES:
        write_model(root / family, family)
        encode = PreTrainedTokenizerFast.from_pretrained(root / family).apply_chat_template
        rows = [list(encode(messages(*pair), tokenize=True, return_dict=False)) for pair in CONVERSATIONS]
        rows.append(max(rows, key=len)[:CUT])
        tokens: np.ndarray = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
        assert np.array_equal(golden.setdefault("tokens", tokens), tokens)
        golden["lengths"] = np.array([len(row) for row in rows], np.int32)
        golden[family] = scores_of(root / family, rows)
    np.savez(root / "golden.npz", **golden)


def differences(made: Path, stored: Path) -> list[str]:
    """What differs between two roots, a line each."""
    found = []
    for family in FAMILIES:
        ours, theirs = (json.loads((root / family / "config.json").read_text()) for root in (made, stored))
        for fields in (ours, theirs):
            fields.pop("transformers_version", None)
        found += [f"{family}/config.json differs"] if ours != theirs else []
        ours, theirs = (load_file(root / family / "model.safetensors") for root in (made, stored))
        same = ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
        found += [] if same else [f"{family}/model.safetensors differs"]
    with np.load(made / "golden.npz") as ours, np.load(stored / "golden.npz") as theirs:
        for name in ours:
            error = np.abs(ours[name] - theirs[name]).max() / np.abs(ours[name]).max()
            print(f"{name:22} worst error {error:.1e} of the largest value")
            found += [f"golden.npz: {name} differs by {error:.1e}"] if not error <= TOLERANCE else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the stored data differ")
    check = parser.parse_args().check
    logging.disable_progress_bar()
    if not check:
        make(HERE)
        return
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        found = differences(Path(scratch), HERE)
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

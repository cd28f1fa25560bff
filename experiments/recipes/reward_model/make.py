"""Trains a reward model on replies that a verifier has scored: from a prompt and a reply, whether it was right.

    python -m experiments.recipes.reward_model.make --replies runs/sanity.results.parquet --policy assets/tiny \\
        --out runs/reward_model --epochs 8 --learning-rate 1e-3

The replies are an evaluation's results (experiments.eval --results, or what experiments.build_sanity_set leaves). The
model begins as the policy that wrote them, with a score in place of the head, and learns by logistic regression that
replies of reward 1 are right. One question of eight is held out. It reads conversations by the policy's chat template;
a tokenizer without one gets one that writes the texts as they are.
"""

import contextlib
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dppo_jax.data.conversations import Conversations
from dppo_jax.data.tokenizer import load_tokenizer
from dppo_jax.errors import UserError, run_main
from dppo_jax.files import Path, is_file, make_folder
from dppo_jax.models.decoder import Params
from dppo_jax.models.hf import Classifier, classifier_architecture, load_params, save_classifier
from dppo_jax.optimizer import make_optimizer, make_schedule
from dppo_jax.reward_model import Score, batches, end_of, make_score
from dppo_jax.storage.results import SCHEMA, read_table
from experiments.run.cli import Parser, not_negative, whole

PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ eos_token }}"  # a chat template
COLUMNS = ["question", "prompt", "reply", "reward"]  # that are read
HELD_OUT = 8  # one question of so many
CLIP_NORM, WARMUP = 1.0, 20  # updates


class Replies(NamedTuple):
    """N conversations, padded on the right."""

    tokens: np.ndarray  # i32[N, T]
    lengths: np.ndarray  # i32[N]
    ends: np.ndarray  # i32[N]: where the score is read
    right: np.ndarray  # f32[N]: 1 or 0

    def take(self, rows: Any) -> "Replies":
        return Replies(*(array[rows] for array in self))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation's results. UserError for another file, and for a row that lacks something."""
    if not is_file(path):
        raise UserError(f"--replies: there is no file {path}")
    try:
        table = read_table(path)
    except UserError as error:
        raise UserError(f"--replies: {str(error).partition('; delete it')[0]}") from None
    for name in COLUMNS:
        if name not in table.column_names:
            raise UserError(f"{path} has no column {name!r}: name the results of an evaluation")
        if table.schema.field(name).type != SCHEMA.field(name).type:
            found, wanted = table.schema.field(name).type, SCHEMA.field(name).type
            raise UserError(f"{path}: the column {name!r} holds {found}, and in an evaluation's results {wanted}")
    rows = table.select(COLUMNS).to_pylist()
    if not rows:
        raise UserError(f"{path} holds no rows")
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            if value is None or value != value:
                raise UserError(f"{path}, row {number}: {name!r} is {'missing' if value is None else 'no number'}")
    return rows


def prompt_of(text: str) -> Any:
    """A row's prompt: text, or messages, which are kept as JSON."""
    if text.startswith('[{"'):
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return text


def read_replies(path: Path, tokenizer: Any, max_len: int) -> tuple[Replies, Replies]:
    """Those of the training questions and the held-out ones. UserError where either has no right or no wrong reply,
    and for a conversation of more than max_len tokens."""
    rows = read_rows(path)
    with Conversations(tokenizer) as conversation:
        ids = [conversation(prompt_of(row["prompt"]), row["reply"]) for row in rows]
    lengths = np.array([len(of_row) for of_row in ids], np.int32)
    if (longest := int(lengths.max())) > max_len:
        raise UserError(f"{path} has a conversation of {longest} tokens, more than the policy's {max_len} positions")
    tokens: np.ndarray = np.zeros((len(ids), longest), np.int32)
    for row, of_row in zip(tokens, ids, strict=True):
        row[: len(of_row)] = of_row
    ends = np.array([end_of(of_row, tokenizer.pad_token_id) for of_row in ids], np.int32)
    everything = Replies(tokens, lengths, ends, np.array([row["reward"] >= 1 for row in rows], np.float32))
    held_out = np.array([row["question"] for row in rows]) % HELD_OUT == 0
    parts = everything.take(~held_out), everything.take(held_out)
    for name, part in zip(("training", "held-out"), parts, strict=True):
        if len(part.right) == 0 or part.right.min() == part.right.max():
            raise UserError(f"{path}: the {name} questions need right replies and wrong ones")
    return parts


def fit(score: Score, params: Params, replies: Replies, *, epochs: int, batch: int, learning_rate: float) -> Params:
    """Parameters after so many passes over the replies, in an order of a fixed seed; the first of a pass fill up its
    last batch."""
    size = -(-len(replies.right) // batch) * batch  # of a pass
    updates = epochs * size // batch
    schedule = make_schedule(learning_rate=learning_rate, warmup=WARMUP, schedule="cosine", updates=updates)
    optimizer = make_optimizer(schedule, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=CLIP_NORM)

    def loss(params: Params, part: Replies) -> jax.Array:
        logits = score(params, part.tokens, part.lengths, part.ends)
        return optax.sigmoid_binary_cross_entropy(logits, part.right).mean()

    @jax.jit
    def update(params: Params, opt_state: Any, part: Replies) -> tuple[Params, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, part)
        change, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, change), opt_state, value

    draw, opt_state, values = np.random.default_rng(0), optimizer.init(params), []
    for epoch in range(epochs):
        order: np.ndarray = np.resize(draw.permutation(len(replies.right)), size)
        for start in range(0, size, batch):
            params, opt_state, value = update(params, opt_state, replies.take(order[start : start + batch]))
            values.append(value)
        print(f"epoch {epoch + 1}/{epochs}  loss {float(np.mean(jax.device_get(values))):.4f}", flush=True)
        values = []
    return params


def scores(score: Score, params: Params, replies: Replies, batch: int) -> np.ndarray:
    """f32[N], of one compiled shape."""
    jitted, width = jax.jit(score), replies.tokens.shape[1]
    found: np.ndarray = np.zeros(len(replies.right), np.float32)
    for part in batches(replies.tokens, replies.lengths, replies.ends, batch, (width,)):
        found[part.rows] = jax.device_get(jitted(params, part.tokens, part.lengths, part.ends))[: len(part.rows)]
    return found


def area_under_roc(scores: np.ndarray, right: np.ndarray) -> float:
    """The chance that a right reply scores above a wrong one; equal scores count half."""
    ranks = np.searchsorted(np.sort(scores), scores, "left") + np.searchsorted(np.sort(scores), scores, "right")
    of_right = right == 1
    ahead = (ranks[of_right] + 1).sum() / 2 - of_right.sum() * (of_right.sum() + 1) / 2
    return float(ahead / (of_right.sum() * (~of_right).sum()))


def make(replies: Path, policy: str, out: Path, *, epochs: int, batch: int, learning_rate: float) -> dict[str, float]:
    """Writes the reward model's directory. Returns its accuracy and area on the held-out questions. UserError."""
    config, body = load_params(policy)
    classifier_architecture(config)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    make_folder(out)
    tokenizer = load_tokenizer(policy)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN
    training, held_out = read_replies(replies, tokenizer, config.max_position)
    score = make_score(config, dtype=jnp.float32)
    params = jax.tree.map(jnp.asarray, {"body": body, "score": np.zeros(config.hidden_size, np.float32)})
    params = fit(score, params, training, epochs=epochs, batch=batch, learning_rate=learning_rate)
    found = scores(score, params, held_out, batch)
    save_classifier(out, Classifier(config, jax.device_get(params), tokenizer.pad_token_id), tokenizer)
    return {
        "right": float(held_out.right.mean()),
        "accuracy": float(((found > 0) == (held_out.right == 1)).mean()),
        "area": area_under_roc(found, held_out.right),
        "replies": float(len(found)),
    }


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--replies", type=Path, required=True, metavar="FILE.parquet", help="an evaluation's results")
    parser.add_argument("--policy", required=True, metavar="DIR", help="the model directory that it begins as")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the reward model")
    parser.add_argument("--epochs", type=whole(1, 10_000), default=1, help="passes over the replies (1)")
    parser.add_argument("--batch", type=whole(1, 100_000), default=64, help="replies of an update (64)")
    parser.add_argument("--learning-rate", type=not_negative, default=1e-5, help="at its highest (1e-5)")
    a = parser.parse_args()
    found = make(a.replies, a.policy, a.out, epochs=a.epochs, batch=a.batch, learning_rate=a.learning_rate)
    print(
        f"{a.out}: of {found['replies']:.0f} held-out replies, {found['right']:.3f} of them right, it judges "
        f"{found['accuracy']:.3f} as the verifier; a right one scores above a wrong one with a chance of "
        f"{found['area']:.3f}"
    )


if __name__ == "__main__":
    run_main(main)

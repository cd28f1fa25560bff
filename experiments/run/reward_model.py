"""The reward model of a run: loaded beside the policy, over the same mesh, and asked for a score of every reply."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import jax
import numpy as np
from jax.sharding import Mesh

from dppo_jax.data.conversations import Conversations
from dppo_jax.data.examples import Example
from dppo_jax.data.tokenizer import load_tokenizer
from dppo_jax.devices import hosts
from dppo_jax.devices.hosts import Share
from dppo_jax.devices.sharding import check_divisible, laid_out, local_bytes, named_shardings
from dppo_jax.errors import UserError
from dppo_jax.files import Path
from dppo_jax.models import DTYPES, ModelConfig
from dppo_jax.models.attention import choose, length_multiple
from dppo_jax.models.hf import Classifier, load_classifier_config, place_classifier
from dppo_jax.reward_model import batch_lengths, batches, end_of, make_score, score_axes, score_shapes
from experiments.run.model_files import model_directory
from experiments.run.setup import Setup

SECTION = "reward.model"


def load_reward_model(setup: Setup, examples: Iterable[Example], stack: ExitStack) -> "RewardModel | None":
    """reward.model, whose conversations `stack` closes; None where reward.terms.model is 0. UserError for a directory
    that is no reward model's, and where one of the examples is no conversation of it."""
    if not setup.terms.get("model"):
        return None
    c, directory = setup.config, model_directory(setup.config, SECTION)
    model = load_classifier_config(directory)
    if c.reward.model.max_len > model.longest_row:
        raise UserError(
            f"reward.model.max_len = {c.reward.model.max_len} exceeds the reward model's {model.longest_row} positions"
        )
    model = model.for_rows(c.reward.model.max_len)
    conversations = stack.enter_context(_conversations(setup, directory, model))
    conversations.check(examples)
    if setup.mesh is not None:
        _check_mesh(setup.mesh, model, c.reward.model.rows)
    places = None if setup.mesh is None else named_shardings(setup.mesh, score_axes(model))
    loaded = place_classifier(directory, places, c.reward.model.dtype)
    return RewardModel(setup, loaded._replace(config=model), conversations)


class RewardModel:
    """Scores conversations, `reward.model.rows` at a time. All its shapes are compiled when it is first asked."""

    def __init__(self, setup: Setup, loaded: Classifier, conversations: Conversations):
        self._config, self._mesh = setup.config.reward.model, setup.mesh
        self._conversations, self._pad_id = conversations, loaded.pad_id
        config, dtype, mesh = loaded.config, DTYPES[self._config.dtype], setup.mesh
        places = None if mesh is None else named_shardings(mesh, score_axes(config))
        self.device_bytes = local_bytes(laid_out(score_shapes(config, dtype), places))
        self._params = loaded.params
        self._compiled = False
        self._score = {}
        for width in batch_lengths(self._config.max_len, length_multiple(setup.platform, self._config.max_len)):
            kernel = choose(
                setup.platform, dtype=dtype, head_dim=config.head_dim, length=width, softcap=config.attn_softcap
            )
            score = make_score(config, dtype=dtype, attention=kernel.name)
            self._score[width] = jax.jit(
                score, in_shardings=(None, *[setup.by_row] * 3), out_shardings=setup.everywhere
            )

    def __call__(self, pairs: Mapping[int, tuple[Example, str]], share: Share) -> tuple[np.ndarray, int]:
        """Scores f32[B] of all replies, on every host, and how many of this host's conversations were cut to
        reward.model.max_len tokens.

        pairs: example and reply of the rows that this host owns. All hosts must call this. UserError for a score that
        is not finite.
        """
        ids = [self._conversations(example.prompt, reply) for example, reply in pairs.values()]
        longest = self._config.max_len
        tokens: np.ndarray = np.zeros((len(ids), longest), np.int32)
        lengths: np.ndarray = np.zeros(len(ids), np.int32)
        ends: np.ndarray = np.zeros_like(lengths)
        for row, of_row in enumerate(ids):
            kept = of_row[:longest]
            tokens[row, : len(kept)], lengths[row], ends[row] = kept, len(kept), end_of(kept, self._pad_id)
        everything = hosts.gather((tokens, lengths, ends), share)
        return self._scores(*everything), sum(len(of_row) > longest for of_row in ids)

    def _scores(self, tokens: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> np.ndarray:
        rows = self._config.rows
        if not self._compiled:  # each shape once, by a batch of nothing: no later step compiles
            for width in self._score:
                self._run(*(np.zeros(shape, np.int32) for shape in ((rows, width), rows, rows)))
            self._compiled = True
        scores: np.ndarray = np.zeros(len(lengths), np.float32)
        parts = [
            (batch.rows, self._run(batch.tokens, batch.lengths, batch.ends))
            for batch in batches(tokens, lengths, ends, rows, tuple(self._score))
        ]
        for members, found in parts:
            scores[members] = jax.device_get(found)[: len(members)]
        if not np.isfinite(scores).all():
            raise UserError(f"the reward model {self._config.path} gives a score of {scores[~np.isfinite(scores)][0]}")
        return scores

    def _run(self, *arrays: np.ndarray) -> jax.Array:
        share = hosts.share_over(self._mesh, self._config.rows)
        held = arrays if jax.process_count() == 1 else tuple(x[share.held] for x in arrays)
        return self._score[arrays[0].shape[1]](self._params, *hosts.to_global(held, self._mesh, share))


def _conversations(setup: Setup, directory: Path, model: ModelConfig) -> Conversations:
    tokenizer, data = load_tokenizer(str(directory)), setup.config.data
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has a token {largest}, beyond the model's vocab_size of {model.vocab_size}"
        )
    try:
        return Conversations(tokenizer, template=data.template, date=data.date)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None


def _check_mesh(mesh: Mesh, model: ModelConfig, rows: int) -> None:
    """UserError unless rows and parameters divide over the mesh."""
    check_divisible(mesh, {f"{SECTION}.rows": rows}, {}, {})
    try:
        check_divisible(mesh, {}, score_shapes(model, np.float32), score_axes(model))
    except UserError as error:
        raise UserError(f"the reward model: {error}") from None

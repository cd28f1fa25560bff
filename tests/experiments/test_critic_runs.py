"""A critic with prompts of its own: where its tokens go, what it changes of a run, and that a run resumes with it."""

import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import packing
from dppo_jax.storage.run_log import read_scalars
from dppo_jax.types import TrainBatch
from experiments.run.critic import OwnPrompts, privileged
from experiments.run.samples import WORK, Replies, merged
from experiments.run.setup import Setup
from tests.helpers.fixtures import TINY, hurried, run, run_config, same, small_config, tiny

# Of a policy that stays as it is: what its updates would do follows from the critic's values.
BPCO = dict(
    advantage__name="gae", rollout__group_size=1, rollout__prompts=16, aggregation__name="seq_mean_token_sum",
    critic__bounds=(0.0, 1.0), critic__targets="monte_carlo", critic__lam_alpha=0.4, critic__whiten=False,
    critic__learning_rate=0.02, optimizer__learning_rate=0.0,
)  # fmt: skip
PRIVILEGED = dict(critic__privileged="answer", critic__template="{privileged}={prompt}", critic__max_prompt_len=11)


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run with all of it."""
    return run(run_config(folder, **BPCO, **PRIVILEGED), tmp_path_factory.mktemp("privileged") / "whole").folder


def test_a_critic_that_sees_the_answer_resumes_bit_for_bit(whole, folder, tmp_path):
    run(run_config(folder, **BPCO, **PRIVILEGED, steps=2), tmp_path / "cut")
    run(run_config(folder, **BPCO, **PRIVILEGED), tmp_path / "cut")
    same(whole, tmp_path / "cut")
    values = np.array(read_scalars(whole)["critic/value"][1])
    assert ((values > 0) & (values < 1)).all()


def test_what_the_critic_sees_changes_its_values_and_nothing_that_the_policy_does(whole, folder, tmp_path):
    plain_run = run(run_config(folder, **BPCO), tmp_path / "plain").folder
    plain, seen = ({tag: list(x[1]) for tag, x in read_scalars(path).items()} for path in (plain_run, whole))
    assert plain["critic/value"] != seen["critic/value"]
    parts = ("reward", "response", "policy", "mismatch", "ratio", "eval")
    compared = [tag for tag in plain if tag.split("/")[0] in parts]
    assert {"reward/mean", "policy/entropy", "mismatch/abs_prob_diff_mean"} <= {*compared}
    assert any(tag.startswith("eval/") for tag in compared)
    assert {tag: plain[tag] for tag in compared} == {tag: seen[tag] for tag in compared}


def drawn(config, lengths, prompts, critics) -> tuple[TrainBatch, Replies]:
    """A batch of these prompts, one to each group, and random responses; its replies."""
    group, width = config.rollout.group_size, config.data.max_prompt_len
    rows, draw = len(lengths), np.random.default_rng(0).integers
    prompt_lengths = np.repeat([len(prompt) for prompt in prompts], group)
    mask = np.arange(config.rollout.max_new_tokens) < lengths[:, None]
    batch = TrainBatch(
        prompt_tokens=jnp.asarray(draw(2, TINY.vocab_size, (rows, width)), jnp.int32),
        prompt_mask=jnp.asarray(np.arange(width) >= width - prompt_lengths[:, None]),
        tokens=jnp.asarray(draw(2, TINY.vocab_size, mask.shape), jnp.int32),
        mask=jnp.asarray(mask),
        behavior_logp=jnp.zeros(mask.shape),
        advantages=jnp.zeros(rows),
    )
    none: np.ndarray = np.zeros(0, np.float32)
    replies = Replies(
        np.array([len(prompt) for prompt in prompts]), lengths, np.zeros(rows, bool), {}, none, none, {}, {},
        critic_prompts=critics,
    )  # fmt: skip
    return batch, replies


@pytest.mark.parametrize("packed", [True, False])
def test_the_critic_packs_its_own_prompts_with_the_same_responses(packed, folder):
    """Also where the policy's plan leaves a response out, and where prompts have any length up to the bound."""
    config = small_config(folder, **BPCO | dict(rollout__prompts=4, rollout__group_size=2), **PRIVILEGED)
    config.train.pack = packed
    setup = Setup(config, TINY)
    assert privileged(config) is not None
    draw = np.random.default_rng(1).integers
    prompts = [draw(2, 9, size).tolist() for size in (3, 8, 5, 1)]
    critics = [draw(2, 9, size).tolist() for size in (11, 9, 10, 2)]
    lengths = np.array([6, 1, 4, 6, 2, 5, 3, 6])
    batch, replies = drawn(config, lengths, prompts, critics)
    own = OwnPrompts(setup)
    own.of(replies)
    kept = np.where(np.arange(8) == 3, 0, lengths)
    index = np.array([2, 3, 4, 5, 0, 1])
    of_policy = packing.plan(
        index, np.repeat(replies.prompt_lengths, 2), kept, setup.pack_shape, packed=config.train.pack
    )
    seen, plan = own.batch(batch), own.plan(of_policy)
    found = {}
    for number in range(int(plan.num_microbatches)):
        microbatch = packing.pack(seen, jnp.ones((len(index), 6)), packing.microbatch(plan, jnp.int32(number)))
        for tokens, segments in zip(np.asarray(microbatch.tokens), np.asarray(microbatch.segments), strict=True):
            for segment in set(segments[segments > 0].tolist()):
                found[int(index[segment - 1])] = tokens[segments == segment].tolist()
    responses = np.asarray(batch.tokens)
    assert found == {row: [*critics[row // 2], *responses[row, : lengths[row]].tolist()] for row in index if row != 3}


def test_a_group_that_was_drawn_anew_brings_its_critics_prompt():
    def of(first: int) -> Replies:
        groups, ones = np.arange(first, first + 3), np.ones(6, np.float32)
        rewards = np.array([0, 0, 0, 1, 1, 1], np.float32)
        return Replies(
            groups, np.full(6, 4), np.zeros(6, bool), {}, ones, rewards, {}, dict.fromkeys(WORK, 0.0),
            critic_prompts=[[int(group)] * int(group) for group in groups],
        )  # fmt: skip

    found = merged(of(1), of(7), np.array([3, 1, 5]), 2)
    assert found.critic_prompts == [[7] * 7, [2] * 2, [9] * 9]
    assert found.critic_prompt_lengths.tolist() == found.prompt_lengths.tolist() == [7, 2, 9]

"""The embedded model: small, loadable, and right about half the time."""


import jax
import numpy as np
import pytest

from assets.make_tiny import HELD_OUT_SEED, NEW_TOKENS, PROMPT_TOKENS, accuracy, answer, problems
from configs import quickstart
from dppo_jax.data.prompts import eos_ids, load_tokenizer
from dppo_jax.models.hf import load_params
from tests.helpers.places import ROOT

TINY = ROOT / "assets" / "tiny"


@pytest.fixture(scope="module")
def tiny():
    config, params = load_params(TINY)
    return config, jax.tree.map(np.asarray, params), load_tokenizer(str(TINY))


def test_the_directory_is_at_most_4_megabytes():
    assert sum(file.stat().st_size for file in TINY.rglob("*")) <= 4e6


def test_quickstart_asks_for_the_task_it_was_made_for(tiny):
    config, _, tokenizer = tiny
    c = quickstart.get_config()
    entries = problems(1, 500)
    longest = max(len(ids) for ids in tokenizer([entry["question"] for entry in entries])["input_ids"])
    assert longest <= c.data.max_prompt_len <= PROMPT_TOKENS
    assert c.rollout.max_new_tokens == NEW_TOKENS
    assert config.model_type == "qwen3"
    assert eos_ids(tokenizer, str(TINY)) == (tokenizer.eos_token_id,)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.slow
def test_half_right_when_sampled_and_nearly_always_when_greedy(tiny):
    config, params, tokenizer = tiny
    entries = problems(HELD_OUT_SEED, 256)
    right = {t: accuracy(answer(config, params, tokenizer, entries, temperature=t), entries) for t in (0.0, 1.0)}
    assert 0.4 < right[1.0] < 0.6
    assert right[0.0] > 0.95

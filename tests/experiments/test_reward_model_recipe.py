"""What `experiments.recipes.reward_model.make` refuses before it trains, and how it measures."""

import dataclasses

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from scipy.stats import mannwhitneyu

from dppo_jax.errors import UserError
from dppo_jax.models import save_hf
from dppo_jax.storage.results import SCHEMA
from experiments.recipes.reward_model.make import area_under_roc, make
from tests.helpers.fixtures import TINY, random_params, tiny, tokenizer

NAMES = ["question", "prompt", "reply", "reward"]


def rows(**changes) -> list[dict]:
    """32 questions with a right reply and a wrong one; every row with the changes."""
    return [
        {"question": n, "prompt": f"{n % 3}+0=", "reply": str(n % 3 + wrong), "reward": 1.0 - wrong} | changes
        for n in range(32)
        for wrong in (0, 1)
    ]


def written(path, table_rows, **types):
    fields = {name: types.get(name, SCHEMA.field(name).type) for name in NAMES if name in (table_rows or rows())[0]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table_rows, pyarrow.schema(fields)), path)
    return path


TEXT = pyarrow.string()
BAD = {
    "FILE has no column 'reply': name the results of": ([{"question": 0, "prompt": "", "reward": 1.0}], {}),
    "FILE: the column 'reward' holds string, and in an evaluation's": (rows(reward="1"), {"reward": TEXT}),
    "FILE: the column 'question' holds double, and": (rows(), {"question": pyarrow.float64()}),
    "FILE, row 1: 'reply' is missing": (rows(reply=None), {}),
    "FILE, row 1: 'reward' is no number": (rows(reward=float("nan")), {}),
    "FILE: the training questions need right replies and wrong ones": (rows(reward=1.0), {}),
    "FILE has a conversation of 65 tokens, more than the policy's 64 positions": (rows(prompt="1" * 63), {}),
    "FILE holds no rows": ([], {}),
}


@pytest.mark.parametrize(("sentence", "file"), BAD.items(), ids=BAD)
def test_replies_that_cannot_be_learned_from(sentence, file, tmp_path, tmp_path_factory):
    path = written(tmp_path / "replies.parquet", file[0], **file[1])
    with pytest.raises(UserError) as error:
        make(path, str(tiny(tmp_path_factory) / "model"), tmp_path / "out", epochs=1, batch=8, learning_rate=1e-3)
    assert str(error.value).startswith(sentence.replace("FILE", str(path))), error.value


def test_what_is_refused_before_anything_is_read(tmp_path, tmp_path_factory):
    other = tmp_path / "qwen2"
    model = dataclasses.replace(TINY, model_type="qwen2", qk_norm=False, qkv_bias=True)
    save_hf(other, model, random_params(0, model), tokenizer())
    numbers = dict(epochs=1, batch=8, learning_rate=1e-3)
    with pytest.raises(UserError, match="there are no reward models of qwen2, only of llama, qwen3, gemma2, mistral"):
        make(tmp_path / "none.parquet", str(other), tmp_path / "out", **numbers)
    policy, file = str(tiny(tmp_path_factory) / "model"), tmp_path / "file"
    with pytest.raises(UserError, match="--replies: there is no file .*none.parquet$"):
        make(tmp_path / "none.parquet", policy, tmp_path / "out", **numbers)
    file.write_text("no parquet")
    with pytest.raises(UserError, match=f"--out {file} is a file: name a folder"):
        make(tmp_path / "none.parquet", policy, file, **numbers)
    with pytest.raises(UserError, match=f"--replies: {file} cannot be read as parquet") as error:
        make(file, policy, tmp_path / "out", **numbers)
    assert "delete" not in str(error.value) and file.read_text() == "no parquet"


def test_the_area_is_that_of_mann_and_whitney():
    draw = np.random.default_rng(0)
    right = (draw.random(200) < 0.3).astype(np.float32)
    scores = np.round(draw.normal(size=200) + right, 1).astype(np.float32)  # with ties
    test = mannwhitneyu(scores[right == 1], scores[right == 0])
    assert area_under_roc(scores, right) == pytest.approx(test.statistic / (right.sum() * (1 - right).sum()))

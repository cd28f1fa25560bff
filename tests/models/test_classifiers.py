"""Reward models' directories: what cannot be used is one sentence."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dppo_jax.errors import UserError
from dppo_jax.models.hf import Classifier, load_classifier, load_config, save_classifier
from tests.helpers.places import GOLDEN

MODELS = GOLDEN / "reward_models"


def broken(tmp_path, fields, tensors):
    """A copy of the golden Llama with these fields of config.json and tensors; None takes one away."""
    shutil.copytree(MODELS / "llama", tmp_path, dirs_exist_ok=True)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole = json.loads(config.read_text()) | fields
    config.write_text(json.dumps({name: value for name, value in whole.items() if value is not None}))
    stored = load_file(weights) | tensors
    save_file({name: value for name, value in stored.items() if value is not None}, weights)
    return tmp_path


ROW = np.zeros((1, 32), np.float32)
TWO = {"0": "bad", "1": "good"}
BAD = {
    "tensor 'score.weight' is missing from HERE: a reward model has it in place": ({}, {"score.weight": None}),
    "HERE has 2 labels: a reward model has one, whose score is the reward": ({}, {"score.weight": np.zeros((2, 32))}),
    "HERE has 2 labels: ": ({"id2label": TWO}, {}),
    "HERE has 3 labels: ": ({"id2label": None, "num_labels": 3}, {}),
    "tensor 'score.weight' in HERE/model.safetensors has shape [1, 31]; config.json says [1, 32]": (
        {},
        {"score.weight": ROW[:, 1:]},
    ),
    "HERE has a head, 'lm_head.weight', beside its 'score.weight': leave one out": (
        {},
        {"lm_head.weight": np.zeros((64, 32), np.float32)},
    ),
    "unexpected tensor 'score.bias' in HERE/model.safetensors": ({}, {"score.bias": ROW[0]}),
    "tensor 'model.norm.weight' is missing from HERE": ({}, {"model.norm.weight": None}),
    "HERE/config.json: unsupported architecture 'LlamaForCausalLM'; supported: LlamaForSequenceClassification, Qwen3": (
        {"architectures": ["LlamaForCausalLM"]},
        {},
    ),
    "HERE/config.json: unsupported architecture 'BertForSequenceClassification'; supported: LlamaFor": (
        {"architectures": ["BertForSequenceClassification"], "model_type": "bert"},
        {},
    ),
    "HERE/config.json: pad_token_id must be a token's id or null, not '<pad>'": ({"pad_token_id": "<pad>"}, {}),
}


@pytest.mark.parametrize(("sentence", "changes"), BAD.items(), ids=BAD)
def test_directories_that_are_no_reward_models(sentence, changes, tmp_path):
    with pytest.raises(UserError) as error:
        load_classifier(broken(tmp_path, *changes))
    assert str(error.value).startswith(sentence.replace("HERE", str(tmp_path))) and "\n" not in str(error.value)


def test_a_directory_of_another_making_is_read(tmp_path):
    """Old ones say num_labels, or nothing, in place of id2label; the padding may be unknown."""
    loaded = load_classifier(broken(tmp_path, {"id2label": None, "label2id": None, "pad_token_id": None}, {}))
    assert loaded.pad_id is None and loaded.params["score"].shape == (32,) and "head" not in loaded.params["body"]


def test_a_reward_model_is_no_policy():
    with pytest.raises(UserError, match="unsupported architecture 'LlamaForSequenceClassification'; supported: L"):
        load_config(MODELS / "llama")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
def test_a_saved_one_is_what_transformers_saved(family, tmp_path):
    """Tensors to the bit, and all that config.json says of the shape."""
    classifier = load_classifier(MODELS / family)
    save_classifier(tmp_path, classifier)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path, MODELS / family))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    written, golden = (json.loads((path / "config.json").read_text()) for path in (tmp_path, MODELS / family))
    assert (written["architectures"], written["pad_token_id"]) == (golden["architectures"], golden["pad_token_id"])
    again = load_classifier(tmp_path)
    assert (again.config, again.pad_id) == (classifier.config, classifier.pad_id)


def test_there_are_no_reward_models_of_every_family(tmp_path):
    classifier = load_classifier(MODELS / "llama")
    other = dataclasses.replace(classifier.config, model_type="qwen2")
    with pytest.raises(UserError, match="there are no reward models of qwen2, only of llama, qwen3, gemma2, mistral"):
        save_classifier(tmp_path / "saved", Classifier(other, classifier.params, classifier.pad_id))
    assert not (tmp_path / "saved").exists()

"""What a model directory says besides its weights goes through a run: the export is the policy that was trained."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from dppo_jax.data.prompts import encode_prompt, eos_ids, load_tokenizer
from dppo_jax.models.hf import load_params, save_hf
from dppo_jax.storage.run_log import read_scalars
from experiments import eval
from experiments.run.load import load_text
from tests.helpers.fixtures import EOS, TINY, contents, hurried, run, run_config, tiny, tokenizer

GENERATION, TOKENIZERS = "generation_config.json", ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEMPLATES = {
    "default": "{% for m in messages %}a{{ m.content }}{% endfor %}",
    "tool_use": "{% for m in messages %}b{{ m.content }}{% endfor %}",
}


def edit(path: Path, **fields) -> None:
    """None removes a field."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({name: value for name, value in (before | fields).items() if value is not None}))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture
def base(tmp_path, tmp_path_factory) -> Path:
    """A copy of the tiny model, whose tokenizer ends with token 1."""
    return Path(shutil.copytree(tiny(tmp_path_factory) / "model", tmp_path / "base"))


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    """A run of a model with four tokens that end a response, one of them the tokenizer's, and two chat templates."""
    folder = tmp_path_factory.mktemp("several")
    shutil.copytree(tiny(tmp_path_factory), folder, dirs_exist_ok=True)
    text = tokenizer()
    text.chat_template = TEMPLATES
    text.add_special_tokens({"additional_special_tokens": ["?", "f"]})
    text.save_pretrained(folder / "model")
    edit(folder / "model" / "tokenizer_config.json", padding_side="left")
    edit(folder / "model" / "config.json", eos_token_id=[14, EOS], initializer_range=0.5, pad_token_id=13)
    (folder / "model" / GENERATION).write_text('{"eos_token_id": [15, 0],\r\n "temperature": 0.7, "do_sample": true}')
    with hurried(tmp_path_factory):
        config = run_config(folder, steps=2, rollout__max_new_tokens=16)
        yield folder / "model", run(config, tmp_path_factory.mktemp("run") / "run")


@pytest.mark.slow
def test_evaluation_of_a_run_is_that_of_its_export(other_run):
    """With the tokenizer's token alone, responses are longer."""
    model, done = other_run
    of_run = eval.evaluate(done.config, done.folder)
    export = done.folder / "policy"
    assert eval.evaluate(done.config, export) == of_run
    assert load_text(export, TINY).eos_ids == load_text(model, TINY).eos_ids == (0, 1, 14, 15)
    assert read_scalars(done.folder)["response/length_mean"][1].max() < 8


def test_an_export_names_every_token_that_ended_a_response(other_run):
    """Whatever reads it, one file or the other; the rest of generation_config.json is as it was."""
    model, done = other_run
    export = done.folder / "policy"
    config, generation = AutoConfig.from_pretrained(export), GenerationConfig.from_pretrained(export)
    assert set(config.eos_token_id) == set(generation.eos_token_id) == {0, 1, 14, 15}
    assert generation.temperature == 0.7 and generation.do_sample
    before, after = read(model / GENERATION), read(export / GENERATION)
    assert after | {"eos_token_id": None} == before | {"eos_token_id": None}
    fields = read(export / "config.json")
    assert (fields["initializer_range"], fields["pad_token_id"], fields["torch_dtype"]) == (0.5, 13, "float32")


def test_an_export_has_the_tokenizer_as_it_was(other_run):
    model, done = other_run
    before, after = (AutoTokenizer.from_pretrained(path) for path in (model, done.folder / "policy"))
    assert after.chat_template == TEMPLATES and after.padding_side == "left"
    assert after.added_tokens_encoder == before.added_tokens_encoder and "f" in after.all_special_tokens
    question = [{"role": "user", "content": "1+2=?"}]
    assert encode_prompt(after, question, chat=True) == encode_prompt(before, question, chat=True)
    for name in TOKENIZERS:
        assert (done.folder / "policy" / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize(
    "text", ['{"eos_token_id": [0, 1, 15], "top_p": 0.9}', '{"eos_token_id": [15, 0],\r\n  "b": 1}']
)
def test_a_generation_config_that_names_all_is_copied_to_the_byte(base, tmp_path, text):
    (base / GENERATION).write_bytes(text.encode())
    ends = eos_ids(load_tokenizer(base), base)
    save_hf(
        tmp_path / "out",
        *load_params(base),
        load_tokenizer(base),
        eos_ids=[e for e in ends if e in (0, 15)],
        source=base,
    )
    assert (tmp_path / "out" / GENERATION).read_bytes() == text.encode()


# Tokens that end a response: in config.json, in generation_config.json (None: no such file), and in the export's two.
CASES = {
    "neither": (None, None, 1, 1),
    "no file": ([1, 15], None, [1, 15], [1, 15]),
    "a file that names none": (1, {"top_k": 5}, 1, 1),
    "another than the tokenizer's": (None, {"eos_token_id": 15}, [1, 15], [15, 1]),
    "null": (None, {"eos_token_id": None, "top_k": 5}, 1, 1),
    "all": (7, {"eos_token_id": [0, 15, 7, 1]}, [0, 1, 7, 15], [0, 15, 7, 1]),
}


@pytest.mark.parametrize("name", CASES)
def test_every_eos_id_survives(base, tmp_path, name):
    config, generation, in_config, in_generation = CASES[name]
    (base / GENERATION).unlink(missing_ok=True)
    edit(base / "config.json", eos_token_id=config)
    if generation is not None:
        (base / GENERATION).write_text(json.dumps(generation))
    text = load_text(base, TINY)
    for _ in range(2):  # over an older export as well
        save_hf(tmp_path / "out", *load_params(base), text.tokenizer, eos_ids=text.eos_ids, source=base)
        assert read(tmp_path / "out" / "config.json")["eos_token_id"] == in_config
        after = read(tmp_path / "out" / GENERATION)
        assert after["eos_token_id"] == in_generation
        for key, value in (generation or {}).items():
            assert key == "eos_token_id" or after[key] == value
        assert load_text(tmp_path / "out", TINY).eos_ids == text.eos_ids


def test_what_another_model_left_behind_is_gone(base, tmp_path):
    """Its generation_config.json, which would end responses elsewhere, its chat templates, its vocabulary."""
    out = tmp_path / "out"
    shutil.copytree(base, out)
    edit(out / GENERATION, eos_token_id=[3, 4], temperature=0.1)
    edit(out / "added_tokens.json", zz=15)
    (out / "chat_template.jinja").write_text("other")
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "rag.jinja").write_text("other")
    (out / "notes.md").write_text("mine")
    for name in (GENERATION, "chat_template.jinja"):
        (base / name).unlink(missing_ok=True)
    config, params = load_params(base)
    save_hf(out, config, params, load_tokenizer(base), eos_ids=(1, 15), source=base)
    assert eos_ids(load_tokenizer(out), out) == (1, 15)
    assert load_tokenizer(out).chat_template is None
    assert (out / "notes.md").read_text() == "mine"
    assert not (out / "added_tokens.json").exists()
    save_hf(out, config, params)  # of whose tokens nothing is known
    assert not (out / GENERATION).exists() and read(out / "config.json")["eos_token_id"] is None
    assert (out / "tokenizer.json").exists()


def test_a_model_written_over_its_own_source(base):
    (base / GENERATION).write_text('{"eos_token_id": [0, 15]}')
    before, ends = contents(base), load_text(base, TINY).eos_ids
    config, params = load_params(base)
    changed = jax.tree.map(lambda p: p + np.float32(1), params)
    save_hf(base, config, changed, load_tokenizer(base), eos_ids=ends, source=base)
    assert load_text(base, TINY).eos_ids == ends == (0, 1, 15)
    jax.tree.map(np.testing.assert_array_equal, load_params(base)[1], changed)
    assert contents(base).keys() == before.keys()


def test_a_kill_leaves_one_model_or_none(base, tmp_path, monkeypatch):
    """Stopped before each change to the directory: never one model's weights with another's files."""
    changes: list[str] = []

    class Killed(BaseException):
        pass

    def counted(function):
        def call(path, *more, **options):
            if str(path).startswith(str(out)):
                changes.append(str(path))
                if len(changes) > allowed:
                    raise Killed
            return function(path, *more, **options)

        return call

    other, out = tmp_path / "other", tmp_path / "out"
    shutil.copytree(base, other)
    config, params = load_params(base)
    changed = jax.tree.map(lambda p: p + np.float32(1), params)
    save_hf(other, config, changed)
    (base / GENERATION).write_text('{"eos_token_id": [0, 15], "top_k": 3}')
    (other / GENERATION).write_text('{"eos_token_id": [7], "top_k": 4}')
    edit(other / "config.json", eos_token_id=1)
    (other / "chat_template.jinja").write_text("other")
    right = {}
    for name, source, weights in (("base", base, params), ("other", other, changed)):
        text = load_text(source, TINY)
        save_hf(tmp_path / name, config, weights, text.tokenizer, eos_ids=text.eos_ids, source=source)
        right[name] = contents(tmp_path / name)
    assert right["base"] != right["other"]
    outcomes = set()
    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    for allowed in range(40):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(other, out)
        shutil.copytree(tmp_path / "other", out, dirs_exist_ok=True)
        changes.clear()
        text = load_text(base, TINY)
        try:
            save_hf(out, config, params, text.tokenizer, eos_ids=text.eos_ids, source=base)
        except Killed:
            pass
        found = {name: data for name, data in contents(out).items() if not name.startswith(".saving")}
        if "config.json" in found:
            outcomes.add(next((name for name, files in right.items() if files == found), "a mixture"))
        if len(changes) <= allowed:
            break
    assert outcomes == {"other", "base"} and allowed > 5

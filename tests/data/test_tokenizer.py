"""Tokenizers of model directories, and the tokens that end a response: read as they are meant, or refused."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dppo_jax.data.tokenizer import eos_ids, load_tokenizer, token_bytes
from dppo_jax.errors import UserError
from experiments.chaos.inputs.damage import BROKEN
from experiments.chaos.inputs.model_files import BAD_EOS
from tests.helpers.places import ROOT

TINY = ROOT / "assets" / "tiny"  # byte-level, each digit a token; the end is token 0 of 320
SENTENCES = ["12 + 345 = ?", "what's 2023,\n\n and THE  rest?", " naïve 東京\t7", "<|endoftext|>1 2"]


@pytest.fixture
def directory(tmp_path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


def put(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("declared", ["Qwen2Tokenizer", "GPT2TokenizerFast", "LlamaTokenizerFast", "NoSuch", None])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_text_is_split_as_tokenizer_json_says_whatever_class_is_declared(directory, family, declared):
    """Classes of transformers 5 take the vocabulary alone from it; the tokenizers library reads the file itself."""
    put(directory / "config.json", model_type=family, architectures=None)
    put(directory / "tokenizer_config.json", tokenizer_class=declared)
    right = Tokenizer.from_file(str(directory / "tokenizer.json"))
    found = load_tokenizer(directory)
    for text in SENTENCES:
        assert found(text)["input_ids"] == right.encode(text).ids
    assert found.eos_token_id == 0 and found.pad_token_id == 1


def test_a_class_that_splits_text_otherwise_is_told(directory, capsys):
    put(directory / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    theirs = AutoTokenizer.from_pretrained(directory)
    capsys.readouterr()
    assert theirs(SENTENCES[0])["input_ids"] != load_tokenizer(directory)(SENTENCES[0])["input_ids"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Qwen2Tokenizer splits text otherwise than" in said


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("bad", BAD_EOS, ids=repr)
def test_an_end_of_sequence_that_is_no_token(directory, file, bad):
    tokenizer = load_tokenizer(directory)
    put(directory / file, eos_token_id=bad)
    said = refusal(eos_ids, tokenizer, directory)
    assert said.startswith(f"{directory / file}: eos_token_id: ")
    inner = bad if not isinstance(bad, list) else next(x for x in bad if type(x) is not int or not 0 <= x < 320)
    assert repr(inner) in said
    assert refusal(load_tokenizer, directory) == said


def test_an_end_of_sequence_beyond_the_vocabulary(directory):
    tokenizer = load_tokenizer(directory)
    put(directory / "generation_config.json", eos_token_id=[319, 320])
    assert refusal(eos_ids, tokenizer, directory).endswith("eos_token_id: there is no token 320; ids go from 0 to 319")
    put(directory / "generation_config.json", eos_token_id=[319, 5])
    assert eos_ids(tokenizer, directory) == (0, 5, 319)
    assert eos_ids(tokenizer, str(directory), ["<|pad|>", 7]) == (0, 1, 5, 7, 319)
    for bad in (True, 1.0, None, -1, 320, 2**70, 10**5000):
        assert refusal(eos_ids, tokenizer, directory, [bad]).startswith("end-of-sequence tokens: ")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("name", [name for name, text in BROKEN.items() if text is not None])
def test_a_json_file_that_is_none(directory, file, name):
    tokenizer, text = load_tokenizer(directory), BROKEN[name]
    (directory / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refusal(eos_ids, tokenizer, directory).startswith(str(directory / file))


def test_a_vocabulary_of_sentencepiece_alone(directory):
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    said = refusal(load_tokenizer, directory)
    assert said == (
        f"tokenizer: '{directory}' holds tokenizer.model, a file of sentencepiece, but no tokenizer.json, which is "
        "what is read; where sentencepiece is installed, transformers writes one: "
        f"AutoTokenizer.from_pretrained('{directory}').save_pretrained('{directory}')"
    )
    (directory / "tokenizer_config.json").unlink()
    assert refusal(load_tokenizer, directory) == said


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"eos_token": "<nowhere>"}, "lacks its eos_token '<nowhere>'"),
        ({"eos_token": 7}, "eos_token must be a token's text, or an object with it as content, not 7"),
        ({"chat_template": 7}, "chat_template must be text, or several by name, not 7"),
        ({"chat_template": {"default": 7}}, "must be text, not 7"),
        ({"tokenizer_class": 7}, "tokenizer_class must be text, not 7"),
        ({"model_max_length": "long"}, "model_max_length must be a number, not 'long'"),
        ({"added_tokens_decoder": {"999": {"content": "zz"}}}, "gives 'zz' the id 999, but with tokenizer.json"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder must be an object of tokens by id, not [1]"),
    ],
)
def test_settings_that_cannot_be(directory, fields, words):
    put(directory / "tokenizer_config.json", **fields)
    said = refusal(load_tokenizer, directory)
    assert words in said and str(directory) in said


def test_a_special_token_that_the_vocabulary_lacks(directory):
    file = json.loads((directory / "tokenizer.json").read_text())
    file["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<b>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<b>": {"id": "<b>", "ids": [9999], "tokens": ["<b>"]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(file))
    assert refusal(load_tokenizer, directory).endswith("adds the token 9999, which its vocabulary lacks")


@pytest.mark.parametrize("declared", ["Qwen2Tokenizer", None, "LlamaTokenizer", "PreTrainedTokenizerFast", "NoSuch"])
def test_a_vocabulary_in_vocab_json(directory, declared):
    """Read by the classes that read it; no class makes a tokenizer of a few tokens without a word."""
    file = json.loads((directory / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in file["added_tokens"]}
    (directory / "vocab.json").write_text(json.dumps(vocabulary := file["model"]["vocab"] | added))
    (directory / "merges.txt").write_text("".join(" ".join(pair) + "\n" for pair in file["model"]["merges"]))
    (directory / "tokenizer.json").unlink()
    put(directory / "tokenizer_config.json", tokenizer_class=declared)
    if declared in ("Qwen2Tokenizer", None):
        assert load_tokenizer(directory).get_vocab() == vocabulary
    else:
        said = refusal(load_tokenizer, directory)
        assert "vocab.json" in said and "tokenizer.json" in said and "tiktoken" not in said


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma2"])
def test_no_code_of_a_directory_is_run(directory, family):
    put(directory / "config.json", model_type=family, architectures=None)
    put(directory / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    (directory / "own.py").write_text(f"open({str(directory / 'run')!r}, 'w').close()\n")
    assert load_tokenizer(directory).eos_token_id == 0
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text('{"a": 0}')
    refusal(load_tokenizer, directory)
    assert not (directory / "run").exists()


def test_paths_that_are_none(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_tokenizer("~/tiny").eos_token_id == 0
    assert "hdfs:// addresses" in refusal(load_tokenizer, "hdfs://node/model")
    (directory / "tokenizer.json").unlink()
    os.mkfifo(directory / "tokenizer.json")  # opened, it would wait for ever
    assert refusal(load_tokenizer, directory).endswith("tokenizer.json is neither a file nor a link to one")


# --- the bytes of tokens ---

LINES = [*SENTENCES, "  two spaces", "\t\ttabs\n\n", "café crème", "\U0001f600\U0001f601 faces", "x = [1, 2];  # €"]
LLAMA = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
GEMMA = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer trained on a few lines."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "two words", "\u0120odd"]
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
        backend.train_from_iterator(LINES, trainer)
    elif kind in ("llama", "gemma"):
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        backend.decoder = LLAMA if kind == "llama" else GEMMA
        all_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *all_bytes], limit_alphabet=60)
        backend.train_from_iterator(LINES, trainer)
    elif kind == "metaspace":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
        backend.train_from_iterator(LINES, trainer)
    else:
        backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.train_from_iterator(LINES, trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


PLACES = {"tiny": TINY, "reuse": ROOT / "assets" / "reuse", "smollm2": ROOT / "models" / "SmolLM2-135M-Instruct"}


@pytest.mark.parametrize("name", [*PLACES, "byte-level", "llama", "gemma", "metaspace", "words"])
def test_the_bytes_of_tokens_are_what_decode_writes(name):
    """Of every token alone and behind another one, of random tokens, and of texts. Tokens of single bytes of
    SentencePiece are left to texts: decode writes none of a row that is no UTF-8."""
    if name in PLACES and not PLACES[name].is_dir():
        pytest.skip("make smollm2 fetches it")
    tokenizer = load_tokenizer(PLACES[name]) if name in PLACES else trained(name)
    later, first = token_bytes(tokenizer), token_bytes(tokenizer, first=True)
    vocabulary, draw = tokenizer.get_vocab(), random.Random(0)
    assert len(later) == len(first) == max(vocabulary.values()) + 1
    single = {i for token, i in vocabulary.items() if token.startswith("<0x") and name in ("llama", "gemma")}
    ids = sorted(set(vocabulary.values()) - single)
    rows = [[i] for i in ids] + [[draw.choice(ids), i] for i in ids]
    rows += [draw.choices(ids, k=draw.randint(3, 12)) for _ in range(500)]
    lines = [*LINES, "\u2603 <|im_start|>\u0bf5"] if name != "reuse" else []  # whose words are numbers
    rows += [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    for row in rows:
        spelled = first[row[0]] + b"".join(later[i] for i in row[1:])
        text = tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert spelled.decode(errors="replace") == text, row
    assert bool(single & {i for row in rows for i in row}) == (name in ("llama", "gemma"))


def test_an_id_without_a_token_adds_nothing(tmp_path):
    shutil.copytree(TINY, tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.decode([5, 10**6, 6]) == (token_bytes(tokenizer)[5] + token_bytes(tokenizer)[6]).decode()


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.CTC(), decoders.BPEDecoder()])
def test_a_tokenizer_that_decodes_in_a_way_of_its_own(decoder):
    tokenizer = trained("byte-level")
    tokenizer.backend_tokenizer.decoder = decoder
    assert refusal(token_bytes, tokenizer).startswith(f"the tokenizer decodes by {type(decoder).__name__}, of which")

"""Prompt batches with a small real tokenizer, built here: one token a character."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dppo_jax.data.examples import Example
from dppo_jax.data.prompts import PromptStream, decode_replies, encode_prompt, eos_ids, load_tokenizer
from dppo_jax.data.tasks import load_task
from dppo_jax.errors import UserError
from dppo_jax.rewards.answers import answer_task
from dppo_jax.types import PromptBatch

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|reply|>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|reply|>{% endif %}"
)
PAD, BOS, EOS, USER, REPLY = range(5)


def write_tokenizer(directory, *, post="<s> $A", chat=CHAT, **special):
    letters = [chr(i) for i in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(SPECIAL + letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(SPECIAL)
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=chat,
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **special},
    )
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))


def sums(n):
    return answer_task("sums", [Example(f"{i}+{i}=", str(2 * i)) for i in range(n)], "last_number")


def stream(tokenizer, task, **kwargs):
    return PromptStream(task, tokenizer, **{"num_prompts": 4, "max_prompt_len": 12, "seed": 3, **kwargs})


def test_a_batch_is_padded_on_the_left(tokenizer):
    batch, examples = stream(tokenizer, sums(11)).batch(0)
    assert isinstance(batch, PromptBatch)
    assert batch.tokens.shape == batch.mask.shape == (4, 12)
    assert (batch.tokens.dtype, batch.mask.dtype, batch.group.dtype) == (np.int32, np.bool_, np.int32)
    assert batch.group.tolist() == [0, 1, 2, 3]
    for tokens, mask, example in zip(batch.tokens, batch.mask, examples, strict=True):
        length = 1 + len(example.prompt)
        assert mask.tolist() == [False] * (12 - length) + [True] * length
        assert tokenizer.decode(tokens[mask]) == "<s>" + example.prompt


def test_padding_that_is_the_end_of_sequence_token(tmp_path):
    """pad = eos is common; a prompt that holds the token keeps it, because only the mask says what is padding."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", pad_token="</s>"))
    task = answer_task("t", [Example("a</s>b", "1")], "last_number")
    batch, _ = stream(tokenizer, task, num_prompts=1).batch(0)
    assert batch.tokens[0, batch.mask[0]].tolist()[:3:2] == [BOS, EOS]
    assert batch.mask.sum() == 4


def test_a_step_depends_on_seed_and_step_alone(tokenizer):
    a, b = stream(tokenizer, sums(11)), stream(tokenizer, sums(11))
    later = b.batch(7)[1]  # asked for first
    assert [a.batch(step)[1] for step in range(8)][7] == later
    jax.tree.map(np.testing.assert_array_equal, a.batch(5)[0], b.batch(5)[0])
    other = stream(tokenizer, sums(11), seed=4)
    assert [a.batch(i)[1] for i in range(3)] != [other.batch(i)[1] for i in range(3)]


def test_every_epoch_is_another_permutation(tokenizer):
    prompts = stream(tokenizer, sums(10))  # batches of 4 span epochs of 10
    seen = [example.answer for step in range(5) for example in prompts.batch(step)[1]]
    first, second = seen[:10], seen[10:]
    assert sorted(first, key=int) == sorted(second, key=int) == [str(2 * i) for i in range(10)]
    assert first != second


def test_a_host_asks_for_its_own_rows(tokenizer):
    prompts, rows = stream(tokenizer, sums(10)), [1, 3]
    whole, examples = prompts.batch(2)
    part, own = prompts.batch(2, rows)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[rows], y), whole, part)
    assert own == [examples[row] for row in rows]
    assert prompts.lengths(2).tolist() == whole.mask.sum(axis=1).tolist()
    shares = [list(prompts.eval_batches(4, half)) for half in ([0, 2], [1, 3])]
    assert [[len(examples) for _, examples in batches] for batches in shares] == [[2, 2, 1], [2, 2, 1]]


def test_evaluation_in_fixed_order(tokenizer):
    prompts = stream(tokenizer, sums(10))
    batches = list(prompts.eval_batches(4))
    assert [len(examples) for _, examples in batches] == [4, 4, 2]
    assert [batch.tokens.shape for batch, _ in batches] == [(4, 12)] * 3
    assert [e.answer for _, examples in batches for e in examples] == [str(2 * i) for i in range(10)]
    last = batches[-1][0]
    assert (last.tokens[2] == last.tokens[0]).all() and last.mask.any(axis=1).all()


def test_a_prompt_over_the_limit(tokenizer):
    task = answer_task("sums", [Example("1+1=", "2"), Example("100+100=", "200")], "last_number")
    assert len(stream(tokenizer, task, max_prompt_len=9)) == 2
    with pytest.raises(UserError) as error:
        stream(tokenizer, task, max_prompt_len=8)
    assert "sums: prompt 2 of 2 ('100+100=') has 9 tokens, more than data.max_prompt_len=8" in str(error.value)
    shorter = stream(tokenizer, task, max_prompt_len=8, too_long="skip")
    assert (len(shorter), shorter.skipped) == (1, 1)
    with pytest.raises(UserError, match="no prompt fits into data.max_prompt_len=4"):
        stream(tokenizer, task, max_prompt_len=4, too_long="skip")


def test_what_is_left_out_is_told(tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1+1=", "answer": 2}\n\n{"prompt": "100+100=", "answer": 200}\n' * 2)
    task = load_task("jsonl", path=str(file), verifier="last_number")
    assert stream(tokenizer, task).left_out == "rows.jsonl: 4 examples; left out: 2 blank lines"
    task = load_task("jsonl", path=str(file), verifier="last_number", size=3)
    found = stream(tokenizer, task, max_prompt_len=8, too_long="skip")
    assert found.counts == {
        "examples": 2, "blank": 2, "beyond_size": 1, "bad_label": 0, "skipped": 1, "duplicates": 1
    }  # fmt: skip
    assert found.left_out == (
        "rows.jsonl: 2 examples; left out: 2 blank lines, 1 rows beyond data.size, "
        "1 prompts of more than data.max_prompt_len tokens"
    )
    assert stream(tokenizer, sums(3)).left_out is None
    with pytest.raises(UserError, match=r"rows.jsonl, row 3 \('100\+100='\) has 9 tokens, more than"):
        stream(tokenizer, task, max_prompt_len=8)


def test_a_prompt_that_the_tokens_do_not_hold(tokenizer, tmp_path):
    """This tokenizer drops what it has no token for; others write <unk>."""
    cases = {"1+1=\u00e9": "'\u00e9'", "two\nlines": r"'\\n'", "\u4e00 1": "'\u4e00'", "a\x00": r"'\\x00'"}
    for prompt, lost in cases.items():
        task = answer_task("t", [Example(prompt, "1")], "last_number")
        with pytest.raises(UserError, match=f"t: prompt 1 of 1: the tokenizer has no token for {lost}, so the policy"):
            stream(tokenizer, task)
    folder = tmp_path / "words"
    folder.mkdir()
    backend = Tokenizer(models.WordLevel(vocab={"<unk>": 0, "1": 1, "+": 2, "</s>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert encode_prompt(words, "1+1 </s>\n+", chat=False) == [1, 2, 1, 3, 2]
    with pytest.raises(UserError, match="has no token for '2', so the policy"):
        encode_prompt(words, "1+2", chat=False)


def test_a_normalizer_may_change_a_prompt(tokenizer):
    """What it does is the tokenizer's meaning, not a loss: so do those of Gemma, T5 and Llama 2."""
    vocabulary = {token: i for i, token in enumerate(["</s>", "\u2581", *"abcdefgh1+", "\u2581a"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u2581", "a")]))
    backend.add_special_tokens(["</s>"])
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    llama = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    ids = encode_prompt(llama, "A B \uff11+1", chat=False)
    assert llama.decode(ids) == "a b 1+1"
    with pytest.raises(UserError, match="has no token for 'x'"):
        encode_prompt(llama, "a x", chat=False)


def test_odd_templates_and_prompts(tokenizer):
    with pytest.raises(UserError, match="data.template: a lone surrogate"):
        encode_prompt(tokenizer, "a", chat=False, template="{prompt}\ud800")
    with pytest.raises(UserError, match="data.template must hold '{prompt}', but is") as error:
        encode_prompt(tokenizer, "a", chat=False, template="x" * 10**6)
    assert len(str(error.value)) < 300
    with pytest.raises(UserError, match="the tokenizer cannot encode the prompt: "):
        encode_prompt(tokenizer, "\ud800", chat=False)
    assert encode_prompt(tokenizer, "{prompt}", chat=False, template="{prompt}{prompt}") == encode_prompt(
        tokenizer, "{prompt}{prompt}", chat=False
    )


def test_the_chat_template_is_tokenized_once(tokenizer):
    """Its text begins with <s>, which the tokenizer would add again."""
    ids = encode_prompt(tokenizer, "hi", chat=True, template="{prompt}!")
    assert ids == [BOS, USER, *tokenizer.convert_tokens_to_ids(["h", "i", "!"]), REPLY]
    messages = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    )
    ids = encode_prompt(tokenizer, messages, chat=True, template="<{prompt}>")
    assert tokenizer.decode(ids) == "<s><|user|>a<|user|>b<|user|><c><|reply|>"
    assert messages[2]["content"] == "c"


def test_plain_prompts(tokenizer, tmp_path):
    ids = encode_prompt(tokenizer, "{x}", chat=False, template="Q: {prompt} {A}")
    assert tokenizer.decode(ids) == "<s>Q: {x} {A}"
    closing = load_tokenizer(write_tokenizer(tmp_path / "closing", post="<s> $A </s>"))
    assert encode_prompt(closing, "hi", chat=False) == encode_prompt(tokenizer, "hi", chat=False)
    assert encode_prompt(closing, "hi</s>", chat=False)[-1] == EOS  # written by the prompt's author: it stays


def test_prompts_that_cannot_be_encoded(tokenizer, tmp_path):
    with pytest.raises(UserError, match="data.template must hold '{prompt}', but is 'Solve.'"):
        encode_prompt(tokenizer, "a", chat=False, template="Solve.")
    with pytest.raises(UserError, match="set data.chat=True"):
        encode_prompt(tokenizer, ({"role": "user", "content": "a"},), chat=False)
    with pytest.raises(UserError, match="chat template refuses the messages: no system role"):
        encode_prompt(tokenizer, ({"role": "system", "content": "a"},), chat=True)
    bare = load_tokenizer(write_tokenizer(tmp_path / "bare", post="$A", chat=None))
    with pytest.raises(UserError, match="has no chat template; set data.chat=False"):
        encode_prompt(bare, "a", chat=True)
    with pytest.raises(UserError, match="t: prompt 1 of 1: the prompt has no tokens"):
        stream(bare, answer_task("t", [Example("", "1")], "last_number"))
    for bad in ({"num_prompts": 0}, {"max_prompt_len": 0}, {"too_long": "crop"}):
        with pytest.raises(UserError, match="must be"):
            stream(tokenizer, sums(3), **bad)


def test_decode_drops_the_end_of_sequence_and_nothing_else(tokenizer):
    a, b = tokenizer.convert_tokens_to_ids(["a", " "])
    rows = [
        ([a, b, EOS, a], [1, 1, 1, 0], "a "),
        ([a, b, a, b], [1, 1, 1, 1], "a a "),  # truncated: nothing to drop
        ([a, PAD, USER, EOS], [1, 1, 1, 1], "a<pad><|user|>"),  # a sampled pad token is part of the reply
        ([a, REPLY, PAD, PAD], [1, 1, 0, 0], "a"),  # another token that ends a response
        ([EOS, PAD, PAD, PAD], [1, 0, 0, 0], ""),
        ([PAD, PAD, PAD, PAD], [0, 0, 0, 0], ""),
    ]
    tokens = np.array([row[0] for row in rows], np.int32)
    mask = np.array([row[1] for row in rows], bool)
    assert decode_replies(tokenizer, tokens, mask, (EOS, REPLY)) == [row[2] for row in rows]
    assert decode_replies(tokenizer, jax.numpy.asarray(tokens[:1]), jax.numpy.asarray(mask[:1]), (EOS,)) == ["a "]


def test_eos_ids_from_every_source(tokenizer, tmp_path):
    assert eos_ids(tokenizer) == (EOS,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, EOS]}))
    assert eos_ids(tokenizer, str(tmp_path)) == (EOS, 7, 9)
    assert eos_ids(tokenizer, str(tmp_path), [4, "<|user|>"]) == (EOS, USER, 4, 7, 9)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    assert eos_ids(tokenizer, str(tmp_path)) == (EOS, 7)
    with pytest.raises(UserError, match=r"token '<\|end\|>' is not in the tokenizer's vocabulary"):
        eos_ids(tokenizer, None, ["<|end|>"])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: broken JSON"):
        eos_ids(tokenizer, str(tmp_path))
    endless = load_tokenizer(write_tokenizer(tmp_path / "endless", eos_token=None))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        eos_ids(endless)


def test_load_tokenizer_errors(tmp_path):
    with pytest.raises(UserError, match="there is no directory '.*none'"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(UserError, match="holds none of tokenizer.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read: ") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["0+1=", "a", "{{ messages|length }}"])
def test_a_chat_template_that_leaves_the_messages_out(tokenizer, template):
    """Every prompt would be the same, without its question."""
    tokenizer.chat_template = template
    task = answer_task("sums", [Example("1+1=", "2"), Example("0+1=", "1")], "last_number")
    with pytest.raises(UserError, match="all 2 prompts have the same tokens: the tokenizer's chat template leaves"):
        PromptStream(task, tokenizer, num_prompts=1, max_prompt_len=64, seed=0, chat=True)

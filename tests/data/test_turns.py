"""What follows a turn of the policy: the chat template's own, and nothing twice."""

import numpy as np
import pytest

from dppo_jax.data.prompts import load_tokenizer
from dppo_jax.data.turns import TurnEncoder, turns_of
from dppo_jax.errors import UserError
from tests.data.test_prompts import BOS, CHAT, EOS, PAD, REPLY, USER, write_tokenizer

# Of the form of ChatML: a turn ends with </s> and a new line.
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|reply|>{{ m.content | trim }}</s>\n"
    "{% elif m.role == 'user' %}<|user|>{{ m.content | trim }}\n{% else %}<|user|>tool:{{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|reply|>{% endif %}"
)


def tokenizer(path, chat=TURNS):
    return load_tokenizer(write_tokenizer(path / "tokenizer", chat=chat))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_template_ends_the_turn_and_opens_the_next(tmp_path):
    one = tokenizer(tmp_path)
    letter = ids(one, "a")[0]
    with TurnEncoder(one, chat=True, eos_ids=(EOS, PAD)) as encode:
        assert encode.has_tools
        follows = [USER, *ids(one, "hint"), *ids(one, "\n"), REPLY]
        after_end = [*ids(one, "\n"), *follows]
        assert encode(" hint ", after=EOS) == after_end  # the end that was drawn is not written again
        assert encode(" hint ", after=letter) == [EOS, *after_end]  # a turn that was cut is ended
        assert encode(" hint ", after=PAD) == [EOS, *after_end]  # another end than the template's
        assert encode("7", "tool", after=EOS) == ids(one, "\n<|user|>tool:7\n<|reply|>")
        messages = [("user", "q"), ("assistant", "a"), ("user", "hint")]
        messages = [{"role": role, "content": content} for role, content in messages]
        whole = ids(one, one.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        assert [BOS, USER, *ids(one, "q\n"), REPLY, letter, EOS, *encode("hint", after=EOS)] == whole


def test_without_a_template_the_text_is_as_it_is(tmp_path):
    one = tokenizer(tmp_path)
    with TurnEncoder(one, chat=False, eos_ids=(EOS,)) as encode:
        assert encode(" ok\n", after=EOS) == ids(one, " ok\n") and encode("", after=EOS) == []
        with pytest.raises(UserError, match="no token for 'é'"):
            encode("é", after=EOS)


REFUSED = {
    "leaves out the assistant's turn": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "leaves out what follows a turn": "{% for m in messages[:2] %}{{ m.content }}{% endfor %}",
    "refuses the messages: one turn": "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}a",
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_template_for_one_turn_is_refused(tmp_path, said):
    with pytest.raises(UserError, match=said):
        TurnEncoder(tokenizer(tmp_path, REFUSED[said]), chat=True, eos_ids=(EOS,))


def test_a_template_without_tools_makes_them_the_users_turn(tmp_path):
    refuses = CHAT.replace("m.role == 'system'", "m.role == 'tool'")
    with TurnEncoder(tokenizer(tmp_path, refuses), chat=True, eos_ids=(EOS,)) as encode:
        assert not encode.has_tools and encode("7", "tool", after=EOS) == encode("7", after=EOS)


def test_turns_are_cut_out_of_a_row_by_their_numbers(tmp_path):
    one = tokenizer(tmp_path)
    tokens = np.array([*ids(one, "ab"), EOS, *ids(one, "?"), EOS, *ids(one, "c</s>d"), PAD])
    turn = np.array([1, 1, 1, 0, 2, 3, 3, 3, 0])
    assert turns_of(one, tokens, turn, turns=3, eos_ids=(EOS,)) == ("ab", "", "c</s>d")

"""What a reward model reads: against transformers' own tokens, and what is refused."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dppo_jax.data.conversations import Conversations
from dppo_jax.data.examples import Example
from dppo_jax.data.tokenizer import load_tokenizer
from dppo_jax.errors import UserError
from tests.golden.reward_models.conversations import CONVERSATIONS
from tests.helpers.places import GOLDEN

MODELS = GOLDEN / "reward_models"


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    made = load_tokenizer(str(MODELS / "llama"))
    made.chat_template = template
    return made


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_tokens_are_those_of_apply_chat_template(family):
    with np.load(MODELS / "golden.npz") as golden, Conversations(load_tokenizer(str(MODELS / family))) as encode:
        for row, conversation in enumerate(CONVERSATIONS):
            assert encode(*conversation) == golden["tokens"][row, : golden["lengths"][row]].tolist()


def test_the_template_of_the_data_goes_around_the_prompt_and_the_date_is_the_datas():
    made = tokenizer("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}")
    with Conversations(made, template="so: {prompt}", date="2031-01-02") as encode:
        assert made.decode(encode("1+1=", "2")) == "2031uso: 1+1=a2"
        assert encode((dict(role="user", content="1+1="),), "2") == encode("1+1=", "2")


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "the reward model's tokenizer has no chat template, which is how it reads a prompt and its reply"),
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{{ m.content }}{% endfor %}",
            "F, row 2: the reward model: the tokenizer's chat template refuses the messages: no system",
        ),
        (
            "{{ messages[0].content }}",
            "the reward model's chat template leaves the reply out: every one would have the same score",
        ),
        ("{{ messages", "the tokenizer's chat template fails: TemplateSyntaxError: "),
    ],
)
def test_templates_that_cannot_be_used(template, sentence):
    system = ({"role": "system", "content": "a"}, {"role": "user", "content": "b"})
    examples = [Example("a", "", where="F, row 1"), Example(system, "", where="F, row 2")]
    with pytest.raises(UserError) as error, Conversations(tokenizer(template)) as encode:
        encode.check(examples)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)

"""The critic's own prompts: what stands in them, which rows have them, and that no batch of the policy's does."""

import numpy as np
import pytest

from dppo_jax.data.examples import Example
from dppo_jax.data.privileged import Privileged, check_template
from dppo_jax.data.prompts import PromptStream, left_padded
from dppo_jax.errors import UserError
from dppo_jax.rewards.answers import answer_task
from tests.helpers.fixtures import tokenizer

TASKS = [Example(f"{a}-{b}=", str(a - b), {"hint": "abc" * a, "deep": {"er": b}}) for a in (1, 2) for b in (0, 1)]


def stream(critic: Privileged | None = None, examples=TASKS, **settings) -> PromptStream:
    task = answer_task("sums", list(examples), "last_number")
    return PromptStream(
        task, tokenizer(), **{"num_prompts": 3, "max_prompt_len": 6, "seed": 0, "critic": critic, **settings}
    )


def text(ids: list[int]) -> str:
    return tokenizer().decode(ids)


@pytest.mark.parametrize(
    ("column", "told"),
    [("answer", ["1", "0", "2", "1"]), ("hint", ["abc", "abc", "abcabc", "abcabc"]), ("deep.er", ["0", "1", "0", "1"])],
)
def test_the_critic_reads_the_column_beside_the_prompt(column, told):
    own = Privileged(column, "{privileged}? {prompt}", 20)
    assert [own.prompt(example) for example in TASKS] == [
        f"{more}? {example.prompt}" for example, more in zip(TASKS, told, strict=True)
    ]


def test_braces_in_the_data_are_text():
    example = Example("what is {privileged}?", "{prompt}")
    assert Privileged("answer", "{prompt} {privileged}", 9).prompt(example) == "what is {privileged}? {prompt}"


def test_of_messages_the_last_one_of_the_user_holds_it():
    said = ({"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"})
    found = Privileged("answer", "{prompt} ({privileged})", 9).prompt(Example(said, "4"))
    assert [message["content"] for message in found] == ["1", "2", "3 (4)"]
    assert said[2]["content"] == "3"


def test_prompts_of_the_critic_are_those_of_the_groups_and_no_batch_has_them():
    own, plain = stream(Privileged("answer", "{prompt}?{privileged}", 9)), stream()
    origin = np.array([(step, number) for step in (0, 3) for number in range(3)])
    examples, _ = own.of_groups(origin)
    assert [text(ids) for ids in own.critic_prompts(origin)] == [f"{e.prompt}?{e.answer}" for e in examples]
    assert plain.critic_prompts(origin) is None
    for step in range(3):
        for one, other in zip(own.batch(step), plain.batch(step), strict=True):
            if isinstance(one, list):
                assert one == other
            else:
                np.testing.assert_array_equal(one.tokens, other.tokens)
                np.testing.assert_array_equal(one.mask, other.mask)
    assert own.fingerprint != plain.fingerprint


def test_the_template_of_the_data_stands_around_that_of_the_critic():
    own = stream(Privileged("answer", "{prompt}?{privileged}", 12), template="ab {prompt}", max_prompt_len=9)
    origin = np.array([(0, 0)])
    (example,), _ = own.of_groups(origin)
    assert text(own.critic_prompts(origin)[0]) == f"ab {example.prompt}?{example.answer}"


def test_what_is_too_long_for_the_critic_is_refused_or_counted():
    own = Privileged("hint", "{prompt}{privileged}", 7)  # 4 + 3 tokens fit, 4 + 6 do not
    with pytest.raises(UserError) as caught:
        stream(own)
    assert str(caught.value) == (
        "sums: prompt 3 of 4 ('2-0=') with what the critic sees has 10 tokens, more than critic.max_prompt_len=7; "
        "raise it, or set data.too_long='skip'"
    )
    kept = stream(own, too_long="skip")
    assert [example.prompt for example in kept.examples] == ["1-0=", "1-1="] and kept.skipped == 2
    assert "2 prompts of more than data.max_prompt_len tokens, or of critic.max_prompt_len" in kept.left_out


REFUSED = {
    "has no column 'hunt' beside prompt and answer, for critic.privileged; the nearest is 'hint'": (
        "hunt",
        Example("1=", "1", {"hint": "a"}),
    ),
    "critic.privileged = 'answer', but the row has no answer": ("answer", Example("1=", "")),
    "'hint' must be text or a number for critic.privileged, not ['a']": (
        "hint",
        Example("1=", "1", {"hint": ["a"]}),
    ),
}


@pytest.mark.parametrize(("sentence", "case"), REFUSED.items())
def test_a_row_without_what_the_critic_should_see(sentence, case):
    with pytest.raises(UserError) as caught:
        stream(Privileged(case[0], "{prompt}{privileged}", 20), [case[1]])
    assert str(caught.value) == f"sums: prompt 1 of 1: {sentence}"


@pytest.mark.parametrize("lacking", ["{prompt}", "{privileged}"])
def test_a_template_without_a_place(lacking):
    with pytest.raises(UserError, match=f"critic.template must hold '{lacking}', but is "):
        check_template("{prompt} {privileged}".replace(lacking, ""))


def test_padding_stands_on_the_left():
    tokens, mask = left_padded([[5, 6], [], [7, 8, 9]], 3, pad_id=1)
    assert tokens.tolist() == [[1, 5, 6], [1, 1, 1], [7, 8, 9]]
    assert mask.tolist() == [[False, True, True], [False] * 3, [True] * 3]

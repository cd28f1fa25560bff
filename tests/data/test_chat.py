"""Chat templates of real tokenizers: the date they print, what they may not do, and how long they may take."""

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta

import pytest

from dppo_jax.data.chat import CHARACTERS, ChatRenderer
from dppo_jax.data.examples import Example
from dppo_jax.data.prompts import PromptStream, encode_prompt, load_tokenizer
from dppo_jax.data.tasks import load_task
from dppo_jax.errors import UserError
from dppo_jax.rewards.answers import answer_task
from tests.data.test_prompts import CHAT, write_tokenizer
from tests.helpers.places import ROOT

ASK = ({"role": "user", "content": "1+1="},)
# The lines of Llama 3's template that choose a date.
DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}"
    "{%- endif %}{%- endif %}Today Date: {{ date_string }} {% for m in messages %}{{ m.content }}{% endfor %}"
)


@pytest.fixture
def with_template(tmp_path):
    def make(template):
        return load_tokenizer(write_tokenizer(tmp_path / f"tokenizer{len(list(tmp_path.iterdir()))}", chat=template))

    return make


def test_the_date_is_the_configs_and_not_todays(with_template):
    tokenizer = with_template(DATED)
    today = datetime.now()
    for date, shown in (("2024-07-26", "26 Jul 2024"), ("1999-12-31", "31 Dec 1999")):
        text = tokenizer.decode(encode_prompt(tokenizer, ASK, chat=True, date=date))
        assert f"Today Date: {shown}" in text and "1+1=" in text
        for day in (today, today + timedelta(days=1)):
            assert day.strftime("%d %b %Y") not in text
    clock = with_template("{{ strftime_now('%Y-%m-%d %H:%M:%S') }} {{ messages[0]['content'] }}")
    assert clock.decode(encode_prompt(clock, ASK, chat=True)).startswith("2024-07-26 00:00:00")
    task = answer_task("sums", [Example("1+1=", "2")], "last_number")
    settings = dict(num_prompts=1, max_prompt_len=64, seed=0, chat=True)
    days = "2024-07-26", "2025-01-02"
    first, second = (PromptStream(task, tokenizer, date=day, **settings).batch(0)[0] for day in days)
    assert (first.tokens != second.tokens).any()


def test_a_second_process_on_another_day_sees_the_same_prompt(with_template, tmp_path):
    """The hash seed and the time zone of processes differ; the clock cannot be moved, so the zone moves the day."""
    with_template(DATED)
    (folder,) = tmp_path.iterdir()
    ask = (
        "import sys; from dppo_jax.data.prompts import encode_prompt, load_tokenizer\n"
        "print(encode_prompt(load_tokenizer(sys.argv[1]), '1+1=', chat=True))"
    )
    seen = set()
    for zone, seed in (("Pacific/Kiritimati", "1"), ("Etc/GMT+12", "2")):  # 26 hours apart: never one date
        env = os.environ | {"TZ": zone, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", ask, str(folder)], env=env, capture_output=True, text=True)
        seen.add(done.stdout)
    (said,) = seen
    assert len(json.loads(said)) > 20


@pytest.mark.parametrize("date", ["", "today", "20240726", "2024-7-26", "2024-02-30", "2024-07-26\n", "26 Jul 2024", 5])
def test_a_date_that_is_none(with_template, date):
    with pytest.raises(UserError, match="^data.date must be a day such as 2024-07-26, not "):
        encode_prompt(with_template(CHAT), "a", chat=False, date=date)


def test_rendering_is_transformers_own(with_template):
    """But for what differs from run to run."""
    messages = [
        {"role": "user", "content": "a<b>"},
        {"role": "assistant", "content": "c", "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
        {"role": "tool", "content": "é\n"},
        {"role": "user", "content": "{{ d }}"},
    ]
    for template in (
        CHAT,
        "{% for m in messages -%}\n  {% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}\n"
        "{{ m.content }}\n{%- endfor %}",
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endfor %}{{ eos_token }}{{ bos_token }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}\n",
    ):
        tokenizer = with_template(template)
        with ChatRenderer(tokenizer) as render:
            assert render(messages) == tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )


THINKING = (
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|reply|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<none>{% else %}<think>{% endif %}"
    "{% for word in words or [] %}{{ word }}{% endfor %}"
)


def test_arguments_of_the_template(with_template):
    """As transformers passes them: Qwen3's enable_thinking, and a list."""
    tokenizer = with_template(THINKING)
    given: list[dict] = [{}, {"enable_thinking": False}, {"words": ["a", "b"], "enable_thinking": True}]
    rendered = []
    for arguments in given:
        with ChatRenderer(tokenizer, arguments=arguments) as render:
            rendered.append(render(ASK))
        whole = tokenizer.apply_chat_template(list(ASK), add_generation_prompt=True, tokenize=False, **arguments)
        assert rendered[-1] == whole
    assert [text.partition("<|reply|>")[2] for text in rendered] == ["<think>", "<none>", "<think>ab"]
    task = answer_task("sums", [Example("1+1=", "2")], "last_number")
    settings = dict(num_prompts=1, max_prompt_len=64, seed=0, chat=True)
    batch, _ = PromptStream(task, tokenizer, chat_kwargs=given[1], **settings).batch(0)
    assert tokenizer.decode(batch.tokens[batch.mask]).endswith("<none>")


@pytest.mark.parametrize(
    ("template", "arguments", "words"),
    [
        (THINKING, {"enable_thinkng": False}, "has no argument 'enable_thinkng'; the nearest is 'enable_thinking'"),
        (THINKING, {"q": 1}, "has no argument 'q'; known: enable_thinking, words"),
        (CHAT, {"enable_thinking": False}, "has no argument 'enable_thinking'; it has none"),
        (DATED, {"date": "2024"}, "has no argument 'date'; the nearest is 'date_string'"),
        (DATED, {"m": "2024"}, "has no argument 'm'; known: date_string"),  # a name of its own
        (DATED, {"strftime_now": 1}, "'strftime_now' is what the rendering gives the chat template itself; set data."),
        *[(CHAT, {name: 1}, f"{name!r} is what the rendering gives the chat template itself; leave it out")
          for name in ("messages", "add_generation_prompt", "tools", "bos_token", "chat_template")],
    ],
)  # fmt: skip
def test_arguments_that_the_template_does_not_take(with_template, template, arguments, words):
    with pytest.raises(UserError) as error:
        ChatRenderer(with_template(template), arguments=arguments)
    assert str(error.value).startswith("data.chat_kwargs: ") and words in str(error.value)
    with pytest.raises(UserError, match="^data.chat_kwargs = .* are of a chat template; set data.chat=True$"):
        encode_prompt(with_template(template), "a", chat=False, chat_kwargs=arguments)


# What a rendering does, and the words that refuse it. One template does them all, each for a message of its own.
REFUSED = {
    "{{ raise_exception('no') }}": "refuses the messages: no",
    "{{ ['a', 'b'] | random }}": "refuses the messages: it draws at random (random)",
    "{{ lipsum() }}": "refuses the messages: it draws at random (lipsum)",
    "{{ range }}": "fails: it prints an object's address",
    "{{ joiner() }}": "fails: it prints an object's address",
    "{{ 1 / 0 }}": "fails: ZeroDivisionError: division by zero",
    "{{ messages[0].content + 1 }}": "fails: TypeError: can only concatenate str",
    "{{ messages[0].name.first }}": "refuses the messages: 'dict object' has no attribute 'name'",
    "{{ messages[9].content }}": "refuses the messages: list object has no element 9",
    "{{ strftime_now(5) }}": "fails: TypeError",
    "{{ ''.__class__.__mro__ }}": "refuses the messages: access to attribute '__class__' of 'str' object is unsafe",
    "{% include 'x' %}": "fails: TypeError: no loader",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "fails: RecursionError",
    "{{ ns.a * ns.ten ** 10 }}": "fails: MemoryError",
    "{{ ns.a | center(10**10) }}": "fails: MemoryError",
    "{% for i in range(99999) %}{{ ns.a * 100000 }}{% endfor %}": "fails: MemoryError",
    "{{ ns.a * 2**25 }}": f"fails: it writes 33554432 characters, more than {CHARACTERS}",
}


def test_a_template_that_fails(with_template):
    cases = "".join(f"{{% elif c == '{number}' %}}{case}" for number, case in enumerate(REFUSED))
    start = "{% set ns = namespace(a='a', ten=10) %}{% set c = messages[0].content %}{% if not c %}"
    with ChatRenderer(with_template(start + cases + "{% endif %}"), cpu_seconds=60) as render:
        for number, (case, words) in enumerate(REFUSED.items()):
            with pytest.raises(UserError) as error:
                render([{"role": "user", "content": str(number)}])
            said = str(error.value)
            assert said.startswith(f"the tokenizer's chat template {words}"), (case, said)
            assert "\n" not in said and len(said) < 400
        assert render([{"role": "user", "content": "x"}]) == ""  # it lives on


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x=9) %}{{ (ns.x ** 9) ** (ns.x ** 9) }}",  # one long call in C
        "{{ '%0999999999d' % 7 ** 9 ** 9 }}",  # computed where the template is compiled
    ],
)
def test_a_template_that_does_not_end(with_template, template):
    """The system ends the process that renders, whatever it is doing. The limit here is shorter than the default."""
    with pytest.raises(UserError, match="does not end: one rendering took more than 0.5 seconds of computing"):
        with ChatRenderer(with_template(template), cpu_seconds=0.5) as render:
            render(ASK)


def test_a_template_that_does_not_compile(with_template):
    for template, words in (
        ("{% for %}", "fails: TemplateSyntaxError: Expected an expression"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "fails: RecursionError"),
    ):
        with pytest.raises(UserError, match=words):
            ChatRenderer(with_template(template))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 10 seconds of"),
        ("{% if '3' in messages[0].content %}{{ raise_exception('no') }}{% endif %}a", "refuses the messages: no"),
        ("a{% if '3' in messages[0].content %}{{ '\\ud800' }}{% endif %}", "the tokenizer cannot encode the prompt"),
        ("{% if not '3' in messages[0].content %}a{% endif %}", "the prompt has no tokens"),
        ("a{% if '3' in messages[0].content %}\N{SNOWMAN}{% endif %}", "the tokenizer has no token for '\N{SNOWMAN}'"),
    ],
)
def test_the_row_is_named(with_template, tmp_path, template, words):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1+1=", "answer": 2}\n\n{"prompt": "1+3=", "answer": 4}\n')
    task = load_task("jsonl", path=str(file), verifier="last_number")
    with pytest.raises(UserError) as error:
        PromptStream(task, with_template(template), num_prompts=1, max_prompt_len=99, seed=0, chat=True)
    said, row = str(error.value), 1 if "seconds" in words else 3
    assert said.startswith(f"{file}, row {row}: ") and words in said and "\n" not in said and len(said) < 400


def test_several_templates(with_template):
    tokenizer = with_template(CHAT)
    tokenizer.chat_template = {"rag": "r", "tool_use": "t"}
    with pytest.raises(UserError, match=r"has several chat templates \(rag, tool_use\), and none that is named 'def"):
        encode_prompt(tokenizer, "a", chat=True)
    tokenizer.chat_template = {"tool_use": "t", "default": "d"}
    assert tokenizer.decode(encode_prompt(tokenizer, "a", chat=True)) == "d"
    for none in (None, "", {}):
        tokenizer.chat_template = none
        with pytest.raises(UserError, match="has no chat template; set data.chat=False"):
            encode_prompt(tokenizer, "a", chat=True)

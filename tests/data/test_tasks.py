"""Tasks from real reasoning-gym data sets and real files: what loads, what is refused, and in which words."""

import functools
import json
import random
from datetime import datetime
from fractions import Fraction

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import reasoning_gym

from configs import base
from dppo_jax.data.arithmetic import exact_value
from dppo_jax.data.prompts import PromptStream, load_tokenizer
from dppo_jax.data.tasks import TASKS, load_task
from dppo_jax.errors import UserError
from dppo_jax.rewards.scorer import Scorer
from tests.data.test_prompts import write_tokenizer
from tests.helpers.places import GOLDEN

ROWS = GOLDEN / "rows.jsonl"
ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def gym(name, settings=None, **kwargs):
    return load_task("reasoning_gym", name=name, settings=settings, **{"size": 20, "seed": 1, **kwargs})


def test_exact_value():
    assert exact_value("2 + 3 * 4 / 6 - -1") == 5
    assert exact_value(" -( 1 / 3 + 1/6 ) ") == Fraction(-1, 2)
    assert exact_value("0.1 + 0.2") == Fraction(3, 10)
    assert exact_value("9007199254740993 / 1") == 9007199254740993
    for bad in ("2 ** 3", "len('a')", "x", "True", "1 // 2"):
        with pytest.raises(ValueError, match="is not arithmetic"):
            exact_value(bad)
    with pytest.raises(ZeroDivisionError):
        exact_value("1 / (2 - 2)")


def test_products_score_the_last_number():
    task = gym("products", ONE_DIGIT, size=100, verifier="last_number")
    assert len(task.examples) == 100 and not task.isolated
    for example in task.examples:
        a, b = example.meta["entry"]["metadata"]["expression"].split(" * ")
        assert int(example.answer) == int(a) * int(b)
        assert task.score(f"{a} times {b} is {int(a) * int(b)}.", example) == 1
        assert task.score(f"It is {int(a) * int(b) + 1}.", example) == 0


def test_the_same_seed_makes_the_same_task_and_leaves_the_global_generators_alone():
    """list_functions draws from the global `random` whatever its seed; pool_matrix reseeds NumPy's."""
    for name in ("list_functions", "pool_matrix"):
        random.seed(5)
        np.random.seed(5)
        first = gym(name)
        after = random.random(), np.random.random()
        random.seed(5)
        np.random.seed(5)
        assert after == (random.random(), np.random.random())
        assert gym(name).examples == first.examples
        assert gym(name, seed=2).examples != first.examples


@pytest.mark.parametrize("name", ["spell_backward", "time_intervals", "sudoku"])
def test_partial_credit_counts_for_nothing(name):
    task = gym(name, size=1)
    (example,) = task.examples
    dataset = reasoning_gym.create_dataset(name, seed=1, size=1)
    change = {"2": "3", "0": "1"}.get(example.answer[-1], "2") if example.answer[-1].isdigit() else ""
    nearly = example.answer[:-1] + change
    assert 0 < dataset.score_answer(nearly, dataset[0]) < 1  # what the data set's own scorer gives
    assert task.score(nearly, example) == 0
    assert task.score(example.answer, example) == 1
    assert task.score(f"Let me think. <answer>{example.answer}</answer>", example) == 1


def test_the_data_sets_own_scorer_runs_in_workers():
    task = gym("countdown", size=4)
    assert task.isolated
    replies = [task.examples[0].answer, "x", "1 +", f"<answer>{task.examples[3].answer}</answer>"]
    with Scorer(task, workers=1, time_limit_s=60) as scorer:
        rewards, counts = scorer.submit(replies, task.examples).result()
    assert rewards.tolist() == [1, 0, 0, 1]
    assert counts == {"killed": 0, "failed": 0, "refused": 2}  # "x" and "1 +" are no arithmetic


def test_a_scorer_that_cannot_read_the_reply_gives_zero():
    task = gym("prime_factorization")
    assert task.score("not a number", task.examples[0]) == 0  # int() raises inside the data set's scorer


def test_basic_arithmetic_without_parentheses_has_wrong_labels():
    """reasoning-gym 0.1.25 ignores precedence and divides by another number than it prints."""
    for settings in ({}, {"operators": ["+", "*"], "min_terms": 3}, {"operators": ["/"], "max_terms": 2}):
        with pytest.raises(UserError) as error:
            gym("basic_arithmetic", {"allow_parentheses": False, **settings}, size=100)
        for part in ("item ", "wrong label", " is ", "but the label says", "set data.settings.operators to ['+', '-']"):
            assert part in str(error.value)
    assert gym("basic_arithmetic", {"allow_parentheses": False, "operators": ["+", "-"]}, size=100)


def test_basic_arithmetic_with_parentheses_drops_remainders():
    with pytest.raises(UserError, match=r"item 109: wrong label: .* is \d+/\d+, but the label says 532"):
        gym("basic_arithmetic", size=120, seed=7)
    assert gym("basic_arithmetic", {"operators": ["+", "-", "*"]}, size=120, seed=7)


@pytest.mark.parametrize("verifier", ["task", "last_number"])
def test_items_with_wrong_labels_may_be_left_out(verifier):
    """A label of gsm_symbolic is -1, which its own scorer does not take."""
    name, size, seed, bad = ("basic_arithmetic", 120, 7, 109) if verifier == "task" else ("gsm_symbolic", 200, 3, 196)
    load = functools.partial(load_task, "reasoning_gym", name=name, size=size, seed=seed, verifier=verifier)
    with pytest.raises(UserError, match=f"item {bad}: "):
        load()
    task = load(bad_label="drop")
    generated = reasoning_gym.create_dataset(name, seed=seed, size=size)
    left = [generated[i]["question"] for i in range(size) if i != bad]
    assert [example.prompt for example in task.examples] == left
    assert task.left_out == {"bad_label": 1}


@pytest.mark.parametrize("name", ["chain_sum", "decimal_chain_sum", "products", "gcd", "bf"])
def test_right_labels_load_quietly(name, capsys):
    assert len(gym(name).examples) == 20
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "prodcts"}, "'prodcts'; the nearest is 'products'"),
        ({"name": ""}, "needs data.name"),
        ({"name": "products", "path": "x"}, "unset data.path='x'"),
        ({"name": "products", "size": 0}, "data.size must be at least 1, not 0"),
        ({"name": "products", "settings": {"min_term": 2}}, "no setting 'min_term'; the nearest is 'min_terms'"),
        ({"name": "products", "settings": {"seed": 2}}, "set data.seed instead"),
        ({"name": "products", "settings": {"min_terms": 0}}, "{'min_terms': 0}: min_terms must be positive"),
        ({"name": "products", "settings": {"min_terms": "two"}}, "{'min_terms': 'two'}"),
        ({"name": "products", "verifier": "last_numbr"}, "data.verifier 'last_numbr'; the nearest is 'last_number'"),
        ({"name": "game_of_life_halting"}, "full score; set data.verifier='exact_match'"),
        ({"name": "graph_color", "verifier": "last_number"}, "is missing; set data.verifier='task'"),
        ({"name": "spell_backward", "verifier": "last_number"}, "is not one number"),
    ],
)
def test_bad_reasoning_gym_settings(arguments, words):
    with pytest.raises(UserError) as error:
        gym(**arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_kind():
    assert sorted(TASKS) == ["environment", "hub", "jsonl", "parquet", "reasoning_gym"]
    with pytest.raises(UserError, match="unknown data.kind 'json'; the nearest is 'jsonl'"):
        load_task("json", path=str(ROWS))


def test_jsonl():
    task = load_task("jsonl", path=str(ROWS), verifier="last_number")
    assert [e.answer for e in task.examples] == ["5", "56", "0.25"]
    assert task.examples[0].prompt == "What is 2 + 3?" and task.examples[0].meta == {"source": "hand"}
    assert [m["role"] for m in task.examples[1].prompt] == ["system", "user"]
    assert task.score("That is .250", task.examples[2]) == 1
    assert not task.isolated
    assert load_task("jsonl", path=str(ROWS), verifier="math_verify").isolated
    assert len(load_task("jsonl", path=str(ROWS), verifier="last_number", size=2).examples) == 2


def test_parquet_reads_the_same_rows(tmp_path):
    rows = [json.loads(line) for line in ROWS.read_text().splitlines() if line]
    table = {key: [row.get(key) for row in rows] for key in ("prompt", "messages", "source")}
    table["answer"] = [str(row["answer"]) for row in rows]
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    task = load_task("parquet", path=str(tmp_path / "rows.parquet"), verifier="last_number")
    assert list(task.examples) == list(load_task("jsonl", path=str(ROWS), verifier="last_number").examples)


GOOD = '{"prompt": "a", "answer": "1"}'


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([GOOD, '{"prompt": "a"}'], "row 2: has no 'answer'; keys: ['prompt']"),
        ([GOOD, "", '{"prompt": "a", "answer": null}'], "row 3: has no 'answer'"),
        ([GOOD, '{"prompt": "a", "answer": ""}'], "row 2: the answer '' is empty"),
        ([GOOD, '{"prompt": "a", "answer": "five"}'], "row 2: the answer 'five' is not one number"),
        ([GOOD, '{"prompt": "a", "answer": [["5"]]}'], "row 2: 'answer' must be text or a number, not ['5']"),
        ([GOOD, '{"prompt": "a", "answer": []}'], "row 2: 'answer' is an empty list"),
        ([GOOD, '{"prompt": "a", "answer": ["5", "b"]}'], "row 2: the answer 'b' is not one number"),
        ([GOOD, '{"prompt": "a", "answer": true}'], "row 2: 'answer' must be text or a number"),
        (['{"text": "a", "answer": "1"}'], "row 1: has neither of 'prompt' and 'messages'"),
        (['{"prompt": "a", "messages": [], "answer": "1"}'], "row 1: has both of 'prompt' and 'messages'"),
        (['{"prompt": " ", "answer": "1"}'], "row 1: 'prompt' must be text"),
        (['{"messages": [], "answer": "1"}'], "row 1: 'messages' must be a list"),
        (['{"messages": [{"role": "user"}], "answer": "1"}'], "row 1, message 1: needs texts 'role' and 'content'"),
        ([GOOD, GOOD, '{"prompt": "a",'], "row 3: broken JSON"),
        (["[1]"], "row 1: expected an object"),
        ([], "holds no rows"),
        (["", " "], "holds no rows"),
    ],
)
def test_bad_rows_are_named_by_file_and_row(tmp_path, lines, words):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        load_task("jsonl", path=str(file), verifier="last_number")
    assert words in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


TALK = '{"role": "user", "content": "1+1="}'


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (f'"messages": [{TALK}, {{"role": "assistant", "content": "2"}}]', "end with the assistant's turn, so the"),
        ('"messages": [{"role": "system", "content": "a"}]', "must end with a user's or a tool's, after a user's"),
        (f'"messages": [{TALK}, {{"role": "system", "content": "a"}}]', "must end with a user's or a tool's"),
        ('"messages": [{"role": "usr", "content": "a"}]', "message 1: unknown role 'usr'; the nearest is 'user'"),
        ('"messages": [{"role": "developer", "content": "a"}]', "unknown role 'developer'; the nearest is 'system'"),
        ('"messages": [{"role": "human", "content": "a"}]', "unknown role 'human'; the nearest is 'user'"),
        ('"messages": [{"role": "xyzzy", "content": "a"}]', "known: assistant, system, tool, user"),
        (f'"messages": [{TALK}, {{"role": "user", "content": " "}}]', "message 2: the content of the user's"),
        ('"messages": [{"role": "user", "content": null}]', "message 1: needs texts 'role' and 'content'"),
        ('"messages": [{"from": "human", "value": "a"}]', "has 'from' and 'value'; name them 'role' and 'content'"),
        ('"messages": [{"role": "user", "content": ["a"]}]', "must be text, or parts of 'type' and 'text', not"),
        ('"messages": [{"role": "user", "content": [{"type": "image"}]}]', "has a part of type 'image', but only text"),
        ('"messages": [{"role": "user", "content": 5}]', "'content' must be text, not 5"),
        ('"messages": []', "'messages' must be a list of role and content texts, not []"),
        ('"messages": "hello"', "'messages' must be a list of role and content texts, not 'hello'"),
        (f'"prompt": {TALK}', "'prompt' holds a message; write a list of them"),
        (f'"prompt": [{TALK}, {{"role": "assistant", "content": "2"}}]', "'prompt' end with the assistant's turn"),
        (f'"prompt": {json.dumps("[" + TALK + "]")}', "'prompt' holds messages as JSON text"),
        ('"prompt": ["a"]', "'prompt' must be text, or a list of messages, not ['a']"),
        ('"prompt": "a", "prompt": "b"', "the key 'prompt' stands there twice"),
        ('"prompt": "\\ud800"', "a lone surrogate, \\ud800"),
        (f'"prompt": "a", "x": {"[" * 70 + "]" * 70}', "lists and objects nested more than 64 deep"),
        (f'"prompt": "a", "x": {"[" * 10**5 + "]" * 10**5}', "nested too deeply"),
        (f'"prompt": "a", "x": {"9" * 5000}', "4300 digits"),
        (f'"prompt": {json.dumps(["x" * 10**6])}', "list of messages, not ['xxx"),
        (f'"{"k" * 10**6}": 1', "has neither of 'prompt' and 'messages'"),
        (f'"messages": [{{"role": "{"r" * 10**6}", "content": "a"}}]', "unknown role 'rrr"),
    ],
    ids=range(27),
)
def test_a_row_that_cannot_be_asked(tmp_path, row, words):
    file = tmp_path / "bad.jsonl"
    file.write_text(f'{GOOD}\n{{{row}, "answer": "1"}}\n')
    with pytest.raises(UserError) as error:
        load_task("jsonl", path=str(file), verifier="exact_match")
    said = str(error.value)
    assert said.startswith(f"{file}, row 2") and words in said
    assert "\n" not in said and len(said) < 500
    said.encode("utf-8")


def test_turns_in_the_middle_are_part_of_the_prompt(tmp_path):
    roles = ("system", "user", "assistant", "user", "assistant", "tool")
    messages = [{"role": role, "content": "a"} for role in roles]
    for length in (2, 4, 6):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages[:length], "answer": 1}))
        (example,) = load_task("jsonl", path=str(tmp_path / "rows.jsonl"), verifier="exact_match").examples
        assert example.prompt == tuple(messages[:length])


@pytest.mark.parametrize(
    ("written", "read"),
    [("2.0", "2"), ("-3.00", "-3"), ("1e3", "1000"), ("1.5E1", "15"), ("-0.0", "0"), ("0.0", "0"), ("0.10", "0.10"),
     ("0.5", "0.5"), ("1e-7", "1e-7"), ("12345678901234567890", "12345678901234567890"), ("-7", "-7"),
     ("12345678901234567890.0", "12345678901234567890"), ('"2.0"', "2.0"), ('"1e3"', "1e3")],
)  # fmt: skip
def test_an_answer_that_is_a_number(tmp_path, written, read):
    """Whole ones as integers, the rest as written: exact_match compares texts."""
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "a", "answer": {written}}}')
    task = load_task("jsonl", path=str(tmp_path / "rows.jsonl"), verifier="exact_match")
    assert task.examples[0].answer == read
    assert task.score(read, task.examples[0]) == 1


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "1e400", "-1e999"])
def test_an_answer_that_is_no_finite_number(tmp_path, written):
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "a", "answer": {written}}}')
    with pytest.raises(UserError, match="row 1: the answer .* is no finite number"):
        load_task("jsonl", path=str(tmp_path / "rows.jsonl"), verifier="exact_match")


def test_a_float_column_with_gaps(tmp_path):
    """As pandas writes integers where one is missing."""
    table = pyarrow.table({"prompt": ["a", "b", "c"], "answer": [2.0, 0.5, 1e16]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    task = load_task("parquet", path=str(tmp_path / "rows.parquet"), verifier="exact_match")
    assert [example.answer for example in task.examples] == ["2", "0.5", "10000000000000000"]


def test_the_folder_of_a_parquet_file_adds_no_column(tmp_path):
    """Its name looks like a partition of a larger table."""
    folder = tmp_path / "answer=7"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}), folder / "rows.parquet")
    with pytest.raises(UserError, match="row 1: has no 'answer'"):
        load_task("parquet", path=str(folder / "rows.parquet"), verifier="exact_match")


def test_columns_that_python_cannot_hold(tmp_path):
    """Nanoseconds beside prompt and answer are read as text; two columns of one name are refused."""
    file = tmp_path / "rows.parquet"
    time = pyarrow.array([1_700_000_000_000_000_001], pyarrow.timestamp("ns"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "answer": [1], "when": time}), file)
    (example,) = load_task("parquet", path=str(file), verifier="exact_match").examples
    assert example.meta == {"when": "2023-11-14 22:13:20.000000001"}
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["1"], ["2"]], ["prompt", "answer", "answer"]), file)
    with pytest.raises(UserError, match="rows.parquet has two columns of the name 'answer'"):
        load_task("parquet", path=str(file), verifier="exact_match")


def test_reasoning_gym_makes_2000_examples_where_no_size_is_given():
    """As many as every config had before a file was read whole."""
    assert base.data_section().size is None
    task = load_task("reasoning_gym", name="chain_sum", settings=ONE_DIGIT, verifier="last_number")
    assert len(task.examples) == 2000


def test_messages_that_no_template_can_see(tmp_path):
    """A time inside a message, which a parquet table may hold."""
    turn = {"role": "user", "content": "a", "at": datetime(2024, 1, 1)}
    table = pyarrow.table({"messages": [[turn]], "answer": ["1"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    task = load_task("parquet", path=str(tmp_path / "rows.parquet"), verifier="exact_match")
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match="rows.parquet, row 1: the messages hold what is no JSON: Object of type d"):
        PromptStream(task, tokenizer, num_prompts=1, max_prompt_len=9, seed=0, chat=True)


def test_all_of_a_file_is_read_unless_size_says_less(tmp_path):
    """7,473 rows are more than the 2,000 that reasoning-gym makes."""
    rows = [json.dumps({"prompt": f"{i}", "answer": i}) for i in range(7473)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n\n \n")
    task = load_task("jsonl", path=str(tmp_path / "rows.jsonl"), verifier="exact_match")
    assert [example.answer for example in task.examples] == [str(i) for i in range(7473)]
    assert task.left_out == {"blank": 2, "beyond_size": 0, "bad_label": 0}
    task = load_task("jsonl", path=str(tmp_path / "rows.jsonl"), verifier="exact_match", size=7000)
    assert (len(task.examples), task.left_out) == (7000, {"blank": 2, "beyond_size": 473, "bad_label": 0})
    table = pyarrow.table({"prompt": ["a"] * 5, "answer": range(5)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    task = load_task("parquet", path=str(tmp_path / "rows.parquet"), verifier="exact_match", size=2)
    assert (len(task.examples), task.left_out) == (2, {"blank": 0, "beyond_size": 3, "bad_label": 0})


def test_a_path_of_several_files_or_of_home(tmp_path, monkeypatch):
    for path in ("a.jsonl,b.jsonl", "part-*.jsonl", "['a.jsonl']"):
        with pytest.raises(UserError, match="there is no file .*; it names one file, a folder of them, or a pattern"):
            load_task("jsonl", path=path, verifier="exact_match")
    with pytest.raises(UserError, match="data.path = 'hdfs://b/rows.jsonl': hdfs:// addresses"):
        load_task("jsonl", path="hdfs://b/rows.jsonl", verifier="exact_match")
    with pytest.raises(UserError, match="data.path = 'xxx.*: File name too long"):
        load_task("jsonl", path="x" * 10_000, verifier="exact_match")
    (tmp_path / "rows.jsonl").write_text(GOOD)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_task("jsonl", path="~/rows.jsonl", verifier="exact_match").examples) == 1


def test_bad_parquet(tmp_path):
    file = tmp_path / "bad.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "answer": ["1", None]}), file)
    with pytest.raises(UserError, match=r"bad.parquet, row 2: has no 'answer'"):
        load_task("parquet", path=str(file), verifier="last_number")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"bad.parquet cannot be read as parquet"):
        load_task("parquet", path=str(file), verifier="last_number")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [], "answer": []}), file)
    with pytest.raises(UserError, match=r"bad.parquet holds no rows"):
        load_task("parquet", path=str(file), verifier="last_number")


@pytest.mark.parametrize("row", [{"prompt": "1+1="}, {"question": "1+1=", "answer": [" "]}])
def test_prompts_without_answers(tmp_path, row):
    """Every reply scores 0, and an answer that no verifier could accept is not looked at."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    task = load_task("jsonl", path=str(tmp_path / "rows.jsonl"), verifier="none")
    assert [example.prompt for example in task.examples] == ["1+1="] and not task.isolated
    assert task.score("2", task.examples[0]) == 0.0
    with pytest.raises(UserError, match="row 1: "):
        load_task("jsonl", path=str(tmp_path / "rows.jsonl"), verifier="exact_match")
    assert gym("products", ONE_DIGIT, verifier="none").score("0", gym("products", ONE_DIGIT).examples[0]) == 0.0


def test_the_assistants_last_turn_is_an_answer_where_it_is_asked_for(tmp_path):
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": [{"type": "text", "text": "2"}]}]
    rows = [{"messages": turns}, {"messages": [*turns, turns[0]], "said": turns[1:]}, {"prompt": "?", "said": "3"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = dict(path=str(tmp_path / "rows.jsonl"), verifier="none", columns={"answer": "said"})
    task = load_task("jsonl", **settings, last_turn=True)
    assert [(len(e.prompt), e.answer) for e in task.examples] == [(1, "2"), (3, "2"), (1, "3")]
    with pytest.raises(UserError, match="row 1: 'messages' end with the assistant's turn"):
        load_task("jsonl", **settings)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_bad_file_settings(kind, tmp_path):
    for arguments, words in (
        ({"path": str(tmp_path / "none")}, "there is no file"),
        ({"path": str(tmp_path)}, f"the folder {str(tmp_path)!r} holds no *.{kind}, and no folder inside does"),
        ({"path": ""}, "needs data.path"),
        ({"path": str(ROWS), "settings": {"min_terms": 2}}, "['min_terms']; clear them: --config.data.settings={}"),
        ({"path": str(ROWS), "verifier": "task"}, "has no scorer of its own"),
    ):
        with pytest.raises(UserError) as error:
            load_task(kind, **{"verifier": "last_number", **arguments})
        assert words in str(error.value)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary(, row 1 is not UTF-8 text| cannot be read)"):
        load_task(kind, path=str(tmp_path / "binary"), verifier="last_number")


@pytest.mark.parametrize(
    ("rows", "columns", "prompts", "shape"),
    [
        ([{"prompt": "a", "answer": None}, {"prompt": "b"}], {}, ["a", "b"], "prompt"),
        ([{"prompt": "a", "messages": [{"role": "user", "content": "c"}], "chosen": "x"}], {}, ["a"], "prompt"),
        ([{"question": "a", "answer": "#### 7"}], {}, ["a"], "question"),
        ([{"info": {"ask": "a"}, "prompt": "b"}], {"prompt": "info.ask"}, ["a"], "info.ask"),
        ([{"prompt": [{"role": "user", "content": "a"}]}], {}, [({"role": "user", "content": "a"},)], "prompt"),
    ],
)
def test_rows_without_answers(tmp_path, rows, columns, prompts, shape):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task("jsonl", path=str(path), verifier="none", columns=columns)
    assert [example.prompt for example in task.examples] == prompts
    assert {example.labels for example in task.examples} == {("",)} and task.score("7", task.examples[0]) == 0.0
    assert task.remarks == (f"read as prompts (prompt: {shape}; no answer is read)",)


@pytest.mark.parametrize(
    ("line", "columns", "words"),
    [
        ('{"text": "a"}', {}, "row 1: has neither of 'prompt' and 'messages', of which it needs one; keys: ['text']"),
        ('{"prompt": "a"}', {"prompt": "promt"}, "has no column 'promt', which data.columns.prompt names; the nearest"),
        ('{"prompt": "a"}\n{"text": "b"}', {}, "row 2: has no 'prompt', but the rows are read as prompts (prompt: pro"),
    ],
)
def test_rows_without_prompts(tmp_path, line, columns, words):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    with pytest.raises(UserError) as error:
        load_task("jsonl", path=str(tmp_path / "rows.jsonl"), verifier="none", columns=columns)
    assert words in str(error.value)


def test_a_generated_set_without_a_verifier():
    task = load_task("reasoning_gym", name="products", size=3, verifier="none")
    assert len(task.examples) == 3 and task.score(task.examples[0].answer, task.examples[0]) == 0.0

"""Files as they are published, three rows each: what is recognised, what a right and a wrong reply score."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from dppo_jax.data import shapes
from dppo_jax.data.prompts import PromptStream, load_tokenizer
from dppo_jax.data.shapes import cut
from dppo_jax.data.tasks import load_task
from dppo_jax.errors import UserError
from dppo_jax.rewards.scorer import Scorer
from tests.data.test_prompts import write_tokenizer

QUESTION = ("What is 6 times 7?", "What is 1 + 1?", "What is 10 * 100?")


def talk(text):
    return [{"role": "system", "content": "Be short."}, {"role": "user", "content": text}]


def parts(text):
    return [{"role": "user", "content": [{"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:]}]}]


def table(**columns):
    """Three rows; a function is called with the row's question and label, a text stands in all of them."""

    def rows(*labels):
        return [
            {key: value(q, a) if callable(value) else value for key, value in columns.items()}
            for q, a in zip(QUESTION, labels, strict=True)
        ]

    return rows


def question(q, _):
    return q


def label(_, a):
    return a


NUMBERS, LATEX = ("42", "2", "1,000"), ("42", "\\frac{4}{2}", "10^{3}")
gsm8k = table(question=question, answer=lambda q, a: f"{q} She sold 48/2 = <<48/2=24>>24.\n#### {a}")
math = table(
    problem=question, level="Level 3", type="Algebra",
    solution=lambda q, a: f"First \\boxed{{7}} is $x_{{1}}$. Then $x = \\boxed{{{a}}}$.",
)  # fmt: skip
math_500 = table(problem=question, solution="We compute.", answer=label, subject="Algebra", level=3, unique_id="test/1")
dapo = table(
    data_source="math_dapo", prompt=lambda q, _: talk(q), ability="MATH",
    reward_model=lambda _, a: {"ground_truth": a, "style": "rule-lighteval/MATH_v2"}, extra_info={"index": "9a9b"},
)  # fmt: skip
dapo_processed = table(
    prompt=question, solution=label, data_source="math_dapo", source_prompt=lambda q, _: talk(q), ability="MATH",
    reward_model=lambda _, a: {"ground_truth": a, "style": "rule-lighteval/MATH_v2"}, extra_info={"index": "9a9b"},
)  # fmt: skip
verl = table(
    data_source="openai/gsm8k", prompt=lambda q, _: talk(q), ability="math",
    reward_model=lambda _, a: {"style": "rule", "ground_truth": a},
    extra_info=lambda q, a: {"split": "train", "index": 0, "answer": f"#### {a}", "question": q},
)  # fmt: skip
skyrl = table(
    data_source="gsm8k", prompt=lambda q, _: talk(q), env_class="gsm8k",
    reward_spec=lambda _, a: {"method": "rule", "ground_truth": a}, extra_info={"split": "train", "index": 0},
)  # fmt: skip
rlvr = table(messages=lambda q, _: talk(q), ground_truth=label, dataset="gsm8k")
rlvr_several = table(messages=lambda q, _: talk(q), ground_truth=lambda _, a: [a, a + "0"], dataset=["math"])

# rows, their labels, the verifier, what is said of them.
SHAPES = {
    "own": (table(prompt=question, answer=label), NUMBERS, "last_number", None),
    "own messages": (table(messages=lambda q, _: talk(q), answer=label), NUMBERS, "last_number", None),
    "gsm8k": (gsm8k, NUMBERS, "last_number", "GSM8K (prompt: question; answer: answer after ####)"),
    "math": (math, LATEX, "math_verify", "MATH (prompt: problem; answer: solution in \\boxed)"),
    "math-500": (math_500, LATEX, "math_verify", "problem and answer (prompt: problem; answer: answer)"),
    "aime 2024": (
        table(id=60, problem=question, solution="Since", answer=label, url="u", year="2024"), NUMBERS, "last_number",
        "problem and answer (prompt: problem; answer: answer)",
    ),
    "aime 2024, capitals": (
        table(ID="2024-I-1", Problem=question, Solution="Since", Answer=lambda _, a: int(a.replace(",", ""))),
        ("42", "2", "1000"), "last_number", "AIME_2024 (prompt: Problem; answer: Answer)",
    ),
    "aime 2025": (
        table(question=question, answer=label), NUMBERS, "last_number",
        "question and answer (prompt: question; answer: answer)",
    ),
    "amc": (
        table(id=0, problem=question, answer=lambda _, a: float(a.replace(",", "")), url="u"), ("42", "2", "1000"),
        "last_number", "problem and answer (prompt: problem; answer: answer)",
    ),
    "amc 23": (
        table(id="0", question=question, answer=lambda _, a: float(a.replace(",", "")), url="u"), ("42", "2", "1000"),
        "exact_match", "question and answer (prompt: question; answer: answer)",
    ),
    "dapo": (dapo, NUMBERS, "last_number", "verl (prompt: prompt; answer: reward_model.ground_truth)"),
    "dapo processed": (
        dapo_processed, LATEX, "math_verify", "verl (prompt: prompt; answer: reward_model.ground_truth)"
    ),
    "verl": (verl, NUMBERS, "last_number", "verl (prompt: prompt; answer: reward_model.ground_truth)"),
    "skyrl": (skyrl, LATEX, "math_verify", "SkyRL (prompt: prompt; answer: reward_spec.ground_truth)"),
    "trl": (table(prompt=question, answer=label), LATEX, "math_verify", None),
    "trl conversation": (table(prompt=lambda q, _: talk(q), answer=label), LATEX, "math_verify", None),
    "trl solution": (
        table(prompt=lambda q, _: talk(q), solution=lambda _, a: f"${a}$"), LATEX, "math_verify",
        "TRL (prompt: prompt; answer: solution)",
    ),
    "trl boxed": (
        table(prompt=question, solution=lambda _, a: f"So it is \\boxed{{{a}}}."), LATEX, "math_verify",
        "TRL (prompt: prompt; answer: solution in \\boxed)",
    ),
    "trl parts": (
        table(prompt=lambda q, _: parts(q), solution=label), NUMBERS, "last_number",
        "TRL (prompt: prompt; answer: solution)",
    ),
    "verifiers": (
        table(question=question, answer=label, info="{}", task="math"), LATEX, "math_verify",
        "question and answer (prompt: question; answer: answer)",
    ),
    "rlvr": (rlvr, NUMBERS, "last_number", "RLVR (prompt: messages; answer: ground_truth)"),
    "rlvr several": (rlvr_several, ("42", "2", "1000"), "last_number", "RLVR (prompt: messages; answer: ground_truth)"),
}  # fmt: skip


def write(folder, kind, rows, name="rows"):
    file = folder / f"{name}.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_published_shape(tmp_path, kind, name):
    rows, labels, verifier, said = SHAPES[name]
    task = load_task(kind, path=write(tmp_path, kind, rows(*labels)), verifier=verifier)
    several = "rlvr several" == name
    about = ["rows with several labels, any of which is right: 3"] if several else []
    assert task.remarks == tuple(([f"read as {said}"] if said else []) + about)
    prompts = [e.prompt if isinstance(e.prompt, str) else e.prompt[-1]["content"] for e in task.examples]
    assert tuple(prompts) == QUESTION
    assert [e.answer.strip("$") for e in task.examples] == list(labels)
    assert [e.where for e in task.examples] == [f"{tmp_path}/rows.{kind}, row {n}" for n in (1, 2, 3)]
    right = [f"I think so. <answer>{text}</answer>" for text in labels]
    for example, reply in zip(task.examples, right, strict=True):
        assert task.score(reply, example) == 1.0
        for wrong in ("<answer>41</answer>", "<answer></answer>", "no", reply.replace("</a", "+1</a")):
            assert task.score(wrong, example) == 0.0, wrong
    if several:
        assert [task.score(f"It is {text}0", example) for text, example in zip(labels, task.examples, strict=True)] == [
            1.0, 1.0, 1.0
        ]  # fmt: skip


def test_several_labels_in_workers_and_in_the_fingerprint(tmp_path):
    one = table(prompt=question, answer=lambda _, a: [a])
    several = table(prompt=question, answer=lambda _, a: [a, "\\pi", a])
    paths = [write(tmp_path, "jsonl", rows(*LATEX), name) for rows, name in ((one, "one"), (several, "several"))]
    tasks = [load_task("jsonl", path=path, verifier="math_verify") for path in paths]
    assert [len(e.labels) for e in tasks[1].examples] == [2, 2, 2] and tasks[0].remarks == ()
    with Scorer(tasks[1], workers=1, time_limit_s=60) as scorer:
        rewards, _ = scorer.submit(["$\\pi$", "2", "$3$"], tasks[1].examples).result()
    assert rewards.tolist() == [1, 1, 0]
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    streams = [PromptStream(task, tokenizer, num_prompts=1, max_prompt_len=99, seed=0) for task in tasks]
    assert streams[0].fingerprint != streams[1].fingerprint
    assert streams[1].remarks == ["several.jsonl: rows with several labels, any of which is right: 3"]


def test_columns_are_named(tmp_path):
    rows = [{"q": {"text": q}, "a.b": a, "final": {"gold": f"= {a};"}} for q, a in zip(QUESTION, NUMBERS, strict=True)]
    for kind in ("jsonl", "parquet"):
        path = write(tmp_path, kind, rows)
        for answer, answer_from in (("a.b", ""), ("final.gold", "= ([0-9,]+);")):
            task = load_task(
                kind, path=path, verifier="last_number", answer_from=answer_from,
                columns={"prompt": "q.text", "answer": answer},
            )  # fmt: skip
            assert [(e.prompt, e.answer) for e in task.examples] == list(zip(QUESTION, NUMBERS, strict=True))
            assert task.remarks[0].startswith(f"read as rows (prompt: q.text; answer: {answer}")
            assert task.examples[0].meta["final"] == rows[0]["final"]
    # One of the two is named, and the other recognised.
    path = write(tmp_path, "jsonl", verl(*NUMBERS))
    asked = {"columns": {"prompt": "extra_info.question"}}
    assert load_task("jsonl", path=path, verifier="last_number", **asked).examples[0].prompt == QUESTION[0]
    asked = {"columns": {"answer": "extra_info.answer"}, "answer_from": "####"}
    task = load_task("jsonl", path=path, verifier="last_number", **asked)
    assert [e.answer for e in task.examples] == list(NUMBERS) and isinstance(task.examples[0].prompt, tuple)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_names_the_verifier(tmp_path, kind):
    """Replies are scored, and labels checked, by a row's own; the default counts where the column is null."""
    rows = [
        {"question": "a", "answer": "\\frac{1}{2}", "by": {"name": "math_verify"}},
        {"question": "b", "answer": "cat", "by": {"name": "exact_match"}},
        {"question": "c", "answer": "7", "by": {"name": None}},
    ]
    asked = {"path": write(tmp_path, kind, rows), "columns": {"verifier": "by.name"}}
    task = load_task(kind, verifier="last_number", **asked)
    assert [example.verifier for example in task.examples] == ["math_verify", "exact_match", ""]
    assert task.isolated and "exact_match (1), last_number (1), math_verify (1)" in task.remarks[-1]
    with Scorer(task, workers=1, time_limit_s=30.0) as scorer:
        right, wrong = (scorer.submit(said, task.examples).result()[0] for said in (
            ["0.5", "cat", "It is 7"], ["0.6", "a cat", "8"]
        ))
    assert right.tolist() == [1, 1, 1] and wrong.tolist() == [0, 0, 0]
    with pytest.raises(UserError, match="row 3: 'by.name' must be one of .*, not None"):
        load_task(kind, **asked)


@pytest.mark.parametrize(
    ("verifier", "answer", "words"),
    [
        ("math_verfy", "7", "unknown verifier in 'by' 'math_verfy'; the nearest is 'math_verify'"),
        ("task", "7", "unknown verifier in 'by' 'task'"),
        ("last_number", "cat", "the answer 'cat' is not one number"),
        (3, "7", "'by' must be one of"),
    ],
)
def test_a_verifier_that_cannot_be(tmp_path, verifier, answer, words):
    path = write(tmp_path, "jsonl", [{"question": "a", "answer": answer, "by": verifier}])
    with pytest.raises(UserError) as error:
        load_task("jsonl", path=path, verifier="exact_match", columns={"verifier": "by"})
    assert str(error.value).startswith(f"{path}, row 1: ") and words in str(error.value)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"prompt": "questoin"}, "'questoin', which data.columns.prompt names; the nearest is 'question'"),
        ({"answer": "anwser"}, "has no column 'anwser', which data.columns.answer names; the nearest is 'answer'"),
        ({"answer": "extra.golt"}, "'extra.golt', which data.columns.answer names; the nearest is 'extra.gold'"),
        ({"answer": "answer.gold"}, "has no column 'answer.gold', which data.columns.answer names; "),
        ({"prompt": "extra"}, "'extra' must be text, or a list of messages, not {'gold': '1'}"),
        ({"answer": "extra"}, "'extra' must be text or a number, not {'gold': '1'}"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_named_column_that_is_not_there(tmp_path, kind, columns, words):
    path = write(tmp_path, kind, [{"question": "a", "answer": "1", "extra": {"gold": "1"}}])
    with pytest.raises(UserError) as error:
        load_task(kind, path=path, verifier="exact_match", columns=columns)
    assert str(error.value).startswith(f"{path}, row 1: ") and words in str(error.value)


@pytest.mark.parametrize(
    ("how", "text", "found"),
    [
        ("", " a ", " a "),
        ("####", "1 #### 2 #### 3,000 ", "3,000"),
        ("####", "a ###", None),
        ("####", "a #### ", None),
        ("boxed", "\\boxed{1} and \\boxed{\\frac{1}{\\sqrt{2}}}.", "\\frac{1}{\\sqrt{2}}"),
        ("boxed", "$\\boxed{a \\text{ in } \\{1, 2\\}}$", "a \\text{ in } \\{1, 2\\}"),
        ("boxed", "$\\fbox{7}$ is it", "7"),
        ("boxed", "so $x = \\boxed 5$.", "5"),
        ("boxed", "\\boxed{1", None),
        ("boxed", "the box {5}", None),
        ("boxed", "\\boxed{ }", None),
        (r"answer: (\d+)", "answer: 1, answer: 23", "23"),
        (r"answer: (\d+)?", "answer: x", None),
        (r"answer: (\d+)", "x", None),
    ],
)
def test_cut(how, text, found):
    assert cut(text, how) == found


def test_an_expression_that_takes_too_long_is_named(monkeypatch):
    monkeypatch.setattr(shapes, "CUT_LIMIT_S", 0.2)
    with pytest.raises(UserError, match=r"data.answer_from = .* takes more than 0.2 s of one answer"):
        cut("a" * 60 + "!", r"((?:a|aa)+)$")


@pytest.mark.parametrize("seed", range(20))
def test_what_is_boxed_last_is_cut_out_with_its_braces(seed):
    draw = random.Random(seed)

    def maths(depth):
        inside = "".join(draw.choice(["x", "\\frac{1}{2}", "\\{", "\\}", " ", "$"]) for _ in range(draw.randrange(4)))
        return inside + (f"{{{maths(depth - 1)}}}" if depth else "y")

    last = maths(draw.randrange(4)).strip()
    text = f"{{\\boxed{{{maths(2)}}} {maths(1)}}} \\boxed{{{last}}} {maths(1)}"
    assert cut(text, "boxed") == last


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"answer_from": "bxed"}, "'boxed' or a regular expression with one group, but has 0 groups; the nearest"),
        ({"answer_from": "(a)(b)"}, "but has 2 groups"),
        ({"answer_from": "(a"}, "data.answer_from = '(a' is no regular expression: missing ), unterminated"),
        ({"bad_label": "skip"}, "unknown data.bad_label 'skip'; known: drop, error"),
        ({"bad_label": "drp"}, "unknown data.bad_label 'drp'; the nearest is 'drop'"),
    ],
)
def test_settings_that_cannot_be(tmp_path, arguments, words):
    with pytest.raises(UserError) as error:
        load_task("jsonl", path=write(tmp_path, "jsonl", gsm8k(*NUMBERS)), verifier="exact_match", **arguments)
    assert words in str(error.value)


BAD = [
    ({"question": "a", "answer": "no mark"}, "'answer', 'no mark', holds nothing after '####', from which the gold"),
    ({"question": "a", "answer": "#### five"}, "the answer 'five' is not one number"),
    ({"question": "a", "answer": None}, "has no 'answer'"),
    ({"question": "a", "answer": "#### "}, "holds nothing after '####'"),
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_bad_labels_are_refused_or_dropped_and_counted(tmp_path, kind):
    good = gsm8k(*NUMBERS)
    for row, words in BAD:
        path = write(tmp_path, kind, [*good, row])
        with pytest.raises(UserError) as error:
            load_task(kind, path=path, verifier="last_number")
        assert str(error.value).startswith(f"{path}, row 4: ") and words in str(error.value)
    rows = [BAD[0][0], *good, *(row for row, _ in BAD[1:]), good[0]]
    path = write(tmp_path, kind, rows)
    task = load_task(kind, path=path, verifier="last_number", bad_label="drop")
    assert [e.where.split(", ")[-1] for e in task.examples] == ["row 2", "row 3", "row 4", "row 8"]
    assert task.left_out == {"blank": 0, "beyond_size": 0, "bad_label": 4} and task.duplicates == 1
    stream = PromptStream(
        task, load_tokenizer(write_tokenizer(tmp_path / "tokenizer")), num_prompts=1, max_prompt_len=99, seed=0
    )
    assert stream.counts == {
        "examples": 4, "blank": 0, "beyond_size": 0, "bad_label": 4, "skipped": 0, "duplicates": 1
    }  # fmt: skip
    assert stream.rows == len(rows)
    assert stream.remarks == [
        f"rows.{kind}: read as GSM8K (prompt: question; answer: answer after ####)",
        f"rows.{kind}: 4 examples; left out: 4 rows with a label that the verifier could never accept",
        f"rows.{kind}: 1 examples repeat an earlier one's prompt and answer, and are kept",
    ]
    path = write(tmp_path, kind, [BAD[1][0]] * 2)
    with pytest.raises(UserError, match="all 2 rows have bad labels, so nothing is left; .*row 1: the answer 'five'"):
        load_task(kind, path=path, verifier="last_number", bad_label="drop")


def test_labels_that_math_verify_cannot_read_are_dropped(tmp_path):
    rows = math("2", "\\begin{cases}x=1\\\\y=2\\end{cases}", "\\frac12")
    task = load_task("jsonl", path=write(tmp_path, "jsonl", rows), verifier="math_verify", bad_label="drop")
    assert [e.answer for e in task.examples] == ["2", "\\frac12"] and task.left_out["bad_label"] == 1


def test_a_label_that_is_a_list_is_bad_where_one_of_it_is(tmp_path):
    path = write(tmp_path, "jsonl", [{"prompt": "a", "answer": ["1", "x"]}])
    with pytest.raises(UserError, match="row 1: the answer 'x' is not one number"):
        load_task("jsonl", path=path, verifier="last_number")


# --- several files ---


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_folder_and_a_pattern(tmp_path, kind):
    folder = tmp_path / "data"
    (folder / "other").mkdir(parents=True)
    rows = gsm8k(*NUMBERS)
    for number in (1, 0, 10):
        write(folder, kind, rows[: number % 3 + 1], f"train-{number:05}-of-00011")
    write(folder / "other", kind, rows, "more")
    write(folder, kind, rows, ".hidden")
    (folder / "README.md").write_text("no rows")
    order = ((0, 1), (1, 1), (1, 2), (10, 1), (10, 2))
    want = [f"{folder}/train-{n:05}-of-00011.{kind}, row {row}" for n, row in order]
    for path in (str(folder), f"{folder}/train-*", f"{folder}/train-000??-of-00011.{kind}"):
        task = load_task(kind, path=path, verifier="last_number")
        assert [e.where for e in task.examples] == want and task.name.endswith("(3 files)")
    assert task.duplicates == 3
    assert len(load_task(kind, path=f"{folder}/**/*.{kind}", verifier="last_number").examples) == 8
    for size in range(1, 6):
        task = load_task(kind, path=str(folder), verifier="last_number", size=size)
        assert [e.where for e in task.examples] == want[:size] and task.left_out["beyond_size"] == 5 - size
    nested = tmp_path / "nested"
    nested.mkdir()
    folder.rename(nested / "data")
    assert len(load_task(kind, path=str(nested), verifier="last_number").examples) == 8


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_folders_that_are_refused(tmp_path, kind):
    rows = gsm8k(*NUMBERS)
    with pytest.raises(UserError, match=rf"the folder .* holds no \*.{kind}, and no folder inside does"):
        load_task(kind, path=str(tmp_path), verifier="last_number")
    with pytest.raises(UserError, match="there is no file .*a pattern such as DIR/train-"):
        load_task(kind, path=f"{tmp_path}/*.{kind}", verifier="last_number")
    write(tmp_path, kind, rows, "train")
    write(tmp_path, kind, rows, "test")
    with pytest.raises(UserError, match="several splits, such as 'test.*' and 'train.*'; name the files of one by a"):
        load_task(kind, path=str(tmp_path), verifier="last_number")
    assert len(load_task(kind, path=f"{tmp_path}/tr*.{kind}", verifier="last_number").examples) == 3


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("second", "words"),
    [
        (math_500(*NUMBERS), "row 1: has no 'question', but the rows are read as GSM8K (prompt: question; answer: "),
        (table(prompt=question, answer=label)(*NUMBERS), "row 1: has no 'question', but the rows are read as GSM8K"),
        ([{"question": "a", "solution": "1"}], "row 1: has no 'answer', but the rows are read as GSM8K"),
        ([{"question": 5, "answer": "#### 1"}], "row 1: 'question' must be text, or a list of messages, not 5"),
        ([{"question": [{"from": "human", "value": "a"}], "answer": "#### 1"}], "message 1: has 'from' and 'value'"),
    ],
)
def test_files_of_different_shapes(tmp_path, kind, second, words):
    write(tmp_path, kind, gsm8k(*NUMBERS), "1")
    file = write(tmp_path, kind, second, "2")
    with pytest.raises(UserError) as error:
        load_task(kind, path=str(tmp_path), verifier="last_number")
    assert str(error.value).startswith(f"{file}, row ") and words in str(error.value), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


GOOD = json.dumps(gsm8k(*NUMBERS)[0]).encode()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (b"", " holds no rows"),
        (b"\n\n", " holds no rows"),
        (GOOD[:-9], ", row 1: broken JSON"),
        (GOOD + b"\n" + GOOD.replace(b"sold", b"s\xe9ld"), ", row 2 is not UTF-8 text"),
        (GOOD + b"\n" + GOOD.decode().encode("utf-16"), ", row 2 is not UTF-8 text"),
        (GOOD + b"\n" + GOOD.replace(b"sold", b"\\udc00"), ", row 2: a lone surrogate, \\udc00"),
        (GOOD + b"\n" + GOOD.replace(b"{", b'{"n": ' + b"9" * 10_000 + b", "), ", row 2: Exceeds the"),
        (GOOD + b"\n" + GOOD.replace(b"42", b"4" * 10_000 + b" 2"), ", row 2: the answer '444"),
        (GOOD + b"\n" + b'{"question": "a"}', ", row 2: has no 'answer', but the rows are read as GSM8K"),
        (GOOD + b"\n" + b'{"question": "a", "answer": {"b": 1}}', ", row 2: 'answer' must be text or a number, not {"),
        (GOOD + b"\n" + b'{"question": "a", "answer": true}', ", row 2: 'answer' must be text or a number, not True"),
        (b'{"text": "a", "label": 1}', ", row 1: has neither of 'prompt' and 'messages', of which it needs one; keys"),
        (b'{"question": "a", "label": 1}', ", row 1: has no 'answer'; keys: ['label', 'question']; another column is"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "has no 'answer'"),
    ],
)
def test_bad_files_of_rows(tmp_path, lines, words):
    write(tmp_path, "jsonl", gsm8k(*NUMBERS), "1")
    file = tmp_path / "2.jsonl"
    file.write_bytes(lines)
    alone = lines.startswith((b'{"text', b'{"question": "a", "l', b'{"mess'))
    with pytest.raises(UserError) as error:
        load_task("jsonl", path=str(file if alone else tmp_path), verifier="last_number")
    assert str(error.value).startswith(str(file)) and words in str(error.value), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_number_of_10000_digits_is_a_label(tmp_path):
    path = write(tmp_path, "jsonl", [{"question": "a", "answer": "#### " + "7" * 10_000}])
    (example,) = load_task("jsonl", path=path, verifier="last_number").examples
    assert example.answer == "7" * 10_000


def test_bad_tables_beside_good_ones(tmp_path):
    write(tmp_path, "parquet", gsm8k(*NUMBERS), "1")
    file = tmp_path / "2.parquet"
    whole = (tmp_path / "1.parquet").read_bytes()
    for content in (b"", whole[:-10], whole[: len(whole) // 2], b"PAR1" + whole, b"no table"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"^{file} cannot be read as parquet: "):
            load_task("parquet", path=str(tmp_path), verifier="last_number")
    pyarrow.parquet.write_table(pyarrow.table({"question": [], "answer": []}), file)
    with pytest.raises(UserError, match=f"^{file} holds no rows"):
        load_task("parquet", path=str(tmp_path), verifier="last_number")
    pyarrow.parquet.write_table(pyarrow.table({"question": [1], "answer": ["#### 1"]}), file)
    with pytest.raises(UserError, match=f"^{file}, row 1: 'question' must be text, or a list of messages, not 1"):
        load_task("parquet", path=str(tmp_path), verifier="last_number")

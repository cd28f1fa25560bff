"""Which part of a reply is the answer, and labels in every form that data sets hold them in."""

import json
import random
import re

import pytest

from dppo_jax.data.examples import Example
from dppo_jax.data.tasks import load_task
from dppo_jax.errors import UserError
from dppo_jax.rewards.answers import answer_task
from dppo_jax.rewards.labels import answer_faults
from dppo_jax.rewards.maths import last_box, same_text
from dppo_jax.rewards.notation import in_base, is_text, plain_latex, with_ldots
from dppo_jax.rewards.scorer import Scorer
from dppo_jax.rewards.verifiers import exact_match, extract_answer, last_number


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (" 7\n", "7"),
        ("", ""),
        ("<answer>7</answer>", "7"),
        ("<answer>5</answer> no: <answer> 7 </answer>!", "7"),
        ("<answer>7</answer> <answer>8", "7"),
        ("<answer>7", "<answer>7"),
        ("7</answer>", "7</answer>"),
        ("<answer>7</answer></answer>", "7"),
        ("<answer>5 <answer>7</answer>", "7"),
        ("<answer></answer>", ""),
        ("<think>2+3=5</think><answer>7</answer>", "7"),
        ("<think>2+3=5</think> 7", "7"),
        ("<think><answer>5</answer></think> 7", "7"),
        ("<think><answer>5</answer></think><answer>7</answer>", "7"),
        ("<answer>7</answer><think>or <answer>5</answer></think>", "7"),
        ("2+3=5</think> 7", "7"),  # the prompt opened the thought
        ("<answer>5</answer></think><answer>7</answer>", "7"),
        ("7 <think>but 5", "7"),
        ("<think>2+3=5", ""),
        ("<think><answer>5</answer>", ""),
        ("<think>a<think>b</think>7", "7"),
        ("<think>a</think>6<think>b</think>7", "7"),
        ("<think>5</think>6<think>4</think>\n", "6"),
        ("<answer>5<think>6</think>7</answer>", "7"),
        ("<answer>5<think>6</think></answer> 8", "5"),
        ("<ans<think>6</think>wer>7</answer>", "wer>7</answer>"),
        ("<think>a</think>6<think>b</think>7<think>8", "7"),
        ("<think></think>", ""),
        ("<answer><think>5</think>7</answer>", "7"),
        ("</think></think>7", "7"),
        ("<THINK>5</Think>7", "7"),
        ("<thinking>5</thinking>7", "7"),
        ("<Thought>5</thought>7", "7"),
        ("<thin\u212a>5</thin\u212a>7", "<thin\u212a>5</thin\u212a>7"),  # the Kelvin sign is no k
        ("<Answer>7</ANSWER>!", "7"),
        ("7\0", "7\0"),
        ("<thinks>5</thinks>7", "<thinks>5</thinks>7"),
    ],
)
def test_extract_answer(reply, answer):
    assert extract_answer(reply) == answer


@pytest.mark.parametrize("verifier", [exact_match, last_number])
def test_a_thought_is_not_scored(verifier):
    for reply in ("<think>2+3=5</think><answer>7</answer>", "<think>2+3=5</think>7", "2+3=5</think>7"):
        assert verifier(reply, "7") == 1 and verifier(reply, "5") == 0
    assert verifier("<answer>7</answer> <think>2+3=5</think>", "7") == 1
    assert verifier("<think>7", "7") == 0


@pytest.mark.parametrize("verifier", ["exact_match", "math_verify", "last_number"])
def test_a_label_with_tags_is_refused_since_no_reply_could_match_it(tmp_path, verifier):
    file = tmp_path / "rows.jsonl"
    for label in ("<answer>7</answer>", "<think>3</think>7", "7</think>", "<think>x", "<Thinking>3</thinking> 7"):
        file.write_text("\n".join(json.dumps({"prompt": "a", "answer": answer}) for answer in ("7", label)))
        with pytest.raises(UserError) as error:
            load_task("jsonl", path=str(file), verifier=verifier)
        assert str(error.value).startswith(f"{file}, row 2: the answer {label!r} ")
        assert verifier == "last_number" or "holds a tag such as <answer>" in str(error.value)
    for label in ("a < b", "<answer>", "7 <b>", "</answer>"):
        file.write_text(json.dumps({"prompt": "a", "answer": label}))
        assert exact_match(label, label) == 1
        assert load_task("jsonl", path=str(file), verifier="exact_match")


def test_long_replies_of_tags_are_read_in_linear_time():
    """Each would take hours with a regular expression that looks back."""
    for part in (
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "<answer></answer>",
        "<think></think>",
        "<answer><think>",
        "<Thinking>7</thinking>",
    ):
        assert extract_answer(part * 200_000 + "7").endswith(("7", ""))
    assert last_box("\\boxed{" * 200_000) is None
    assert last_box("\\boxed{" * 200_000 + "7}") == "7"


def test_long_labels_and_replies_are_rewritten_in_linear_time():
    """Each would take hours with two stars that can share the same characters."""
    for part in (
        "1",
        "5 ",
        "5 aaaa ",
        "5 dollars ",
        "}",
        "aa ",
        "\\sin 1",
        "1,",
        "1_",
        "^\\circ ",
        "\\text{1",
        "A",
        "0.",
        "=",
    ):
        for text in (part * 30_000, part * 30_000 + "!", "\\text{" + part * 30_000, "0." + part * 30_000 + "..."):
            for rewrite in (plain_latex, in_base, is_text, lambda text: same_text(text, text), with_ldots):
                rewrite(text)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("7", None),
        ("\\boxed{7}", "7"),
        ("\\boxed {7}", "7"),
        ("\\boxed{5} and \\boxed{7}", "7"),
        ("$\\boxed{5}$, then $\\boxed{\\frac{1}{2}}$ {x}", "\\frac{1}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{1,2\\right.}", "\\left\\{1,2\\right."),
        ("\\boxed{7} and \\boxed{8", "7"),
        ("} \\boxed{7} {", "7"),
        ("\\boxed{x=\\boxed{7}}", "x=\\boxed{7}"),
        ("\\boxed{50}\\%", "50\\%"),
        ("\\boxed{50} %", "50\\%"),
        ("\\boxed{}", ""),
    ],
)
def test_last_box(text, box):
    assert last_box(text) == box


# Labels as data sets of mathematics write them, each with its value in another form.
LABELS = {
    "\\$36": "36",
    "\\$18.90": "18.9",
    "\\$32,\\!348": "32348",
    "$36": "36",
    "$1,234.50": "1234.5",
    "\u00a35": "5",
    "\u20ac10": "10",
    "x^2\n": "x \\cdot x",
    "\\[\\frac{1}{2}\\]": "0.5",
    "\\(3\\)": "3",
    "$$5$$": "5",
    "$7$": "7",
    "\\boxed{7}": "7",
    "**42**": "42",
    "`42`": "42",
    " 42. ": "42",
    "\\text{Evelyn}": "\\textbf{Evelyn}",
    "Monday": "\\text{Monday}",
    "\\text{even}": "even",
    "\\text{(B)}": "B",
    "(B)": "\\text{B}",
    "\\textbf{(C)}": "C",
    "True": "true",
    "50\\%": "\\frac{1}{2}",
    "50%": "0.5",
    "12.5\\%": "\\frac{1}{8}",
    "90^\\circ": "90",
    "90^{\\circ}": "90",
    "45\u00b0": "45",
    "[1,2)": "\\left[1,2\\right)",
    "(-\\infty,3]": "(-\\infty, 3]",
    "(-\\infty,-2)\\cup(2,\\infty)": "(-\\infty, -2) \\cup (2, \\infty)",
    "\\{1,2,3\\}": "\\{3,2,1\\}",
    "(1,2,3)": "\\left( 1, 2, 3 \\right)",
    "\\left(\\frac{1}{2},-3\\right)": "(0.5, -3)",
    "1,2,3": "3, 2, 1",
    "3 \\text{ or } 4": "4, 3",
    "$3$ and $4$": "3, 4",
    "\\pm 2": "2, -2",
    "\\emptyset": "\\emptyset",
    "\\mathbb{R}": "\\mathbb{R}",
    "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}": "\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}",
    "\\begin{pmatrix} 1 \\\\ \n 2 \\end{pmatrix}": "\\begin{pmatrix}1\\\\2\\end{pmatrix}",
    "5\\text{ cm}": "5",
    "10 \\text{ mph}": "10",
    "6\\pi\\text{ cm}^2": "6\\pi",
    "2,500\\text{ dollars}": "2500",
    "\\dfrac{3}{4}": "0.75",
    "\\tfrac{1}{2}": "\\frac{2}{4}",
    "\\frac34": "\\frac{3}{4}",
    "1\\frac{3}{4}": "\\frac{7}{4}",
    "-1\\frac{3}{4}": "-\\frac{7}{4}",
    "3 1/2": "\\frac{7}{2}",
    "-3 1/2": "-3.5",
    "-3/4": "-0.75",
    "\u00bd": "0.5",
    "1,234": "1234",
    "10,\\!000": "10000",
    "100\\,000": "100000",
    "1{,}234": "1234",
    "1\u202f234": "1234",
    "10 000": "10000",
    ".5": "\\frac12",
    "4.0": "4",
    "-5": "-5.0",
    "\u22125": "-5",
    "0.\\overline{3}": "\\frac{1}{3}",
    "0.1\\overline{6}": "\\frac{1}{6}",
    "0.\\bar{3}": "\\frac13",
    "2.\\overline{45}": "\\frac{27}{11}",
    "1e5": "100000",
    "1e-3": "0.001",
    "6.02\\times 10^{23}": "6.02 \\cdot 10^{23}",
    "2^{10}": "1024",
    "2^8 \\cdot 3": "768",
    "5!": "120",
    "\\binom{5}{2}": "10",
    "\\sqrt2": "\\sqrt{2}",
    "3\\sqrt{13}": "\\sqrt{117}",
    "\\sqrt[3]{8}": "2",
    "\\pi": "\\frac{2\\pi}{2}",
    "\u03c0/2": "\\frac{\\pi}{2}",
    "\\log_2 8": "3",
    "\\sin x": "\\sin(x)",
    "e^{x}": "e^x",
    "2+3i": "3i+2",
    "\\infty": "\\infty",
    "x=3": "3",
    "y = 2x+1": "y=1+2x",
    "x \\in [-2,7]": "x \\in [-2, 7]",
    "x<3": "x < 3",
    "1\\le x\\le 2": "1 \\leq x \\leq 2",
    "(x-1)(x+2)": "x^2+x-2",
    "\\frac{x+2}{7}": "\\frac{2+x}{7}",
    "|x|": "|x|",
    "5 dollars": "5",
    "36 dollars": "36",
    "$5 USD": "5",
    "5 euros": "5 \\text{ euros}",
    "5 sides": "5",
    "5 cm^2": "5",
    "60 miles per hour": "60",
    "3\\sqrt{2} square units": "\\sqrt{18}",
    "\\text{5 dollars}": "5",
    "1.5 \\text{ million}": "1500000",
    "2 dozen": "24",
    "50 percent": "0.5",
    "\\boldsymbol{5}": "5",
    "\\mathbf{\\frac{1}{2}}": "0.5",
    "\\textcolor{red}{5}": "5",
    "US$5": "5",
    "US\\$5": "5",
    "5\u20ac": "5",
    "1_000": "1000",
    "-1_234_567.5": "-1234567.5",
    "\\sin 30^\\circ": "\\frac{1}{2}",
    "\\cos(60^{\\circ})": "0.5",
    "100,200": "100200",
    "0.333...": "\\frac{1}{3}",
    "0.1666\\ldots": "\\frac{1}{6}",
    "\\varnothing": "\\emptyset",
    "\\{\\}": "\\varnothing",
    "= 5": "5",
    "Infinity": "\\infty",
    "2pi": "2\\pi",
    "theta": "\\theta",
    "log(2)": "\\log 2",
    "-inf": "-\\infty",
    "CAT": "\\text{CAT}",
    "C, A, B": "C,A,B",
    "\\text{June 20}": "June 20",
    "1010_2": "1010_{2}",
    "4210_{5}": "4210",
    "1010_{\\text{two}}": "1010_2",
    "A1_{16}": "a1_{16}",
}


def in_forms(value: str) -> list[str]:
    return [
        value,
        f"It is 3 or so. Hence \\boxed{{{value}}}.",
        f"First \\boxed{{77}}, then \\boxed{{{value}}}",
        f"So we get ${value}$.",
        f"<answer>{value}</answer>",
        f"<think>99 or \\boxed{{98}}</think><answer>${value}$</answer>",
        f"<think>99</think>\\boxed{{{value}}}",
        f"**{value}**",
    ]


@pytest.fixture(scope="module")
def maths():
    with Scorer(answer_task("maths", (), "math_verify"), workers=2, time_limit_s=60) as scorer:
        yield scorer


@pytest.mark.slow
def test_every_label_accepts_the_right_reply_in_every_form(maths):
    pairs = [(reply, label) for label, value in LABELS.items() for reply in in_forms(value)]
    plain = [(f"<answer>{label}</answer>", label) for label in LABELS] + [(label, label) for label in LABELS]
    wrong = [(reply, label) for label in LABELS for reply in [*in_forms("987654"), "\\boxed{z+1}", "$\\text{Rome}$"]]
    asked = pairs + plain + wrong
    rewards, counts = maths.submit([r for r, _ in asked], [Example("", label) for _, label in asked]).result()
    expected = [1] * len(pairs + plain) + [0] * len(wrong)
    missed = [pair for pair, reward, right in zip(asked, rewards, expected, strict=True) if reward != right]
    assert len(LABELS) >= 60 and missed == []
    assert sum(counts.values()) == 0


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("<think>2+3=5</think><answer>7</answer>", "7", 1),
        ("<think>2+3=5</think><answer>7</answer>", "5", 0),
        ("\\boxed{5} no, \\boxed{7}", "7", 1),
        ("\\boxed{5} no, \\boxed{7}", "5", 0),
        ("$\\boxed{5}$ and $\\boxed{7}$", "7", 1),
        ("$\\boxed{5}$ and $\\boxed{7}$", "5", 0),
        ("x^2", "2", 0),
        ("It is 42 apples", "42", 1),
        ("The answer is \\$36.", "\\$36", 1),
        ("The answer is x^2 + 1", "x^2+1", 1),
        ("The answer is Evelyn.", "\\text{Evelyn}", 1),
        ("The answer is Evelyn.", "\\text{Monday}", 0),
        ("50", "50\\%", 1),
        ("\\boxed{50", "7", 0),
    ],
)
def test_what_math_verify_reads_of_a_reply(maths, reply, answer, score):
    rewards, _ = maths.submit([reply], [Example("", answer)]).result()
    assert rewards.tolist() == [score]


DRESSED = """\\boldsymbol{5}  5 dollars  = 5  \\approx 5  \\large 5  \\underline{5}  ~5  \\bf 5  \\displaystyle 5
    \\color{red}5  \\textcolor{blue}{5}  \\bm{5}  \\fbox{5}  \\underline{\\underline{5}}
    \\quad 5  5\\;  {5}  \\mathbf{5}
    5 sides  \\hspace{1em}5  US\\$5  5 USD  \\implies 5  5 cm^2  5 miles per hour  x = 5 dollars
    \\text{5 dollars}  5 per hour"""


def test_a_number_in_any_dress(maths):
    replies = [reply.strip() for reply in re.split("  +|\n", DRESSED) if reply.strip()]
    replies = [form for reply in replies for form in (f"\\boxed{{{reply}}}", f"Hence ${reply}$.")]
    for label in ("5", "6"):
        rewards, _ = maths.submit(replies, [Example("", label)] * len(replies)).result()
        assert [reply for reply, reward in zip(replies, rewards, strict=True) if reward != (label == "5")] == []


@pytest.mark.parametrize(
    ("label", "wrong"),
    [
        ("1010_2", ["1010_3", "1010_{16}", "1011_2", "1010_{three}", "10", "12_8"]),
        ("4210_5", ["4210_6", "4210_{50}", "421_5", "555"]),
        ("CAT", ["ACT", "TAC", "CA", "C, A, T"]),
        ("AB", ["BA", "A, B"]),
        ("C, A, B", ["A, B, C", "CAB", "C, A"]),
        ("A and B", ["B and A"]),
        ("Monday", ["Mondya"]),
        ("yes", ["sey", "no"]),
        ("5 million", ["5"]),
        ("2 dozen", ["2"]),
        ("1_000", ["1", "0"]),
        ("\\sin 30^\\circ", ["\\sin 30", "30"]),
        ("5 dollars", ["6 dollars", "50"]),
        ("0.333...", ["0.3", "0.334"]),
    ],
)
def test_letters_bases_and_scales_that_differ(maths, label, wrong):
    replies = [form for text in wrong for form in (text, f"\\boxed{{{text}}}", f"The answer is ${text}$.")]
    rewards, _ = maths.submit([*replies, label], [Example("", label)] * (len(replies) + 1)).result()
    assert [reply for reply, reward in zip(replies, rewards, strict=False) if reward] == []
    assert rewards[-1] == 1


@pytest.mark.parametrize("label", ["abc", "xy", "2xyz", "mgh"])
def test_products_of_letters_are_no_words(maths, label):
    reply = "".join(sorted(label, key=lambda sign: (not sign.isdigit(), -ord(sign))))
    rewards, _ = maths.submit([f"\\boxed{{{reply}}}"], [Example("", label)]).result()
    assert reply != label and rewards.tolist() == [1]


def test_what_math_verify_takes_for_equal(maths):
    """Left as the library has it: digits rounded, per cent, and the last side of an equation."""
    pairs = [("3.14159265", "\\pi"), ("\\boxed{1000\\%}", "10"), ("\\boxed{6=5}", "5")]
    rewards, _ = maths.submit([reply for reply, _ in pairs], [Example("", label) for _, label in pairs]).result()
    assert rewards.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("3.14159...", "has no exact value"),
        ("2.718\\ldots", "has no exact value"),
        ("5 dollars and 20 cents", "holds the word 'dollars' beside mathematics"),
        ("1 hour 30 minutes", "holds the word 'hour'"),
        ("5 less than x", "holds the word 'less'"),
    ],
)
def test_labels_that_no_reply_could_equal_are_refused(label, words):
    assert words in answer_faults("math_verify", [label])[0]
    assert answer_faults("exact_match", [label]) == [None]


UNREADABLE = ["\\boxed{}", "$$", "\\", "x \\equiv 3 \\pmod{7}", "\\begin{cases}x=1\\\\y=2\\end{cases}", "\\{x | x>2\\}"]


def test_labels_that_cannot_be_read_are_refused_with_their_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    for label in UNREADABLE:
        rows = [{"prompt": "a", "answer": "\\frac{1}{2}"}, {"prompt": "b", "answer": label}]
        file.write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(UserError) as error:
            load_task("jsonl", path=str(file), verifier="math_verify")
        assert str(error.value).startswith(f"{file}, row 2: the answer {label!r} holds no mathematics")
        assert load_task("jsonl", path=str(file), verifier="exact_match")


def test_a_label_that_hangs_does_not_hang_the_start(monkeypatch):
    monkeypatch.setattr("dppo_jax.rewards.labels.TIME_LIMIT_S", 2.0)
    faults = answer_faults("math_verify", ["9^{9^{9^9}}", "5", "\\frac12", "9^{9^{9^9}}"])
    assert faults[1:3] == [None, None] and faults[0] == faults[3]
    assert faults[0].startswith("takes math-verify more than 2 seconds")


def test_a_reasoning_gym_label_is_read_too():
    with pytest.raises(UserError, match="reasoning-gym 'modulo_grid', item 0: the answer .* holds no mathematics"):
        load_task("reasoning_gym", name="modulo_grid", size=2, seed=1, verifier="math_verify")
    assert load_task("reasoning_gym", name="products", size=2, seed=1, verifier="math_verify")


def test_readable_labels_load_in_bulk(tmp_path):
    draw = random.Random(0)
    labels = [*LABELS, *(str(draw.randint(-999, 999)) for _ in range(5000))]
    labels += [f"\\frac{{{draw.randint(1, 999)}}}{{{draw.randint(2, 999)}}}" for _ in range(5000)]
    assert answer_faults("math_verify", labels) == [None] * len(labels)

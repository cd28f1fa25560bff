"""Wrong answers made from right ones, to ask of a data set's own scorer whether it tells them apart."""

import re
from collections.abc import Iterator

NONSENSE = "I do not know."

# Sets whose questions have several right answers, so that another text may be right.
SEVERAL_ANSWERS = frozenset(
    {
        "boxnet",
        "codeio",
        "countdown",
        "cryptarithm",
        "graph_color",
        "intermediate_integration",
        "jugs",
        "kakurasu",
        "knight_swap",
        "n_queens",
        "palindrome_generation",
        "polynomial_multiplication",
        "propositional_logic",
        "puzzle24",
        "quantum_lock",
        "rubiks_cube",
        "rush_hour",
        "shortest_path",
        "simple_integration",
        "sokoban",
        "tower_of_hanoi",
        "word_ladder",
    }
)
GIVEN_NUMBERS = frozenset({"countdown", "puzzle24"})  # an expression in other numbers than the question's is wrong

_NUMBER = re.compile(r"(?:(?<![^\s(\[,;:=])-)?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?")
_OPPOSITES = {"True": "False", "False": "True", "Yes": "No", "No": "Yes"}
_FAR = 0.1  # relative: scorers may round, and need not agree on the last digits


def wrong_answers(name: str, label: str | None, other_label: str | None) -> Iterator[str]:
    """Texts that are certainly wrong where the data set `name` has this label (None: it gives none).

    other_label: another item's label, or None. What may be the same answer in another form is left out.
    """
    yield from (text for text in (NONSENSE, "nan", "inf", "-inf") if label is None or says_other(text, label))
    if label is None:
        return
    if label.strip():
        yield from _denied(label)
    if numbers(label):
        yield from (text for text in ("0", "") if says_other(text, label))
    elif label.strip():
        yield ""
    if name in GIVEN_NUMBERS and other_label is not None and sorted(numbers(other_label)) != sorted(numbers(label)):
        yield other_label
    if name in SEVERAL_ANSWERS:
        return
    changed = {label[:-1], label[1:], label[: len(label) // 2], _digit_changed(label), _OPPOSITES.get(label, "")}
    if other_label is not None:
        changed.add(other_label)
    if _NUMBER.fullmatch(label):
        changed |= {label.lstrip("-") if label.startswith("-") else f"-{label}", label + label}
    elif label.isalpha():
        changed.add(label + label)
    yield from sorted(text for text in changed if text.strip() and says_other(text, label))


def _denied(label: str) -> Iterator[str]:
    """The label with something about it that makes it another answer, or none, in whatever set.

    This is the one rule on words about an answer: a scorer that finds the answer in prose is refused too, since it
    takes a denial for the answer. Signs and digits are set only where they touch no number whose value scorers may
    round, and no algebra.
    """
    yield from (f"not {label}", f"{label} is wrong", f"{label} ago", f"{label} No, that is false.")
    yield from (f"{label} banana", f"{label}, banana", f"{label}\nbanana", f"banana\n{label}", f"banana, {label}")
    if label.replace(" ", "").isalpha() or "\n" in label or "\u2192" in label:
        yield from (f"-{label}", f"1{label}")
    if not label[-1].isdigit():
        yield f"{label}1"
    negated = re.sub(r"(?<![\w.-])(?=\d)", "-", label)
    if "\n" in label and says_other(negated, label):
        yield negated


def says_other(text: str, label: str) -> bool:
    """Whether the text certainly answers something else: other numbers; or, without any, other letters, or signs."""
    expected = numbers(label)
    if expected:
        actual = numbers(text)
        return len(actual) != len(expected) or any(map(_far, actual, expected))
    letters = _letters(label)
    return _letters(text) != letters if letters else "".join(text.split()) != "".join(label.split())


def numbers(text: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(text)]


def _far(actual: float, expected: float) -> bool:
    return not abs(actual - expected) <= _FAR * max(abs(actual), abs(expected))


def _letters(text: str) -> str:
    return "".join(filter(str.isalpha, text.casefold()))


def _digit_changed(label: str) -> str:
    """The first digit that is not 0 is another one."""
    return re.sub("[1-9]", lambda digit: str((int(digit[0]) + 4) % 9 + 1), label, count=1)

"""Mathematics in text, as sympy expressions, by the library math-verify. Reward workers import this, so no jax here."""

import logging
import re
from typing import Any

from dppo_jax.rewards import notation
from dppo_jax.rewards.extract import last_box as last_box

_DELIMITER = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")
_DOLLAR = re.compile(r"(?<!\\)\$")
_PAIRS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("``", "``"), ("`", "`"))
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_NO_WORD = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_WORD = re.compile("[a-zA-Z]{2}")
_MATHS = re.compile(r"(?<!\\)\$((?:\\.|[^$\\\n])+)\$")
_SAID = re.compile(r"answer\s*(?:is|:)\s*:?([^\n]{1,300})$", re.IGNORECASE)
_COMMA = re.compile(r"\s*,\s*")
_LAST_BASED = re.compile(r"(?<![\w.])\w{1,300}(?:\{\d+\})?$")
_NESTED = 4  # delimiters around delimiters that are taken off
_LONGEST = 300  # characters of a reply that may be read as one expression without delimiters

# What math-verify reads as something else, or not at all, written so that it can.
_REWRITE = (
    (re.compile(r"(-?)\s*[\u00a3\u20ac\u00a5\u20b9]\s*(?=[\d.])"), r"\1"),  # currencies but the dollar
    (re.compile(r"(-?\d+)\s+(\d+)\s*/\s*(\d+)$"), r"\1\\frac{\2}{\3}"),  # 3 1/2
    (re.compile(r"(-?(?:\d+\.?\d*|\.\d+))[eE]([+-]?\d{1,3})$"), r"\1\\times 10^{\2}"),  # 1e5
)
_THOUSANDS = re.compile(r"(?<=\d)(?:,?\\[,;:! ]|\{,\}|[\u2009\u202f\u00a0])(?=\d{3}(?!\d))")
_SPACED = re.compile(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?")  # 10 000
_REPEATING = re.compile(r"(\d{0,50})\.(\d{0,50})\\(?:overline|bar|dot)\s*(?:\{(\d{1,50})\}|(\d))$")  # 0.1\overline{6}
_SYMBOLS = str.maketrans(
    {
        "\u2212": "-",
        "\u00b0": "^\\circ ",
        "\u03c0": "\\pi ",
        "\u221e": "\\infty ",
        "\u00d7": "\\times ",
        "\u00b7": "\\cdot ",
        "\u2264": "\\le ",
        "\u2265": "\\ge ",
        "\u222a": "\\cup ",
        "\u00bd": "\\frac{1}{2}",
        "\u00bc": "\\frac{1}{4}",
        "\u00be": "\\frac{3}{4}",
    }
)


def read(text: str) -> list[Any]:
    """The expression that the whole text is, with or without its delimiters: [expression, its LaTeX], or [].

    Without a time limit: sympy may work for years on a tower of powers.
    """
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, MatrixBase

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    text = _rewritten(bare(text))
    if not text or notation.goes_on(text):
        return []
    wrapped = text if _DELIMITER.search(text) else f"${text} $" if text.endswith("\\") else f"${text}$"
    expressions = parse(wrapped, [LatexExtractionConfig()], parsing_timeout=None)
    return expressions if any(isinstance(expression, Basic | MatrixBase) for expression in expressions) else []


def read_reply(text: str) -> list[Any]:
    """The last \\boxed of a reply, or the expression that it is, or else what math-verify finds in its prose."""
    from math_verify import parse

    boxed = last_box(text)
    if boxed is not None:
        return read(boxed)
    for passage in (text, said_last(text)):
        if _is_expression(passage):
            expressions = read(passage)
            if expressions:
                return expressions
    if "$" in text.replace("\\$", ""):
        text = _MATHS.sub(lambda maths: f"${_rewritten(maths[1])}$", text)
    else:
        text = _THOUSANDS.sub("", text.replace("\\$", "").replace("`", " ").replace("\u2212", "-"))
    return parse(text, parsing_timeout=None)


def said_last(text: str) -> str:
    """What follows "the answer is" in the last line; "" without it."""
    match = _SAID.search(text[text.rfind("\n") + 1 :][-1000:])
    return match[1] if match else ""


def same_text(text: str, answer: str) -> bool:
    """Whether both are the same words or signs, delimiters, \\text, upper case and spaces at commas aside."""
    outer = "()" if is_text(answer) else ""
    expected = _plain(answer).casefold().strip(outer)
    return bool(expected) and any(_plain(candidate).casefold().strip(outer) == expected for candidate in _answers(text))


def is_text(answer: str) -> bool:
    """Whether the label is compared as text only, since its letters are words or choices and no factors."""
    return notation.is_text(_plain(answer).strip("()"))


def base_of(answer: str) -> tuple[str, int] | None:
    """Digits and base of a label such as 1010_2, which math-verify reads without its base; or None."""
    return notation.in_base(_plain(answer))


def same_in_base(text: str, digits: str, base: int) -> bool:
    """Whether a reply gives the digits in this base, or without any."""
    candidates = [_plain(candidate) for candidate in _answers(text)]
    if last_box(text) is None:
        candidates += _LAST_BASED.findall(text.rstrip("$.*` \n)"))
    return any(candidate.upper() == digits or notation.in_base(candidate) == (digits, base) for candidate in candidates)


def label_fault(answer: str) -> str | None:
    """Why no reply could equal the label, as far as its words and dots tell; the end of a sentence."""
    if is_text(answer) or base_of(answer):
        return None
    return notation.fault(_rewritten(bare(answer)))


def _answers(text: str) -> list[str]:
    """What may be the reply's answer: its last box, or else all of it, what it says last, and its last mathematics."""
    boxed = last_box(text)
    return [boxed] if boxed is not None else [text, said_last(text), *_MATHS.findall(text)[-1:]]


def _plain(text: str) -> str:
    return _COMMA.sub(",", _TEXT.sub(r"\1", bare(text)))


def bare(text: str) -> str:
    """The text without the delimiters, bold or code marks, \\boxed and full stop that enclose all of it."""
    text = notation.with_ldots(" ".join(_THOUSANDS.sub("", text).split()))
    text = text.rstrip("\\").rstrip()
    for _ in range(_NESTED):
        before = text
        if text.endswith((".", ",", ";")) and not text.endswith(("\\right.", "\\,", "\\;")):
            text = text[:-1].rstrip()
        for left, right in _PAIRS:
            inside = text[len(left) : -len(right)]
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
                if left not in inside.replace("\\$", "") and not inside.endswith("\\"):
                    text = inside.strip()
                    break
        if text.startswith("\\boxed") and text.endswith("}") and text.count("\\boxed") == 1:
            text = (last_box(text) or text).strip()
        if text == before:
            break
    return text


def _rewritten(text: str) -> str:
    text = notation.plain_latex(text.translate(_SYMBOLS))
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    if len(_DOLLAR.findall(text)) == 1:  # a price
        text = _DOLLAR.sub(r"\\$", text)
    for pattern, better in _REWRITE:
        match = pattern.match(text)
        if match:
            text = match.expand(better) + text[match.end() :]
    return _REPEATING.sub(_fraction, text)


def _fraction(match: re.Match) -> str:
    """0.1\\overline{6} is 15/90."""
    integer, fixed, repeated = match[1], match[2], match[3] or match[4]
    numerator = int(f"0{integer}{fixed}{repeated}") - int(f"0{integer}{fixed}")
    return f"\\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


def _is_expression(text: str) -> bool:
    """Whether a reply without \\boxed is one short expression, and no prose."""
    text = bare(text)
    return (
        0 < len(text) <= _LONGEST
        and not _DELIMITER.search(text.replace("$", "", 1))
        and not _WORD.search(_NO_WORD.sub(" ", text))
    )

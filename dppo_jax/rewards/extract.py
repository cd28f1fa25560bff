"""Which part of a reply is its answer: EXTRACT[data.extract](reply) -> text, "" where that part is not there.

Pure functions of a text that a model wrote: linear time, and nothing is run. Reward workers import this: no jax here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from dppo_jax.data.examples import Example, Verify

_MINUS = "-\u2212\u2013"  # hyphen, minus sign, en dash
_GROUP = ",\u2009\u202f"  # comma, thin space, narrow no-break space between groups of three digits
# A sign counts unless it follows a digit, a letter or a closing bracket: "7-3" holds 7 and 3.
NUMBER = re.compile(
    rf"""(?: (?<![\w)\]}}]) [{_MINUS}+] \\?\$? )?                                # -5, -$5
         (?: (?: [0-9]{{1,3}} (?:[{_GROUP}][0-9]{{3}})+ (?![0-9]) | [0-9]+ ) (?: \.[0-9]+ )?
           | \.[0-9]+ )
         (?: [eE][+-]?[0-9]{{1,4}} (?![0-9]) )?""",
    re.VERBOSE,
)
TO_PLAIN = str.maketrans({**dict.fromkeys(_MINUS, "-"), **dict.fromkeys(_GROUP + "\\$", None)})
_BOX = re.compile(r"(\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
_PERCENT = re.compile(r"\s*\\?%")
_TAG = re.IGNORECASE | re.ASCII
_THINK = re.compile("<(/?)(?:think|thinking|thought)>", _TAG)
_ANSWER = re.compile("<(/?)answer>", _TAG)
_CUT = "\udcff"  # stands where a thought stood; no text that is UTF-8 holds it
_HASHES = "####"


class Extracted(str):
    """What was taken out of a reply already: a verifier reads all of it."""


class Boxed(Extracted):
    """What stood in a \\boxed{...}: all of it is mathematics, and no prose."""


def extract_answer(reply: str) -> str:
    """The text of the last <answer>...</answer> outside the thoughts, or else all that is outside them; stripped.

    A thought stands in <think>...</think>; <thinking> and <thought> are the same tag, and upper case does not matter.
    One that is never closed runs to the end; a </think> that nothing opened ends a thought that the prompt began. Where
    a thought stands inside the text, only what follows the last one counts, unless that is blank: "5<think>6</think>7"
    answers 7, not 57. An <answer> that is never closed is text like any other. Linear time. What is `Extracted` already
    stays as it is.
    """
    if isinstance(reply, Extracted):
        return reply
    text = _without_thought(reply)
    tagged = _last_tagged(text)
    return _last_part(text if tagged is None else tagged)


def answer_tag(reply: str) -> str:
    """The text of the last <answer>...</answer> outside the thoughts; stripped."""
    return _last_part(_last_tagged(_without_thought(reply)) or "")


def boxed(reply: str) -> str:
    """The content of the \\boxed{...} outside the thoughts that is closed last, a percent sign behind it included."""
    content = last_box(_without_thought(reply)) or ""
    return Boxed("" if _CUT in content else content.strip())


def hashes(reply: str) -> str:
    """What follows the last #### outside the thoughts, as far as its line goes (or the next one that is not blank), as
    in GSM8K (2110.14168)."""
    before, found, after = _without_thought(reply).rpartition(_HASHES)
    return (after.replace(_CUT, "\n").strip().splitlines() or [""])[0].strip() if found else ""


def last_number(reply: str) -> str:
    """The last number outside the thoughts, as it is written."""
    number = ""
    for match in NUMBER.finditer(plain_commas(_without_thought(reply))):
        number = match[0]
    return number


def whole(reply: str) -> str:
    """All that is outside the thoughts; its parts, where thoughts divide it, on lines of their own."""
    parts = _without_thought(reply).split(_CUT)
    return "\n".join(part.strip() for part in parts if part.strip())


EXTRACT: dict[str, Callable[[str], str]] = {
    "auto": extract_answer,
    "answer_tag": answer_tag,
    "boxed": boxed,
    "hashes": hashes,
    "last_number": last_number,
    "whole": whole,
}
_FORMS = {"answer_tag": "<answer>{}</answer>", "boxed": "\\boxed{{{}}}", "hashes": "#### {}"}


@dataclass(frozen=True)
class Extracting:
    """A verifier that reads the part of a reply that EXTRACT[extract] names."""

    verify: Verify
    extract: str

    def __call__(self, reply: str, example: Example) -> float:
        part = EXTRACT[self.extract](reply)
        return self.verify(part if isinstance(part, Extracted) else Extracted(part), example)


def part_fault(extract: str, verifier: str, answer: str) -> str | None:
    """Why the verifier could never be given this label as a reply's answer; the end of a sentence.

    Of exact_match, which compares texts: the label, written as a reply would write it, must come back.
    """
    if extract == "auto" or verifier != "exact_match":
        return None
    if EXTRACT[extract](_FORMS.get(extract, "{}").format(answer)) == answer.strip():
        return None
    return f"can be no part of a reply that data.extract = {extract!r} takes out; set data.extract=auto"


def last_box(text: str) -> str | None:
    """What stands in the \\boxed{...} that is closed last, a percent sign behind it included. Linear time."""
    open_braces: list[int] = []  # where the open braces' contents begin; -1 for those of no box
    contents = None
    for token in _BOX.finditer(text):
        if token[1]:
            open_braces.append(token.end())
        elif token[0] == "{":
            open_braces.append(-1)
        elif token[0] == "}" and open_braces and (start := open_braces.pop()) >= 0:
            contents = start, token.start()
    if contents is None:
        return None
    percent = _PERCENT.match(text, contents[1] + 1)
    return text[slice(*contents)] + ("\\%" if percent else "")


def plain_commas(text: str) -> str:
    """The text without LaTeX's braces around a comma between groups of digits."""
    return text.replace("{,}", ",")


def _last_tagged(text: str) -> str | None:
    """What stands in the last <answer>...</answer>."""
    start: int | None = None
    inside = None
    for tag in _ANSWER.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            inside, start = text[start : tag.start()], None
    return inside


def _last_part(text: str) -> str:
    """What follows the last thought inside a text, unless that is blank; stripped."""
    return next((part.strip() for part in reversed(text.split(_CUT)) if part.strip()), "")


def _without_thought(reply: str) -> str:
    """The reply with `_CUT` in the place of every thought."""
    answer_parts: list[str] = []
    start, thinking = 0, False
    for tag in _THINK.finditer(reply):
        if not tag[1] and not thinking:
            answer_parts.append(reply[start : tag.start()])
            thinking = True
        elif tag[1]:
            answer_parts = answer_parts if thinking else []
            start, thinking = tag.end(), False
    return _CUT.join(answer_parts if thinking else [*answer_parts, reply[start:]])

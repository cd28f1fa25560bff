"""Ways to write mathematics that math-verify reads as something else, or not at all, and what stands for each.

One small function, `plain_latex`, is asked of labels and replies alike. Reward workers import this, so no jax here.
"""

import re

_SIZES = "tiny scriptsize footnotesize small normalsize large Large LARGE huge Huge"
_FONTS = "bf it rm sf tt boldmath bfseries displaystyle textstyle scriptstyle centering limits nolimits strut"
_SPACES = "quad qquad enspace thinspace hfill newline"
_FRAMES = "mathbf boldsymbol bm pmb underline uline fbox framebox emph"
_NAMES = "pi theta alpha beta gamma delta lambda sigma phi omega sin cos tan cot sec csc log ln"
_RELATIONS = r"=|\\approx|\\simeq|\\cong|\\sim|\u2248|\\therefore|\\implies|\\Rightarrow|\\rightarrow|\\to"
_SCALE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NUMBER = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_SHORT_UNITS = (
    "(?:USD|EUR|GBP|[\u20ac\u00a3\u00a5\u20b9]|(?:sq(?:uare|\\.)? )?(?:cm|mm|km|kg|mg|ml|ft|in|lb|lbs|oz|yd|mi)|"
    "hr|hrs|min|sec|mph|kph)"
)
_NO_UNIT = (
    "(?!(?:less|more|fewer|than|over|times|plus|minus|divided|choose|factorial|squared|cubed|percent|dozen|"
    "sqrt|sinh|cosh|tanh|arc[a-z]+|infinity|union|where|when|" + "|".join(_SCALE) + r")\b)"
)


def _any_of(names: str) -> str:
    return "(?:" + "|".join(names.split()) + ")(?![a-zA-Z])"


# In this order, everywhere in the text.
_EVERYWHERE = (
    (re.compile(r"\\(?:text)?color\s*(?:\[\w*\])?\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\(?:h|v)(?:space|phantom)\*?\s*\{[^{}]*\}|\\phantom\s*\{[^{}]*\}"), " "),
    (re.compile(rf"\\(?:{_any_of(_SIZES)}|{_any_of(_FONTS)}|{_any_of(_SPACES)})|~"), " "),
    (re.compile(rf"\\{_any_of(_FRAMES)}\s*(?=\{{)"), ""),
    (re.compile(r"\\varnothing(?![a-zA-Z])|\u2205"), r"\\emptyset"),
    (re.compile(rf"(?<![\\{{a-zA-Z])({_any_of(_NAMES)})"), r"\\\1"),
    (  # a function of degrees
        re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc)\s*[({]?\s*)(-?\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)"),
        r"\1\\left(\\frac{\2\\pi}{180}\\right)",
    ),
)

# In this order, where the text as a whole has the form.
_WHOLE = (
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{((?=[^{}\d]*\d)[^{}]*)\}"), r"\1"),
    (re.compile(r"([-+]?)\s*inf(?:inity)?", re.IGNORECASE), r"\1\\infty"),
    (re.compile(rf"(?:\s|{_RELATIONS})+(?=\S)(.*)", re.DOTALL), r"\1"),
    (
        re.compile(r"(-?)\s*(?:(?:US|USD|AU|A|CA|C|NZ|HK|S)\s*(?=\\?\$)|(?:USD|EUR|GBP|INR|Rs\.?)\s*(?=\d))(.*)"),
        r"\1\2",
    ),
    (re.compile(r"\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(rf"({_NUMBER})\s*(?:\\text\s*\{{)?\s*percent\s*\}}?"), r"\1\\%"),
    (re.compile(rf"({_NUMBER})\s*(?:\\text\s*\{{)?\s*dozen\b[\sa-z]*\}}?"), r"12 \\times \1"),
    *(
        (re.compile(rf"((?:\\?\$)?{_NUMBER})\s*(?:\\text\s*\{{)?\s*{word}\b[\sa-z]*\}}?"), rf"\1\\times 10^{{{power}}}")
        for word, power in _SCALE.items()
    ),
    (re.compile(r"(.*\^\s*\{?\\circ\s*\}?)\s*(?:\\\w+\s*\{)?\s*[CF]\s*\}?", re.DOTALL), r"\1"),
    (re.compile(rf"((?:\\?\$)?\s*{_NUMBER})\s*{_SHORT_UNITS}\.?(?:\s*\^\s*\{{?[23]\}}?)?"), r"\1"),
    # Units in words: 5 dollars, 3\sqrt{2} square units, 2\pi inches, 5 per hour.
    (
        re.compile(
            rf"(.*(?:[\d}})%]|\\pi))\s*(?:/\s*|per\s+)?{_NO_UNIT}[A-Za-z]{{4,}}(?:\s+{_NO_UNIT}[a-z]{{2,}})*"
            r"(?:\s*\^\s*\{?[23]\}?)?",
            re.DOTALL,
        ),
        r"\1",
    ),
)
_UNDERSCORES = re.compile(r"-?\d{1,3}(?:_\d{3})+(?:\.\d+)?")  # 1_000
_DOTS = re.compile(r"(?<=\d)\s*(?:\.{3}|\u2026|\\c?l?dots(?![a-zA-Z]))")
_GOES_ON = re.compile(r"(-?)(\d{0,50})\.(\d{0,50}?)(\d{1,12}?)\4+\\ldots")  # 0.1666..., its period twice at least

_LONGEST_DECIMAL = 200

_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_VOWEL = re.compile("[aeiouyAEIOUY]")
_WORD = re.compile(r"[A-Za-z]{4,}")
_READ_WORDS = frozenset(
    {"infinity", "infty", "inf", "sqrt", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan", *_NAMES.split()}
)
_LETTERS = re.compile(r"[A-Za-z][A-Za-z\s,()]*|[A-Z][a-z]{2,}[\w\s,:]*")  # June 20
_AS_TEXT = re.compile(r"[A-Z]{2,}|[A-Z][a-z]{2,}|[a-z]{4,}|[A-Z](?:\s*,\s*|\s+and\s+|\s+or\s+)[A-Z]\b")
_BASED = re.compile(r"\(?((?=[A-F]*\d)[0-9A-F]+)\)?\s*_\s*\{?\s*(\d{1,2}|[A-Z]+)\s*\}?")
_BASES = dict(zip("TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ELEVEN TWELVE".split(), range(2, 13), strict=True))


def plain_latex(text: str) -> str:
    """The text, which has no delimiters, in LaTeX that math-verify reads; unchanged where it knows no better."""
    for pattern, better in _EVERYWHERE:
        text = pattern.sub(better, text)
    text = text.strip()
    if _UNDERSCORES.fullmatch(text):
        text = text.replace("_", "")
    for pattern, better in _WHOLE:
        match = pattern.fullmatch(text)
        text = match.expand(better).strip() if match else text
    match = _GOES_ON.fullmatch(text) if len(text) < _LONGEST_DECIMAL else None
    return match.expand(r"\1\2.\3\\overline{\4}") if match else text


def with_ldots(text: str) -> str:
    """Three dots behind a digit, however written, are \\ldots: no full stop may be taken off them."""
    return _DOTS.sub(r"\\ldots", text)


def goes_on(text: str) -> bool:
    """Whether it ends with digits that are cut off, and is no list."""
    return text.endswith("\\ldots") and "," not in text


def fault(text: str) -> str | None:
    """Why a label, written as `plain_latex` leaves it, has no value that a reply could equal; the end of a sentence."""
    if goes_on(text):
        return "has no exact value: its digits go on; write it as a fraction, or set another verifier"
    words = (word for word in _WORD.findall(_TEXT.sub(" ", text)) if word not in _READ_WORDS and _VOWEL.search(word))
    word = next(words, None)
    if word is not None:
        return f"holds the word {word!r:.40} beside mathematics; write the value alone, or set another verifier"
    return None


def is_text(text: str) -> bool:
    """Whether it is letters alone that make words or a list of choices, and no product: CAT, Monday, "C, A, B"."""
    if not _LETTERS.fullmatch(text) or text.casefold() in _READ_WORDS:
        return False
    return bool(_AS_TEXT.search(text)) or any(map(_is_short_word, text.split()))


def _is_short_word(word: str) -> bool:
    """cat, yes, odd; not abc or mgh, which are products."""
    return len(word) == 3 and bool(_VOWEL.search(word)) and list(word) != sorted(word)


def in_base(text: str) -> tuple[str, int] | None:
    """The digits and the base of 1010_2, 1010_{16} or 1010_{two}, without \\text; or None."""
    match = None if _UNDERSCORES.fullmatch(text) else _BASED.fullmatch(text.upper())
    if not match or not (match[2].isdigit() or match[2] in _BASES):
        return None
    return match[1], int(_BASES.get(match[2], match[2]))

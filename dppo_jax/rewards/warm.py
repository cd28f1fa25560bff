"""Imported once, before workers are forked: math-verify reads and compares a few answers of every kind, so that its
grammar's tables, which are built as they are needed, are there in every worker. No jax here."""

from dppo_jax.rewards.verifiers import by_library

_ANSWERS = (
    ("7", "8"),
    ("-7.5", "1,234"),
    ("\\frac{1}{2}", "0.5"),
    ("3\\sqrt{2}", "\\sqrt{18}"),
    ("(1, 2)", "(2, 1)"),
    ("\\{1, 2\\}", "\\{2, 1\\}"),
    ("[1, 2)", "(1, \\infty)"),
    ("2\\pi", "\\pi"),
    ("x^2 + 2x + 1", "(x+1)^2"),
    ("x = 5", "5"),
    ("50\\%", "0.5"),
    ("90^\\circ", "\\sin(30^\\circ)"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "2^{10}"),
    ("1 - 2i", "\\frac{x+2}{7}"),
)

for _label, _other in _ANSWERS:
    for _reply in (f"\\boxed{{{_other}}}", f"We get ${_other}$.", f"The answer is {_other}"):
        by_library(_reply, _label)

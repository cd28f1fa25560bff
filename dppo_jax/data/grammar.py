"""The grammar of the answers of reasoning-gym's data sets whose scorers evaluate the reply, or read over parts of it.

Nine sets of reasoning-gym 0.1.25 pass the reply to `eval` or to sympy's `parse_expr`, which evals. A reply reaches them
only where it is an answer of the set's own kind: digits, letters of the board, arithmetic on numbers, algebra in the
question's variables. No other names, no attributes, no texts, no huge powers; calls of elementary functions only, where
answers have them. Others pass over what they do not know, so that "not" before an answer, or " is wrong" behind it,
leaves it right: a reply reaches them only where it has the form that the question asks for. Reward workers import this,
so no jax here.
"""

import ast
import re
from collections.abc import Callable, Mapping, Set
from functools import partial
from typing import Any

LONGEST = 10_000  # characters
LARGEST_POWER = 100

_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div)
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc asin acos atan sinh cosh tanh asinh acosh atanh exp log ln sqrt Abs erf".split()
)


def _matches(pattern: str, text: str, entry: Mapping[str, Any]) -> bool:
    return re.fullmatch(pattern, text) is not None


def _as_many_parts(separator: str | None, text: str, entry: Mapping[str, Any]) -> bool:
    return len(text.split(separator)) == len(entry["answer"].split(separator))


def _arithmetic(text: str, entry: Mapping[str, Any]) -> bool:
    return _is_algebra(text, frozenset(), frozenset(), largest_power=0)


def _polynomial(text: str, entry: Mapping[str, Any]) -> bool:
    names = frozenset(entry["metadata"]["variables"])
    return _is_algebra(text, names, frozenset(), largest_power=LARGEST_POWER)


def _antiderivative(text: str, entry: Mapping[str, Any]) -> bool:
    names = frozenset({entry["metadata"]["variable"], "C", "pi", "E"})
    return _is_algebra(text, names, _FUNCTIONS, largest_power=LARGEST_POWER)


# Of each set whose scorer evaluates: whether a reply to the entry is in the grammar of its answers.
EVALUATED: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "binary_matrix": partial(_matches, r"[0-9 \n]+"),
    "spiral_matrix": partial(_matches, r"[0-9 \n]+"),
    "string_insertion": partial(_matches, r"[A-E]+"),
    "n_queens": partial(_matches, r"[Q_ \n]+"),
    "countdown": _arithmetic,
    "puzzle24": _arithmetic,
    "polynomial_multiplication": _polynomial,
    "simple_integration": _antiderivative,
    "intermediate_integration": _antiderivative,
}

_IS_A = r"[A-Za-z]+ is an? [A-Za-z]+"
_MOVE = r"\s*Move disk \d+ from Peg \d+ to Peg \d+\s*"
_DECIMAL = r"-?\d*\.?\d+"

# Of each set whose scorer passes over parts of a reply: whether a reply to the entry has the form of its answers.
FORMS: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "advanced_geometry": partial(_matches, rf"{_DECIMAL}\s*\u00b0?|\(\s*{_DECIMAL}\s*,\s*{_DECIMAL}\s*\)"),
    "fraction_simplification": partial(
        _matches, r"(?i:\s*(\$?)\s*(?:\d+\s*/\s*\d+|\\d?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})\s*\1\s*)"
    ),
    "kakurasu": partial(_matches, r"[01]+(?:[ ,\n]+[01]+)*"),
    "knights_knaves": partial(_matches, rf"{_IS_A}(?:(?:,\s*and|,|\s+and|\n)\s+{_IS_A})*\.?"),
    "letter_jumble": partial(_as_many_parts, None),
    "polynomial_equations": partial(_matches, rf"(?:{_DECIMAL}(?:\s*,\s*{_DECIMAL})*)?"),
    "quantum_lock": partial(_matches, r"[A-Ca-c](?:\s*(?:\u2192|->|,)?\s*[A-Ca-c])*"),
    "sokoban": partial(_matches, r"[UDLR]+"),
    "survo": partial(_matches, r"[0-9 \n]+"),
    "time_intervals": partial(_matches, r"\d+(?: days?)?|(?:\d+ days?, )?\d+:\d\d(?::\d\d(?:\.\d+)?)?"),
    "tower_of_hanoi": partial(_matches, rf"{_MOVE}(?:\n{_MOVE})*"),
    "word_sorting": partial(_as_many_parts, ","),
}


def is_answer(name: str, text: str, entry: Mapping[str, Any]) -> bool:
    """Whether the data set's scorer may read the text: any text where it reads the whole of it, and the label always.

    Some labels of intermediate_integration hold an Integral, which in a reply would only repeat the question.
    """
    accepts = EVALUATED.get(name) or FORMS.get(name)
    if accepts is None or text == entry["answer"]:
        return True
    return len(text) <= LONGEST and accepts(text, entry)


def _is_algebra(text: str, names: Set[str], functions: Set[str], *, largest_power: int) -> bool:
    """Whether it is one expression in numbers, + - * /, parentheses, the names, the functions of one argument, and **.

    The numbers in an exponent are at most largest_power (0: there is no **), and an exponent holds no power, no call
    and no more than one product or quotient. Powers stand in powers two deep at most.
    """
    text = text.strip()
    if not re.fullmatch(r"[0-9A-Za-z_+\-*/(). ]*" if names else r"[0-9+\-*/(). ]*", text):
        return False
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # as the parser puts what it cannot read
        return False
    nodes = [node for node in ast.walk(tree) if not isinstance(node, ast.operator | ast.unaryop | ast.expr_context)]
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    return all(_is_allowed(node, functions if id(node) in called else names, largest_power) for node in nodes)


def _is_allowed(node: ast.AST, names: Set[str], largest_power: int) -> bool:
    match node:
        case ast.Constant(value=value):
            return type(value) in (int, float)
        case ast.Name(id=name):
            return name in names
        case ast.UnaryOp(op=ast.UAdd() | ast.USub()):
            return True
        case ast.BinOp(op=ast.Pow()):
            return _is_small(node, largest_power)
        case ast.BinOp(op=operation):
            return isinstance(operation, _OPERATORS)
        case ast.Call(func=ast.Name(), args=[_], keywords=[]):
            return True
    return False


def _is_small(power: ast.BinOp, largest_power: int) -> bool:
    exponent = list(ast.walk(power.right))
    numbers = [node.value for node in exponent if isinstance(node, ast.Constant)]
    powers = [node for node in ast.walk(power.left) if _is_power(node)]
    return (
        not any(isinstance(node, ast.Call | ast.Pow) for node in exponent)
        and sum(isinstance(node, ast.Mult | ast.Div) for node in exponent) <= 1
        and all(isinstance(number, int | float) and number <= largest_power for number in numbers)
        and not any(_has_power(child) for node in powers for child in ast.iter_child_nodes(node))
    )


def _is_power(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)


def _has_power(tree: ast.AST) -> bool:
    return any(_is_power(node) for node in ast.walk(tree))

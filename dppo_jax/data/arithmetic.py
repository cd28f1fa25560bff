"""Exact values of arithmetic expressions, to check labels against."""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

_BINARY: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: dict[type, Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def exact_value(expression: str) -> Fraction:
    """The value under the usual precedence, without rounding; "/" is true division, decimals are read as written.

    Raises: ValueError for anything but numbers, + - * / and parentheses; ZeroDivisionError.
    """
    text = expression.strip()

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return Fraction(text[node.col_offset : node.end_col_offset])
        if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
            return _UNARY[type(node.op)](value(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return _BINARY[type(node.op)](value(node.left), value(node.right))
        raise ValueError(f"{ast.unparse(node)!r} is not arithmetic")

    return value(ast.parse(text, mode="eval").body)

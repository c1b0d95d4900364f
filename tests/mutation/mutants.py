"""Copies of a module's source, each with one of its checks taken out.

A check is a condition that refuses or leaves, or a part of one; a `raise`; a part of
what has to hold for a short cut; a mask, a bound or an end that keeps a number or a
slice where it belongs; a fence.
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

_FENCES = {"_fence", "_order", "order", "fence"}


class Mutant(NamedTuple):
    """The whole *source*, in which *what* was done at *line*; *code* is that line as it was."""

    line: int
    what: str
    code: str
    source: str


class _Change(NamedTuple):
    node: ast.stmt | ast.expr
    text: str
    what: str


def mutants(source: str) -> Iterator[Mutant]:
    """Every one that *source* has, in the order of its lines."""
    text, lines = _Text(source), source.splitlines()
    changes = sorted(
        _Checks(text).found(), key=lambda change: (change.node.lineno, change.node.col_offset, change.what)
    )
    for node, new, what in changes:
        yield Mutant(node.lineno, what, lines[node.lineno - 1].strip(), text.with_(new, node))


class _Text:
    """A module's source, in which a node's place is known."""

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self._data = source.encode()
        self._starts = [0]
        for line in self._data.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def _span(self, first: ast.stmt | ast.expr, last: ast.stmt | ast.expr) -> tuple[int, int]:
        assert last.end_lineno is not None and last.end_col_offset is not None
        return (
            self._starts[first.lineno - 1] + first.col_offset, self._starts[last.end_lineno - 1] + last.end_col_offset
        )  # fmt: skip

    def between(self, first: ast.stmt | ast.expr, last: ast.stmt | ast.expr) -> str:
        """From *first*'s start to *last*'s end, in one line."""
        start, end = self._span(first, last)
        return " ".join(self._data[start:end].decode().split())

    def with_(self, new: str, node: ast.stmt | ast.expr) -> str:
        """The whole with *new* in *node*'s place."""
        start, end = self._span(node, node)
        return (self._data[:start] + new.encode() + self._data[end:]).decode()


class _Checks:
    def __init__(self, source: _Text) -> None:
        self._source = source

    def found(self) -> Iterator[_Change]:
        tree = self._source.tree
        alone = {
            id(node.body[0]) for node in ast.walk(tree) if isinstance(node, ast.If) and len(node.body) == 1
        }
        for node in ast.walk(tree):
            match node:
                case ast.Raise() if id(node) not in alone:
                    yield _Change(node, "pass", f"without {self._text(node)}")
                case ast.Expr(value=ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name))) if name in _FENCES:
                    yield _Change(node, "pass", f"without {self._text(node)}")
                case ast.If():
                    yield from self._branches(node)
                case ast.IfExp(test=test, body=body, orelse=orelse):
                    if _is_nothing(orelse):
                        yield _Change(test, "True", f"always {self._text(test)}")
                    elif _is_nothing(body):
                        yield _Change(test, "False", f"never {self._text(test)}")
                case ast.comprehension(ifs=[condition]):
                    yield _Change(condition, "True", f"always {self._text(condition)}")
                case ast.BoolOp(op=ast.And(), values=values):
                    yield from self._without_one(node, values, " and ")
                case ast.Compare(left=left, ops=[_, _], comparators=[middle, _]):
                    yield self._reduced(node, self._source.between(left, middle))
                    yield self._reduced(node, self._source.between(middle, node))
                case ast.BinOp(left=left, op=ast.BitAnd(), right=right) if _is_mask(right):
                    yield self._reduced(node, self._text(left))
                case ast.BinOp(left=left, op=ast.Mod()) if not isinstance(left, ast.Constant):
                    yield self._reduced(node, self._text(left))
                case ast.Call(func=ast.Name(id="min" | "max" as name), args=[_, _, *_] as values, keywords=[]):
                    for number in range(len(values)):
                        rest = ", ".join(self._text(each) for each in values[:number] + values[number + 1 :])
                        yield self._reduced(node, f"{name}({rest})" if len(values) > 2 else rest)
                case ast.Subscript(slice=ast.Slice(upper=ast.expr() as upper, lower=lower), ctx=ast.Load()):
                    text = f"{self._text(lower) if lower else ''}:"
                    yield _Change(node.slice, text, f"without the end {self._text(upper)}")

    def _branches(self, node: ast.If) -> Iterator[_Change]:
        test = node.test
        if _leaves(node.body):
            yield _Change(test, "False", f"never {self._text(test)}")
            for each in ast.walk(test):
                if isinstance(each, ast.BoolOp) and isinstance(each.op, ast.Or):
                    yield from self._without_one(each, each.values, " or ")
        elif _refuses(node.orelse):
            yield _Change(test, "True", f"always {self._text(test)}")

    def _without_one(self, node: ast.expr, values: list[ast.expr], operator: str) -> Iterator[_Change]:
        for left_out in values:
            rest = operator.join(f"({self._text(each)})" for each in values if each is not left_out)
            yield _Change(node, f"({rest})", f"without {self._text(left_out)}")

    def _reduced(self, node: ast.expr, text: str) -> _Change:
        return _Change(node, f"({text})", f"{text}, not {self._text(node)}")

    def _text(self, node: ast.stmt | ast.expr) -> str:
        return self._source.between(node, node)


def _leaves(body: list[ast.stmt]) -> bool:
    return isinstance(body[-1], (ast.Raise, ast.Return, ast.Continue, ast.Break)) or _refuses(body)


def _refuses(body: list[ast.stmt]) -> bool:
    return any(
        isinstance(statement, ast.Raise)
        or isinstance(statement, ast.AugAssign)
        and isinstance(statement.target, ast.Attribute)
        and statement.target.attr == "refused"
        for statement in body
    )


def _is_nothing(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or isinstance(node, ast.Tuple) and not node.elts


def _is_mask(node: ast.expr) -> bool:
    match node:
        case ast.Constant():
            return True
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return "mask" in name.lower() or name in ("offered", "withheld", "_LEGACY_FEATURES", "free")
        case ast.BinOp(op=ast.Sub() | ast.LShift()):
            return True
        case ast.UnaryOp(op=ast.Invert()):
            return True
    return False

"""The mutants of a module: Cosmic Ray's operators, less those that say the same thing twice, and two of our own.

Each operator of the source is replaced in one way, the one that tests miss most easily: an order by the order that
differs at equality (a negated condition is a mutant of its own), a number by the next, an arithmetic operator by one
other.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.boolean_replacer import AddNot
from cosmic_ray.operators.exception_replacer import ExceptionReplacer
from cosmic_ray.operators.number_replacer import NumberReplacer
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

Position = tuple[int, int]

_BINARY = (
    ("Add", "Sub"),
    ("Sub", "Add"),
    ("Mul", "Div"),
    ("Div", "Mul"),
    ("FloorDiv", "Mul"),
    ("Mod", "FloorDiv"),
    ("Pow", "Mul"),
    ("BitOr", "BitAnd"),
    ("BitAnd", "BitOr"),
)
_COMPARISON = (
    ("Eq", "NotEq"),
    ("NotEq", "Eq"),
    ("Lt", "LtE"),
    ("LtE", "Lt"),
    ("Gt", "GtE"),
    ("GtE", "Gt"),
    ("Is", "IsNot"),
    ("IsNot", "Is"),
)
_OTHERS = (
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_USub",
    "AddNot",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "NumberReplacer",
    "RemoveDecorator",
    "ZeroIterationForLoop",
)


_ASSERTIONS = ("strict", "frozen", "slots")


class RemoveStatement(Operator):
    """A call, a raise or an augmented assignment becomes ``pass``."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Position, Position]]:
        """Statements that act."""
        if node.type == "simple_stmt" and _acts(node.children[0]):
            yield node.children[0].start_pos, node.children[0].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """The statement without effect."""
        first = node.children[0]
        node.children[0] = parso.python.tree.Name("pass", first.start_pos, first.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        """None: they are for Cosmic Ray's own documentation."""
        return ()


class RemoveArgument(Operator):
    """A call without one of its keyword arguments."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Position, Position]]:
        """Keyword arguments of calls, not of class statements."""
        for argument in self._arguments(node):
            yield argument.start_pos, argument.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """The call without the argument and its comma."""
        at = node.children.index(self._arguments(node)[index])
        del node.children[at : at + 2 if node.type == "arglist" else at + 1]
        return node

    @staticmethod
    def _arguments(node: Any) -> list[Any]:
        if node.type not in ("arglist", "trailer") or (node.type == "arglist" and node.parent.type == "classdef"):
            return []
        return [c for c in node.children if c.type == "argument" and c.children[1] == "="]

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        """None: they are for Cosmic Ray's own documentation."""
        return ()


class ReplaceException(ExceptionReplacer):
    """Cosmic Ray's operator, which knows exceptions by a name alone, for those named through their module, too."""

    @staticmethod
    def _name_nodes(node: Any) -> list[Any]:
        what = node.children[1]
        within = what.children[1] if what.type == "atom" else what
        each = within.children[::2] if within.type == "testlist_comp" else [within]
        return [one.get_last_leaf() for one in each]


class Mutant(NamedTuple):
    """A changed module and its name, which holds as long as the changed lines stay what they are."""

    name: str
    code: str
    lines: range
    """Of the source: the statement that is changed, or its head where it has a body."""


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of a module, names unique.

    Left alone: signatures but for their defaults, since annotations mean nothing at run time; what is inside of an
    f-string, which is a message; ``strict`` of a zip, ``frozen`` and ``slots`` of a dataclass, which are assertions; a
    negation that another operator makes.
    """
    seen: Counter[str] = Counter()
    idle, negated, heads = _idle(source), _negated(source), _heads(source)
    for operator in _operators():
        for occurrence, (start, definition) in enumerate(_positions(source, operator)):
            if isinstance(operator, NumberReplacer) and occurrence % 2:  # the number before
                continue
            if start in negated and isinstance(operator, AddNot):
                continue
            if any(first <= start < last and start not in but for first, last, but in idle):
                continue
            code = mutate_code(source, operator, occurrence)
            if code is None or not _compiles(code):
                continue
            name = f"{definition}: {_change(source, code)}"
            seen[name] += 1
            lines = min((head for head in heads if start[0] in head), key=len)
            yield Mutant(name if seen[name] == 1 else f"{name} ({seen[name]})", code, lines)


def _operators() -> list[Operator]:
    names = [f"ReplaceBinaryOperator_{one}_{other}" for one, other in _BINARY]
    names += [f"ReplaceComparisonOperator_{one}_{other}" for one, other in _COMPARISON]
    return [get_operator(f"core/{name}")() for name in (*names, *_OTHERS)] + [
        ReplaceException(),
        RemoveStatement(),
        RemoveArgument(),
    ]


def _positions(source: str, operator: Operator) -> list[tuple[Position, str]]:
    found = []
    for node in ast_nodes(get_ast(source)):
        for start, _ in operator.mutation_positions(node):
            found.append((start, ASTQuery(node).get_definition_name() or "module"))
    return found


def _idle(source: str) -> list[tuple[Position, Position, set[Position]]]:
    """Start and end of what is not mutated, and the positions in it that are."""
    found: list[tuple[Position, Position, set[Position]]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            defaults = [default for default in (*node.args.defaults, *node.args.kw_defaults) if default is not None]
            leaves = [leaf for default in defaults for leaf in ast.walk(default) if isinstance(leaf, ast.expr)]
            found.append((_start(node), _start(node.body[0]), {_start(leaf) for leaf in leaves}))
        elif isinstance(node, ast.AnnAssign):
            found.append((_start(node.annotation), _end(node.annotation), set()))
        elif isinstance(node, ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg in _ASSERTIONS):
            found.append((_start(node), _end(node), set()))
    return found


def _heads(source: str) -> list[range]:
    """Lines of each statement, without those of its body."""
    found = []
    for node in ast.walk(ast.parse(source)):
        place = node.pattern if isinstance(node, ast.match_case) else node
        if isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case):
            first = min([place.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
            body = getattr(node, "body", None)
            last = max(place.lineno, body[0].lineno - 1) if body else place.end_lineno
            found.append(range(first, last + 1))
    return found


def _negated(source: str) -> set[Position]:
    """Starts of conditions that a changed comparison, or a ``not`` taken away, negates already."""
    tests = [node.test for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.If, ast.IfExp, ast.While))]
    pure = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot)
    return {
        _start(test)
        for test in tests
        if (isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], pure))
        or isinstance(test, ast.UnaryOp)
    }


def _start(node: Any) -> Position:
    return node.lineno, node.col_offset


def _end(node: Any) -> Position:
    return node.end_lineno, node.end_col_offset


def _compiles(code: str) -> bool:
    try:
        compile(code, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _change(source: str, code: str) -> str:
    """The changed lines before and after."""
    was, now = source.splitlines(), code.splitlines()
    while was and now and was[0] == now[0]:
        del was[0], now[0]
    while was and now and was[-1] == now[-1]:
        del was[-1], now[-1]
    return f"{_on_one_line(was)} -> {_on_one_line(now)}"


def _on_one_line(lines: Sequence[str]) -> str:
    return re.sub(r"(?<=[\[(]) |(?<=[\[(:,]-) ", "", " ".join(" ".join(lines).split()))


def _acts(statement: Any) -> bool:
    if statement.type == "raise_stmt":
        return True
    if statement.type == "expr_stmt":
        return statement.children[1].type == "operator" and statement.children[1].value not in ("=", ":")
    if statement.type in ("atom_expr", "power"):
        return statement.children[-1].type == "trailer" and statement.children[-1].children[0] == "("
    return False

"""Small wrong changes to a module's syntax tree: where they can be made, and a tree with one of them made."""

import ast
import re
from typing import NamedTuple

_COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
}
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin"}
_MESSAGES = re.compile(r"warnings\.warn$|_?log(ger)?\.|_?warn")
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class Place(NamedTuple):
    """One change: ``kind`` at the node of number ``node`` in the order of ``ast.walk``.

    The lines are those of its statement, without the statements inside; ``at_import`` is one of no function.
    ``words`` are those of the node, of a condition those of the condition alone.
    """

    node: int
    kind: str
    part: int
    at_import: bool
    first_line: int
    last_line: int
    words: str


def _dotted(node: ast.AST) -> str:
    """A name, perhaps of an attribute, as it is written; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _left_alone(node: ast.AST) -> list[ast.AST]:
    """Children of a node that no change is made in: annotations, messages, what only type checkers read."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return [node.exc]
    if isinstance(node, ast.Call) and _MESSAGES.match(_dotted(node.func)):
        return [*node.args, *node.keywords]
    if isinstance(node, ast.Assert) and node.msg:
        return [node.msg]
    if isinstance(node, ast.If) and _dotted(node.test).endswith("TYPE_CHECKING"):
        return [node.test, *node.body]
    if isinstance(node, ast.Assign) and _dotted(node.targets[0]) in ("__all__", "__slots__"):
        return [node.value]
    notes = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    return [note for note in notes if note is not None] + ([node] if isinstance(node, ast.JoinedStr) else [])


def _rebinds(node: ast.Assign, scope: ast.AST | None) -> bool:
    """Whether a statement can go without leaving a name unbound, which any call would notice."""
    if not all(isinstance(target, ast.Name) for target in node.targets):
        return all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets)
    names = {target.id for target in node.targets if isinstance(target, ast.Name)}
    if not isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    bound = {word.arg for word in ast.walk(scope.args) if isinstance(word, ast.arg)}
    bound |= {
        word.id
        for word in ast.walk(scope)
        if isinstance(word, ast.Name) and isinstance(word.ctx, ast.Store) and word.lineno < node.lineno
    }
    return names <= bound


def _kinds(node: ast.AST, scope: ast.AST | None) -> list[tuple[str, int]]:
    """Changes that can be made at a node, each with the number of the part that it changes."""
    match node:
        case ast.Compare():
            return [("comparison", number) for number, op in enumerate(node.ops) if type(op) in _COMPARISONS]
        case ast.BinOp() | ast.AugAssign():
            found = [("arithmetic", 0)] if type(node.op) in _ARITHMETIC else []
            return found + ([("statement dropped", 0)] if isinstance(node, ast.AugAssign) else [])
        case ast.BoolOp():
            return [("and/or", 0)]
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            return [("not or minus dropped", 0)]
        case ast.Constant(value=bool() | int() | float()):
            return [("constant", 0)]
        case ast.Expr(value=ast.Call()):
            return [("statement dropped", 0)]
        case ast.Assign() if _rebinds(node, scope):
            return [("statement dropped", 0)]
        case ast.Return(value=ast.expr() as value) if not (
            isinstance(value, ast.Constant) and value.value is None
        ):
            return [("return None", 0)]
        case ast.Raise():
            return [("raise dropped", 0)]
        case ast.If() | ast.IfExp():
            return [("condition negated", 0)]
        case ast.Call():
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            found = [("min/max, any/all", 0)] if name in _CALLS else []
            named = [number for number, word in enumerate(node.keywords) if word.arg]
            return found + [("keyword dropped", number) for number in named]
    return []


def places(source: str) -> list[Place]:
    """Every change that can be made in a module."""
    tree = ast.parse(source)
    numbers = {node: number for number, node in enumerate(ast.walk(tree))}
    found: list[Place] = []
    text = [line.encode() for line in source.splitlines()]

    def words_of(node: ast.AST) -> str:
        told = node.test if isinstance(node, (ast.If, ast.IfExp)) else node
        words = text[told.lineno - 1 : told.end_lineno]
        words[-1] = words[-1][: told.end_col_offset]
        words[0] = words[0][told.col_offset :]
        return b" ".join(line.strip() for line in words).decode()

    def visit(node: ast.AST, scope: ast.AST | None, lines: tuple[int, int]) -> None:
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None) or getattr(node, "cases", None)
            last = node.end_lineno or node.lineno
            if body:
                start = body[0].pattern if isinstance(body[0], ast.match_case) else body[0]
                last = max(node.lineno, start.lineno - 1)
            decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
            lines = (min([node.lineno, *decorators]), last)
        for kind, part in _kinds(node, scope):
            found.append(Place(numbers[node], kind, part, scope is None, *lines, words_of(node)))
        alone = _left_alone(node)
        if node in alone:
            return
        for child in ast.iter_child_nodes(node):
            # Defaults and decorators are evaluated outside the function.
            is_inside = isinstance(node, _SCOPES) and child not in (
                node.args,
                *getattr(node, "decorator_list", []),
            )
            if child not in alone:
                visit(child, node if is_inside else scope, lines)

    visit(tree, None, (0, 0))
    return found


def _changed(node: ast.AST, kind: str, part: int) -> ast.AST:
    """The node with its change, or what stands in its place."""
    if kind in ("statement dropped", "raise dropped"):
        return ast.Pass()
    match node:
        case ast.Compare():
            node.ops[part] = _COMPARISONS[type(node.ops[part])]()
        case ast.BinOp() | ast.AugAssign():
            node.op = _ARITHMETIC[type(node.op)]()
        case ast.BoolOp():
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        case ast.UnaryOp():
            return node.operand
        case ast.Constant(value=bool() as value):
            node.value = not value
        case ast.Constant(value=(int() | float()) as number):
            node.value = number + 1
        case ast.Return():
            node.value = ast.Constant(None)
        case ast.If() | ast.IfExp():
            node.test = ast.UnaryOp(ast.Not(), node.test)
        case ast.Call() if kind == "keyword dropped":
            del node.keywords[part]
        case ast.Call(func=ast.Name() as name):
            name.id = _CALLS[name.id]
        case ast.Call(func=ast.Attribute() as name):
            name.attr = _CALLS[name.attr]
    return node


def mutant(source: str, place: Place) -> tuple[ast.Module, str]:
    """The tree of a module with one change, lines as they were; and the change in words, old and new."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    node = nodes[place.node]
    old = ast.unparse(node).splitlines()[0]
    new = ast.copy_location(_changed(node, place.kind, place.part), node)
    for parent in nodes if new is not node else []:
        for name, value in ast.iter_fields(parent):
            if value is node:
                setattr(parent, name, new)
            elif isinstance(value, list) and any(item is node for item in value):
                value[:] = [new if item is node else item for item in value]
    return ast.fix_missing_locations(tree), f"{old}  ->  {ast.unparse(new).splitlines()[0]}"

"""What the source of a ``forward`` says: whether it is the one we know, and which submodule follows
which."""

from __future__ import annotations

import ast
import collections
import functools
import hashlib
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterator


@functools.cache
def fingerprint(forward: Callable) -> str:
    """A short hash of what ``forward`` does: of its code without comments, docstring, annotations
    and layout. The same under every Python."""
    words = []
    for node in ast.walk(_tree(forward)):
        fields = (getattr(node, name, None) for name in ("id", "attr", "arg", "name", "value"))
        words.append(type(node).__name__)
        words += [repr(field) for field in fields if isinstance(field, (str, int, float))]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]


@functools.cache
def activated(forward: Callable) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Which submodules ``forward`` hands to which, and to no other.

    Returns:
        Pairs (submodules, activation): ``activation`` is called on the fresh result of one of these
        submodules only, and they are called nowhere else. Written either as
        ``self.activation(self.submodule(x))``, or as ``x = self.submodule(...)`` and in the next
        line ``x = self.activation(x)``.
    """
    tree = _tree(forward)
    uses = collections.Counter(_attributes(tree))
    # Asking whether there is a norm is no use of it.
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            uses.subtract(_attributes(node.test))
    sources: dict[str, set[str]] = collections.defaultdict(set)
    handed_on: collections.Counter[str] = collections.Counter()
    received: collections.Counter[str] = collections.Counter()
    for submodule, calls, activation in _successions(tree):
        sources[activation].add(submodule)
        handed_on[submodule] += calls
        received[activation] += 1
    return tuple(
        (tuple(sorted(submodules)), activation)
        for activation, submodules in sources.items()
        if uses[activation] == received[activation]
        and all(uses[submodule] == handed_on[submodule] for submodule in submodules)
    )


def _successions(tree: ast.AST) -> Iterator[tuple[str, int, str]]:
    """(first, calls of first, second) wherever the result of ``self.first`` goes to ``self.second``
    and nowhere else."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) == 1:
            first, second = _called(node.args[0]), _called(node)
            if first and second:
                yield first, 1, second
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            for before, after in itertools.pairwise(body if isinstance(body, list) else ()):
                ends = [(_assignment(end) or (None, None))[:2] for end in _ends(before)]
                match _assignment(after), [*set(ends)]:
                    case (x, second, [ast.Name(id=y)]), [(z, str(first))] if x == y == z:
                        yield first, len(ends), second


def _ends(statement: ast.stmt | None) -> Iterator[ast.stmt | None]:
    """The last statement of every way through a statement."""
    if isinstance(statement, ast.If):
        yield from _ends(statement.body[-1])
        yield from _ends(statement.orelse[-1] if statement.orelse else None)
    else:
        yield statement


def _assignment(statement: ast.stmt | None) -> tuple[str, str, list[ast.expr]] | None:
    """(variable, name, arguments) of ``variable = self.name(*arguments)``."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=variable)], value=ast.Call() as call):
            name = _called(call)
            return (variable, name, call.args) if name else None
    return None


def _called(node: ast.AST) -> str | None:
    """``name`` of ``self.name(...)``."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name)):
            return name
    return None


def _attributes(tree: ast.AST) -> Iterator[str]:
    """``name`` of every ``self.name``."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                yield name


def _tree(function: Callable) -> ast.FunctionDef:
    """Its syntax without docstring and annotations; that of nothing where there is no source."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        source = ""
    tree = ast.parse(source if source.startswith(("def ", "@")) else "def unknown(): ...").body[0]
    assert isinstance(tree, ast.FunctionDef)
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    tree.name, tree.returns, tree.decorator_list = "", None, []
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return tree

"""Finds config fields that no code reads: a small type inference over the sources, by what holds which config block.

A field counts as read where ``x.field`` is loaded and ``x`` is known to be its block: an annotated argument, an
attribute of ``self`` that was given one, a field of another block, an item of a list of them, a local name for any of
these. A name alone does not count: ``kind`` is a field of five blocks. Inside the blocks' own classes, only what a
method reads that is itself used elsewhere counts; a validator does not keep a field alive.

What it cannot follow it takes for unread. So it may accuse a field wrongly, but never lets a dead one pass because
another block has a field of the same name.
"""

from __future__ import annotations

import ast
import functools
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

Blocks = dict[str, type[BaseModel]]


class Type(NamedTuple):
    """A config block, or a sequence of them."""

    block: type[BaseModel]
    many: bool = False


def blocks_of(schema: type[BaseModel]) -> Blocks:
    """``schema`` and every block below it, and what they inherit from, by class name."""
    found = {block.__name__: block for block in schema.__mro__ if issubclass(block, BaseModel) and block.model_fields}
    for field in schema.model_fields.values():
        for nested in _classes(field.annotation):
            found |= blocks_of(nested)
    return found


def unread(schema: type[BaseModel], files: Iterable[Path]) -> list[str]:
    """Fields of ``schema`` and the blocks below it that the Python ``files`` do not read, as ``Block.field``."""
    blocks = blocks_of(schema)
    trees = [_parsed(path) for path in files]
    functions = {
        node.name: returned
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (returned := _annotated(node.returns, blocks))
    }
    reads: dict[tuple[str, str] | None, set[tuple[str, str]]] = {}
    for tree in trees:
        _read_module(tree, blocks, functions, reads)
    alive: set[tuple[str, str]] = set()
    waiting = list(reads.get(None, ()))
    while waiting:
        read = waiting.pop()
        if read not in alive:
            alive.add(read)
            waiting += reads.get(read, ())
    fields = [_owned(block, field) for block in blocks.values() for field in block.model_fields]
    return [f"{block}.{field}" for block, field in dict.fromkeys(fields) if (block, field) not in alive]


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def _owned(block: type[BaseModel], name: str) -> tuple[str, str]:
    """A field or method with the class that brought it in, which a subclass's readers need not know of."""
    bases = [base for base in block.__mro__ if issubclass(base, BaseModel) and base is not BaseModel]
    owners = [base for base in bases if name in base.model_fields or name in vars(base)]
    return (owners[-1] if owners else block).__name__, name


def _read_module(tree: ast.Module, blocks: Blocks, functions: dict[str, Type], reads: dict[Any, set[Any]]) -> None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            own = Type(blocks[node.name]) if node.name in blocks else None
            attributes: dict[str, Type] = {}
            for _ in range(2):  # an attribute may be made of another one
                for method in (n for n in node.body if isinstance(n, ast.FunctionDef)):
                    scope = _Scope(blocks, functions, attributes, own)
                    scope.run(method)
                    reads.setdefault((node.name, method.name) if own else None, set()).update(scope.reads)
        else:
            scope = _Scope(blocks, functions, {}, None)
            scope.run(node)
            reads.setdefault(None, set()).update(scope.reads)


class _Scope(ast.NodeVisitor):
    """One function, with those inside it; names are bound in the order they are written."""

    def __init__(self, blocks: Blocks, functions: dict[str, Type], attributes: dict[str, Type], own: Type | None):
        self.blocks, self.functions, self.attributes, self.own = blocks, functions, attributes, own
        self.names: dict[str, Type] = {}
        self.reads: set[tuple[str, str]] = set()

    def run(self, node: ast.AST) -> None:
        self.visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            self._bind_name(argument.arg, _annotated(argument.annotation, self.blocks))
        if self.own is not None and arguments and arguments[0].arg == "self":
            self.names["self"] = self.own
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._bind(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        found = _annotated(node.annotation, self.blocks)
        if found and isinstance(node.target, ast.Name):
            self.names[node.target.id] = found

    def visit_For(self, node: ast.For) -> None:
        self._bind_items(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind_items(node.target, node.iter)
        self.generic_visit(node)

    def visit_ListComp(self, node: Any) -> None:
        for generator in node.generators:  # they bind what the element, written before them, reads
            self.visit(generator)
        self.generic_visit(node)

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    def visit_Attribute(self, node: ast.Attribute) -> None:
        base = self._type(node.value)
        if base is not None and not base.many and isinstance(node.ctx, ast.Load):
            self.reads.add(_owned(base.block, node.attr))
        self.generic_visit(node)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=False):
                self._bind(one, other)
        elif isinstance(target, ast.Name):
            self._bind_name(target.id, self._type(value))
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            found = self._type(value)
            if found is not None:
                self.attributes[target.attr] = found

    def _bind_items(self, target: ast.expr, sequence: ast.expr) -> None:
        if isinstance(sequence, ast.Call) and isinstance(sequence.func, ast.Name) and isinstance(target, ast.Tuple):
            parts = {"zip": target.elts, "enumerate": target.elts[1:]}.get(sequence.func.id, [])
            for one, other in zip(parts, sequence.args, strict=False):
                self._bind_items(one, other)
        elif isinstance(target, ast.Name):
            found = self._type(sequence)
            self._bind_name(target.id, Type(found.block) if found is not None and found.many else None)

    def _bind_name(self, name: str, found: Type | None) -> None:
        self.names.pop(name, None)
        if found is not None:
            self.names[name] = found

    def _type(self, node: ast.expr) -> Type | None:
        match node:
            case ast.Name(id=name):
                return self.names.get(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if self.own is None:
                return self.attributes.get(name)
            case ast.Attribute(value=value, attr=name):
                base = self._type(value)
                field = base.block.model_fields.get(name) if base is not None and not base.many else None
                return None if field is None else _of_field(field.annotation)
            case ast.Subscript(value=value, slice=index):
                base = self._type(value)
                return None if base is None else Type(base.block, many=isinstance(index, ast.Slice))
            case ast.Call(func=ast.Name(id=name)):
                return self.functions.get(name)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._type(left) or self._type(right)
            case ast.List(elts=[ast.Starred(value=value), *_]):
                return self._type(value)
        return None


def _of_field(annotation: Any) -> Type | None:
    many = typing.get_origin(annotation) in (list, tuple, Sequence)
    return next((Type(block, many) for block in _classes(annotation)), None)


def _annotated(node: ast.expr | None, blocks: Blocks) -> Type | None:
    """What an annotation says: ``Block``, ``Block | None``, ``list[Block]`` and the like."""
    match node:
        case ast.Name(id=name) if name in blocks:
            return Type(blocks[name])
        case ast.BinOp(left=left, right=right):
            return _annotated(left, blocks) or _annotated(right, blocks)
        case ast.Subscript(value=ast.Name(id="list" | "Sequence" | "Iterable"), slice=inner):
            found = _annotated(inner, blocks)
            return None if found is None else Type(found.block, many=True)
    return None


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _classes(part)

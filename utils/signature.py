"""Signatures of `_target_`s read from source files, without importing them.

Importing a model file imports torch, which takes longer than a mistyped key deserves.
Only annotations that need no heavy module are evaluated; every other one reads `Any`.
"""

import ast
import builtins
import collections
import functools
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

# imported to evaluate annotations; names from any other module are followed in its source
LIGHT_MODULES = {"typing", "typing_extensions", "collections", "collections.abc", "pathlib", "utils.rules"}


@dataclass(frozen=True)
class Parameter:
    """One argument: its annotation as a typing object, `Any` where it can't be known."""

    annotation: Any = Any
    required: bool = True


@dataclass(frozen=True)
class Signature:
    """The arguments of a target; `open_ended` ones (`**kwargs`, unreadable) accept any key."""

    parameters: dict[str, Parameter] = field(default_factory=dict)
    open_ended: bool = False


UNREADABLE = Signature(open_ended=True)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NO_METHODS = ("object", "ABC", "Protocol", "Generic")
# decorators that leave the arguments as written; any other makes a target unreadable
HARMLESS = {
    "abstractmethod", "cache", "checked", "classmethod", "dataclass", "final", "inference_mode", "lru_cache",
    "no_grad", "override", "runtime_checkable", "staticmethod", "total_ordering",
}  # fmt: skip

# what an annotation may consist of; calls are `Range(0, 1)` and its like, of light modules
PARTS = (
    ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Tuple, ast.List, ast.BinOp, ast.BitOr, ast.Pow, ast.Sub,
    ast.UnaryOp, ast.USub, ast.Constant, ast.Call, ast.keyword, ast.Starred, ast.Load,
)  # fmt: skip


class TargetError(LookupError):
    """A `_target_` names nothing."""


@dataclass(frozen=True)
class Module:
    """A parsed source file."""

    name: str
    body: list[ast.stmt]


def read_signature(target: str) -> Signature:
    """Read the signature of a dotted target.

    Raises:
        TargetError: If no such module, or nothing of that name in it.
    """
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise TargetError(f"{target!r} is no dotted name like package.module.function")
    for cut in range(len(parts) - 1, 0, -1):
        spec = find_module(".".join(parts[:cut]))
        if spec is not None:
            module = _parse(spec.name, spec.origin)
            return _lookup(module, parts[cut:], target) if module else UNREADABLE
    raise TargetError(f"there is no module {'.'.join(parts[:-1])!r}")


def definition_of(target: str) -> tuple[Module, ast.stmt] | None:
    """The class or function that a dotted target names, and the module it is written in.

    Returns:
        None where it can't be seen from sources: hidden by a star import, computed, or compiled.
    """
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        spec = find_module(".".join(parts[:cut]))
        if spec is not None:
            module = _parse(spec.name, spec.origin)
            return _defined(module, parts[cut:]) if module else None
    return None


def _defined(module: Module, path: list[str]) -> tuple[Module, ast.stmt] | None:
    found = _find(module, path[0]) if len(path) == 1 else None
    if found is not None and (meant := _meant(found[1])) is not None and meant != path[0]:
        return _defined(found[0], [meant])
    return found


def methods_of(module: Module, node: ast.stmt, depth: int = 0) -> set[str] | None:
    """Names of a class's methods, its bases' included; None where a base can't be seen."""
    if not isinstance(node, ast.ClassDef) or depth > 16:
        return None
    names = {inner.name for inner in node.body if isinstance(inner, FUNCTIONS)}
    names |= {name for inner in node.body if isinstance(inner, ast.Assign) for name in _assigned(inner)}
    for base in node.bases:
        name = ast.unparse(base).split("[")[0]
        if name.split(".")[-1] in NO_METHODS:
            continue
        found = _find(module, name) if name.isidentifier() else None
        inherited = methods_of(*found, depth + 1) if found else None
        if inherited is None:
            return None
        names |= inherited
    return names


def returned(module: Module, node: ast.stmt) -> tuple[Module, ast.stmt] | None:
    """The class that a function says it returns; None where it does not say."""
    if not isinstance(node, FUNCTIONS) or node.returns is None:
        return None
    name = node.returns.value if isinstance(node.returns, ast.Constant) else ast.unparse(node.returns)
    return _find(module, name) if isinstance(name, str) and name.isidentifier() else None


@functools.lru_cache(maxsize=512)
def find_module(name: str) -> ModuleSpec | None:
    """Find a module as an import would, without running its packages' `__init__`."""
    path: list[str] | None = None
    spec = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        full = ".".join(parts[:depth])
        finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
        spec = next((s for find in finders if find and (s := find(full, path))), None)
        if spec is None or (depth < len(parts) and spec.submodule_search_locations is None):
            return None
        path = list(spec.submodule_search_locations or [])
    return spec


@functools.lru_cache(maxsize=512)
def _parse(name: str, origin: str | None) -> Module | None:
    if origin is None or not origin.endswith(".py"):
        return None
    return Module(name, ast.parse(Path(origin).read_text(encoding="utf-8"), origin).body)


def _lookup(module: Module, path: list[str], target: str) -> Signature:
    found = _find(module, path[0])
    if found is None:
        if _may_hide_names(module):
            return UNREADABLE
        raise TargetError(f"module {module.name!r} has no {path[0]!r}")
    owner, node = found
    if len(path) > 1:
        return _method(owner, node, path[1], target) if len(path) == 2 else UNREADABLE
    if isinstance(node, FUNCTIONS):
        return _function(owner, node, skip=0)
    if (meant := _meant(node)) is not None and meant != path[0]:
        return _lookup(owner, [meant], target)
    return _class(owner, node) if isinstance(node, ast.ClassDef) else UNREADABLE


def _meant(node: ast.stmt) -> str | None:
    """The name that an assignment such as `short = Long` stands for."""
    value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    return value.id if isinstance(value, ast.Name) else None


def _method(module: Module, node: ast.stmt, name: str, target: str) -> Signature:
    """Signature of a class's method, its bases' included."""
    if not isinstance(node, ast.ClassDef):
        return UNREADABLE
    for inner in reversed(node.body):
        if isinstance(inner, FUNCTIONS) and inner.name == name:
            return _function(module, inner, skip=0 if _decorated(inner, "staticmethod") else 1)
        if isinstance(inner, ast.Assign | ast.AnnAssign) and name in _assigned(inner):
            return UNREADABLE
    for base in node.bases:
        found = _find(module, ast.unparse(base))
        if found is None or not isinstance(found[1], ast.ClassDef):
            return UNREADABLE
        try:
            return _method(*found, name, target)
        except TargetError:
            continue
    raise TargetError(f"{target!r}: {node.name!r} has no {name!r}")


def _find(module: Module, name: str, depth: int = 0) -> tuple[Module, ast.stmt] | None:
    """Find a class, function or assignment, through `from x import y` where needed."""
    for node in reversed(list(_statements(module.body))):
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in _assigned(node):
            return module, node
        if isinstance(node, ast.ImportFrom) and depth < 8:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    spec = find_module(_absolute(module, node))
                    source = _parse(spec.name, spec.origin) if spec else None
                    inner = _find(source, alias.name, depth + 1) if source else None
                    return inner or (module, node)
    return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, those inside `if` and `try` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)
            yield from _statements(node.orelse)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    spec = find_module(module.name)
    is_package = spec is not None and spec.submodule_search_locations is not None
    parts = module.name.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def _assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _may_hide_names(module: Module) -> bool:
    """Whether a star import or a module `__getattr__` may provide further names."""
    return any(
        (isinstance(node, ast.ImportFrom) and node.names[0].name == "*")
        or (isinstance(node, ast.FunctionDef) and node.name == "__getattr__")
        for node in _statements(module.body)
    )


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _decorators(node: Definition) -> list[str]:
    plain = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return [ast.unparse(decorator).split(".")[-1] for decorator in plain]


def _decorated(node: Definition, name: str) -> bool:
    return name in _decorators(node)


def _function(module: Module, node: ast.FunctionDef | ast.AsyncFunctionDef, skip: int) -> Signature:
    if not HARMLESS.issuperset(_decorators(node)):
        return UNREADABLE
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults))
    pairs = [*zip(positional, [*defaults, *args.defaults], strict=True)][skip:]
    pairs += [*zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    parameters = {arg.arg: _parameter(module, arg.annotation, default) for arg, default in pairs}
    return Signature(parameters, open_ended=args.kwarg is not None)


def _parameter(module: Module, annotation: ast.expr | None, default: ast.expr | None) -> Parameter:
    """An argument with its default; a default of None allows None whatever the annotation says."""
    kind = _annotation(module, annotation)
    if isinstance(default, ast.Constant) and default.value is None:
        kind = kind if kind in (Any, None, type(None)) else kind | None
    return Parameter(kind, required=default is None)


def _class(module: Module, node: ast.ClassDef) -> Signature:
    own = {inner.name: inner for inner in node.body if isinstance(inner, ast.FunctionDef)}
    if not HARMLESS.issuperset(_decorators(node)) or node.keywords:
        return UNREADABLE
    if "__init__" in own:
        return _function(module, own["__init__"], skip=1)
    if "__new__" in own:
        return UNREADABLE
    parents = [_base(module, base) for base in node.bases]
    if not _decorated(node, "dataclass"):
        known = [parent for parent in parents if parent is not None]
        return next((p for p in known if p.parameters or p.open_ended), Signature())
    parameters: dict[str, Parameter] = {}
    open_ended = False
    for parent in reversed(parents):
        parameters |= parent.parameters if parent else {}
        open_ended |= bool(parent and parent.open_ended)
    parameters |= dict(_dataclass_fields(module, node))
    return Signature(parameters, open_ended)


def _base(module: Module, base: ast.expr) -> Signature | None:
    """Signature of a base class; None for the bases that add no argument."""
    name = ast.unparse(base).split("[")[0]
    if name.split(".")[-1] in NO_METHODS:
        return None
    found = _find(module, name) if name.isidentifier() else None
    if found is not None:
        owner, definition = found
        if isinstance(definition, ast.ClassDef):
            return _class(owner, definition)
    return UNREADABLE


def _dataclass_fields(module: Module, node: ast.ClassDef) -> Iterator[tuple[str, Parameter]]:
    for inner in node.body:
        if not isinstance(inner, ast.AnnAssign) or not isinstance(inner.target, ast.Name):
            continue
        if ast.unparse(inner.annotation).split("[")[0].split(".")[-1] in ("ClassVar", "KW_ONLY"):
            continue
        required = inner.value is None
        if isinstance(inner.value, ast.Call) and ast.unparse(inner.value.func).endswith("field"):
            given = {keyword.arg: keyword.value for keyword in inner.value.keywords}
            if isinstance(init := given.get("init"), ast.Constant) and init.value is False:
                continue
            required = not given.keys() & {"default", "default_factory"}
        kind = _parameter(module, inner.annotation, inner.value).annotation
        yield inner.target.id, Parameter(kind, required)


def _annotation(module: Module, node: ast.expr | None) -> Any:
    """Evaluate an annotation; whatever needs a heavy or unknown name reads `Any`."""
    if node is None:
        return Any
    try:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if not _only_names(node):
            return Any
        code = compile(ast.Expression(node), module.name, "eval")
        return eval(code, {"__builtins__": {}}, _LightNames(module))
    except Exception:
        return Any


def _only_names(node: ast.expr) -> bool:
    """Whether an annotation is put together from names as types are, so that evaluating it runs nobody's code."""
    parts = list(ast.walk(node))
    hidden = any(isinstance(part, ast.Attribute) and part.attr.startswith("_") for part in parts)
    return not hidden and all(isinstance(part, PARTS) for part in parts)


class _LightNames(collections.UserDict):
    """Names an annotation may use: builtin types and imports from light modules."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.module = module

    def __missing__(self, name: str) -> Any:
        for node in _statements(self.module.body):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._imported(_absolute(self.module, node), alias.name)
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if (alias.asname or alias.name) == name and name in LIGHT_MODULES:
                        return importlib.import_module(name)
            if isinstance(node, ast.Assign) and name in _assigned(node):
                return _annotation(self.module, node.value)
        found = getattr(builtins, name, Any)
        return found if isinstance(found, type) else Any

    def _imported(self, source: str, name: str) -> Any:
        if source in LIGHT_MODULES:
            return getattr(importlib.import_module(source), name, Any)
        spec = find_module(source)
        module = _parse(spec.name, spec.origin) if spec else None
        found = _find(module, name) if module else None
        if found is None or not isinstance(found[1], ast.Assign):
            return Any
        return _annotation(found[0], found[1].value)

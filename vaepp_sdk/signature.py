"""What a pipeline's `__call__` takes, read from its source: nothing is imported, so torch is not either."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk.errors import Fault, PluginError
from vaepp_sdk.options import nearest
from vaepp_sdk.spec.values import ValueType
from vaepp_sdk.text import clean, key_path, shown

__all__ = ["CallSignature", "Parameter", "pipeline_source", "read_signature", "signature_faults"]

_SCALARS = {"int": "integer", "float": "number", "str": "string", "bool": "boolean"}
_LISTS = {"list", "List", "tuple", "Tuple", "Sequence", "Iterable"}
_ANY_SCALAR = ValueType(frozenset(_SCALARS.values()), optional=True)
_ANYTHING = attrs.evolve(_ANY_SCALAR, items=attrs.evolve(_ANY_SCALAR, items=_ANY_SCALAR))

_SET_BY_VAEPP: Mapping[str, str] = {
    "generator": "write seed = 7 instead",
    "output_type": "leave it out",
    "return_dict": "leave it out",
    "callback": "leave it out",
    "callback_steps": "leave it out",
    "callback_on_step_end": "leave it out",
    "callback_on_step_end_tensor_inputs": "leave it out",
}


@attrs.frozen
class Parameter:
    """One argument of a pipeline's call.

    Attributes:
        kind: what a spec may write, or None where it takes only what no spec can write, as tensors.
        required: whether it has no default.
    """

    kind: ValueType | None
    required: bool


@attrs.frozen
class CallSignature:
    """The arguments of a pipeline's call.

    Attributes:
        owner: the pipeline class.
        parameters: the arguments it names.
    """

    owner: str
    parameters: Mapping[str, Parameter]

    @property
    def writable(self) -> list[str]:
        """The names a spec may write, `seed` included."""
        free = (name for name, parameter in self.parameters.items() if parameter.kind is not None)
        return [*(name for name in free if name not in _SET_BY_VAEPP), "seed"]


def pipeline_source(class_name: str, module: str | None = None) -> Path | None:
    """The file that defines a pipeline class, or None where there is none.

    Args:
        class_name: the pipeline class.
        module: the module that defines it; None looks through the pipelines of diffusers.
    """
    return _module_path(module) if module else _diffusers_path(class_name)


def read_signature(class_name: str, source: Path) -> CallSignature | None:
    """Read the signature of a pipeline class, its own or inherited.

    Args:
        class_name: the pipeline class.
        source: the file that defines it.

    Returns:
        The signature, or None where it cannot be told, as when the call is inherited from elsewhere.

    Raises:
        PluginError: the file is not Python.
    """
    path: Path | None = source
    seen: set[str] = set()
    name: str | None = class_name
    while name is not None and path is not None and name not in seen:
        seen.add(name)
        node = _class_node(path, name)
        if node is None:
            break
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__call__":
                return _signature(class_name, item.args)
        # A subclass inherits its call from the first pipeline among its bases, here or in diffusers.
        name = next((base.id for base in node.bases if isinstance(base, ast.Name)), None)
        if name is not None and _class_node(path, name) is None:
            path = _diffusers_path(name)
    return None


def signature_faults(signature: CallSignature, call: Mapping[str, Any], path: str = "$.call") -> list[Fault]:
    """Every fault in call arguments against the signature; `seed` is vaepp's own and always fine.

    None is fine for any argument that there is: it stands for the pipeline's default.
    """
    faults = []
    for key, value in call.items():
        where = key_path(path, key)
        parameter = signature.parameters.get(key)
        if key == "seed":
            continue
        if key in _SET_BY_VAEPP:
            faults.append(Fault(where, "vaepp sets this itself", _SET_BY_VAEPP[key]))
        elif parameter is None:
            # Also where the call ends in **kwargs: what it does not name, it mostly ignores in silence.
            problem = f"{signature.owner} takes no such argument"
            faults.append(Fault(where, problem, nearest(str(key)[:100], signature.writable)))
        elif parameter.kind is None:
            faults.append(Fault(where, "it takes an object that no spec can write", "leave it out"))
        elif value is not None and not parameter.kind.accepts(value):
            faults.append(Fault(where, f"found {shown(value)}", f"it must be {parameter.kind}"))
    return faults


def _signature(owner: str, arguments: ast.arguments) -> CallSignature:
    positional = [*arguments.posonlyargs, *arguments.args][1:]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = [
        *zip(positional, [*defaults, *arguments.defaults], strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    parameters = {argument.arg: _parameter(argument, default) for argument, default in pairs}
    return CallSignature(owner, parameters)


def _parameter(argument: ast.arg, default: ast.expr | None) -> Parameter:
    kind = _ANYTHING if argument.annotation is None else _kind(argument.annotation)
    if argument.arg.endswith("_embeds"):
        kind = ValueType()  # tensors, which some pipelines annotate as the text they are made from
    if isinstance(default, ast.Constant) and default.value is None:
        # Many pipelines write `prompt: str = None`.
        kind = attrs.evolve(kind, optional=True)
    writable = bool(kind.scalars) or kind.items is not None
    return Parameter(kind if writable else None, required=default is None)


def _kind(node: ast.expr) -> ValueType:
    """The TOML values that fit an annotation; what TOML cannot write adds nothing."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _kind(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.Constant) and node.value is None:
        return ValueType(optional=True)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _either([_kind(node.left), _kind(node.right)])
    if isinstance(node, ast.Subscript):
        return _subscript(_last_name(node.value), node.slice)
    name = _last_name(node)
    if name in _LISTS:
        return ValueType(items=_ANYTHING)
    if name == "Any":
        return _ANYTHING
    return ValueType(frozenset({_SCALARS[name]})) if name in _SCALARS else ValueType()


def _subscript(name: str, inner: ast.expr) -> ValueType:
    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    kinds = [_kind(part) for part in parts]
    if name == "Optional":
        return _either([*kinds, ValueType(optional=True)])
    if name == "Union":
        return _either(kinds)
    if name in _LISTS:
        items = _either(kinds)
        return ValueType(items=items) if items.scalars or items.items is not None else ValueType()
    return ValueType()


def _either(kinds: list[ValueType]) -> ValueType:
    lists = [kind.items for kind in kinds if kind.items is not None]
    return ValueType(
        frozenset().union(*(kind.scalars for kind in kinds)),
        items=_either(lists) if lists else None,
        optional=any(kind.optional for kind in kinds),
    )


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _class_node(path: Path, name: str) -> ast.ClassDef | None:
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    return None


@functools.lru_cache(maxsize=8)
def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise PluginError(str(path), f"it is not Python: {clean(str(error))}") from error


def _module_path(module: str) -> Path | None:
    """The source of a module; only its top-level package is looked up, which imports nothing."""
    top, *rest = module.split(".")
    for root in _roots(top):
        stem = root.joinpath(*rest)
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    return None


def _roots(top: str) -> Iterator[Path]:
    found = importlib.util.find_spec(top)
    if found is None:
        return
    if found.submodule_search_locations is not None:
        yield from map(Path, found.submodule_search_locations)
    elif found.origin is not None:
        yield Path(found.origin).with_suffix("")


@functools.lru_cache(maxsize=32)
def _diffusers_path(class_name: str) -> Path | None:
    """The source file in diffusers that defines a pipeline class."""
    start = f"class {class_name}("
    for root in _roots("diffusers"):
        for path in sorted((root / "pipelines").rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if text.startswith(start) or f"\n{start}" in text:
                return path
    return None

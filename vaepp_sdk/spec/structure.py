"""Turns plain tables into spec classes, strictly, and finds every fault on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import attrs
from cattrs import AttributeValidationNote, ClassValidationError, Converter, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn, override

from vaepp_sdk.errors import Fault
from vaepp_sdk.options import nearest
from vaepp_sdk.spec.adapters import read_adapters
from vaepp_sdk.spec.calls import call_faults, copied, name_faults
from vaepp_sdk.spec.values import ABOUT, About, RefusedError, value_type
from vaepp_sdk.text import key_path, shown

__all__ = ["keys", "structure", "table_class", "unknown_key"]

ClassT = TypeVar("ClassT")
_MAX_UNKNOWN = 10
_NO_CODE = "vaepp runs no code from a model repository; leave the key out"


def keys(cls: type) -> dict[str, attrs.Attribute[Any]]:
    """The fields of a spec class that a spec can write, by name."""
    attrs.resolve_types(cls)
    return {field.name: field for field in attrs.fields(cls) if ABOUT in field.metadata}


def structure(raw: Mapping[str, Any], cls: type[ClassT]) -> tuple[ClassT | None, list[Fault]]:
    """Build a spec class from plain tables.

    Returns:
        The object and no fault, or None and every fault.
    """
    plain: type = cls
    try:
        return _converter(plain).structure(raw, cls), []
    except ClassValidationError as error:
        return None, list(_faults(error, "$", cls, _homes(cls)))


def unknown_key(path: str, key: object, known: Iterable[str], home: str | None = None) -> Fault:
    """The fault of a key that is not known.

    Args:
        path: the table it stands in.
        key: the key.
        known: the keys of that table.
        home: the table it does belong to, where there is one.
    """
    if key == "trust_remote_code":
        return Fault(key_path(path, key), "code from a model repository is asked for", _NO_CODE)
    fix = f"it belongs in [{home}]" if home else nearest(key[:100] if isinstance(key, str) else "", known)
    return Fault(key_path(path, key), "there is no such key", fix)


@functools.cache
def _converter(cls: type) -> Converter:
    """A converter that knows one spec class; cattrs writes and compiles code for it, so it is kept."""
    converter = Converter(detailed_validation=True, forbid_extra_keys=True)
    _register(converter, cls)
    return converter


def _register(converter: Converter, cls: type) -> None:
    """Teach a converter one spec class and those it is made of."""
    hooks: dict[str, Any] = {}
    for field in attrs.fields(cls):
        if field.name in keys(cls):
            hooks[field.name] = override(struct_hook=_hook(converter, field))
        else:
            hooks[field.name] = override(omit=True)
    converter.register_structure_hook(cls, make_dict_structure_fn(cls, converter, **hooks))


def _hook(converter: Converter, field: attrs.Attribute[Any]) -> Callable[[Any, Any], Any]:
    about: About = field.metadata[ABOUT]
    if field.name == "lora":
        return lambda value, _: read_adapters(value)
    inner = table_class(field)
    if inner is not None:
        table = inner
        _register(converter, table)
        return lambda value, _: converter.structure(_table(value), table)
    if field.name in ("call", "options"):
        path = "$.call" if field.name == "call" else "$.vae.options"
        return lambda value, _: _free_table(value, path)
    kind = value_type(field.type)

    def scalar(value: Any, _: Any) -> Any:
        problem = about.problem(kind, value)
        if problem:
            raise RefusedError(f"found {shown(value)}", problem)
        return float(value) if "number" in kind.scalars else value

    return scalar


def table_class(field: attrs.Attribute[Any]) -> type | None:
    """The spec class behind a field, or None where the field is a scalar or a free table."""
    for option in getattr(field.type, "__args__", (field.type,)):
        if isinstance(option, type) and attrs.has(option):
            return option
    return None


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RefusedError(f"found {shown(value)}", "it must be a table")
    return dict(value)


def _free_table(value: Any, path: str) -> dict[str, Any]:
    """A table whose keys are checked later, against the pipeline or the strategy; its values are plain."""
    table = _table(value)
    faults = call_faults(table, path) if path == "$.call" else []
    faults += name_faults(table, path)
    if faults:
        raise _FaultsFoundError(faults)
    return copied(table)


class _FaultsFoundError(Exception):
    """Faults that already know their paths."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__(faults)


def _homes(root: type) -> dict[str, str]:
    """The table each key of a spec belongs to, for keys that stand in the wrong one."""
    tables = {name: table_class(field) for name, field in keys(root).items()}
    return {key: name for name, table in tables.items() if table is not None for key in keys(table)}


def _faults(error: ClassValidationError, path: str, cls: type, homes: Mapping[str, str]) -> Iterable[Fault]:
    for cause in error.exceptions:
        if isinstance(cause, ForbiddenExtraKeysError):
            yield from _extra_faults(cause, path, cls, homes)
            continue
        note = next(note for note in cause.__notes__ if isinstance(note, AttributeValidationNote))
        where = key_path(path, note.name)
        field = keys(cls)[note.name]
        if isinstance(cause, ClassValidationError):
            yield from _faults(cause, where, table_class(field) or cls, homes)
        elif isinstance(cause, RefusedError):
            yield Fault(where, cause.found, cause.fix)
        elif isinstance(cause, _FaultsFoundError):
            yield from cause.faults
        else:
            # All that cattrs itself can still object to is a key without default that is not there.
            yield Fault(where, "it is missing", _how_to_write(field))


def _how_to_write(field: attrs.Attribute[Any]) -> str:
    """How a table or a key that has no default is written."""
    table = table_class(field)
    if table is None:
        return f"write it: {field.metadata[ABOUT].help}"
    needed = [name for name, inner in keys(table).items() if inner.default is attrs.NOTHING]
    return f"write a table [{field.name}] with {' and '.join(needed)}"


def _extra_faults(
    error: ForbiddenExtraKeysError, path: str, cls: type, homes: Mapping[str, str]
) -> Iterable[Fault]:
    extra = sorted(error.extra_fields, key=shown)
    for key in extra[:_MAX_UNKNOWN]:
        yield unknown_key(path, key, keys(cls), homes.get(key))
    if len(extra) > _MAX_UNKNOWN:
        more = len(extra) - _MAX_UNKNOWN
        yield Fault(
            path, f"there are {more} more unknown keys", f"known here: {', '.join(sorted(keys(cls)))}"
        )

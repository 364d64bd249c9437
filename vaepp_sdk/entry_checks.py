"""What is refused of entries where plugins make them: values of another kind, names that nothing bears."""

from __future__ import annotations

import collections.abc
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import attrs

from vaepp_sdk.text import clean

__all__ = [
    "AUTO",
    "checked",
    "declared_names",
    "distinct_names",
    "free_name",
    "option_problem",
    "own_default",
    "reference",
]

AUTO = "auto"
"""What a spec writes to leave the choice of a strategy to the entry's rule, made anew for each shape."""

_KINDS: Mapping[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "boolean": (bool,),
}
_WORDS: Mapping[Any, tuple[str, str]] = {
    str: ("a string that is not empty", "strings"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("True or False", "booleans"),
    type(None): ("None", "None"),
    Any: ("anything", "anything"),
}


def checked(cls: type, fields: list[attrs.Attribute[Any]]) -> list[attrs.Attribute[Any]]:
    """A field transformer of attrs: every value must be of the type its field is annotated with."""
    del cls
    own = (field.validator for field in fields)
    both = [attrs.validators.and_(_is_of_its_type, *([rule] if rule else [])) for rule in own]
    return [field.evolve(validator=rule) for field, rule in zip(fields, both, strict=True)]


def option_problem(option: Any, value: Any) -> str | None:
    """What would work for an `Option` instead of a value, or None where it is fine."""
    kinds = _KINDS[option.kind]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        return f"it must be {'an' if option.kind == 'integer' else 'a'} {option.kind}"
    if option.choices and value not in option.choices:
        return f"it must be one of {', '.join(map(repr, option.choices))}"
    if isinstance(value, float) and not math.isfinite(value):
        return "it must be a finite number"
    number = value if isinstance(value, int | float) else 0
    if option.minimum is not None and number < option.minimum:
        return f"it must be at least {option.minimum:g}"
    if option.maximum is not None and number > option.maximum:
        return f"it must be at most {option.maximum:g}"
    return None


def own_default(option: Any, field: attrs.Attribute[Any], value: object) -> None:
    """A validator of attrs, for the last field: an option takes its own default."""
    del field, value
    problem = option_problem(option, option.default) if option.default is not None else None
    if problem is not None:
        raise _refused(option, "default", option.default, problem)


def free_name(entry: Any, field: attrs.Attribute[Any], value: str) -> None:
    """A validator of attrs: no strategy has the name that leaves the choice open."""
    if value == AUTO:
        raise _refused(entry, field.name, value, "that name leaves the choice open; take another one")


def distinct_names(entry: Any, field: attrs.Attribute[Any], value: tuple[Any, ...]) -> None:
    """A validator of attrs: no two options have one name."""
    names = [option.name for option in value]
    if len(set(names)) < len(names):
        raise _refused(entry, field.name, tuple(names), "each option has a name of its own")


def declared_names(entry: Any, field: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
    """A validator of attrs: these are names of the strategy's own options."""
    known = [option.name for option in entry.options]
    unknown = [name for name in value if name not in known]
    if unknown:
        fix = f"it must name options of the strategy: {', '.join(known) or 'it has none'}"
        raise _refused(entry, field.name, value, fix)


def reference(entry: Any, field: attrs.Attribute[Any], value: Any) -> None:
    """A validator of attrs: what is named, not given, is named as `"module:attribute"`."""
    if isinstance(value, str) and not all(value.partition(":")):
        raise _refused(entry, field.name, value, 'it must be of the form "module:attribute", or a callable')


def _is_of_its_type(entry: Any, field: attrs.Attribute[Any], value: Any) -> None:
    hint = _hints(entry.__class__)[field.name]
    if not _fits(value, hint):
        as_in = f", as in {(value,)!r}" if typing.get_origin(hint) is tuple and isinstance(value, str) else ""
        raise _refused(entry, field.name, value, f"it must be {_words(hint)}{as_in}")


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    """The types of a class's fields; what would bring torch along is as good as anything."""
    return typing.get_type_hints(cls, localns={"VaeFacts": Any, "Work": Any})


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, its items and values included."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is tuple:
        many = isinstance(value, tuple) and (inner[-1] is ... or len(value) == len(inner))
        return many and all(_fits(item, inner[0]) for item in value)
    if origin is collections.abc.Mapping:
        return isinstance(value, Mapping) and all(
            _fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items()
        )
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, str):
        return hint is str and bool(value)
    return isinstance(value, int | float if hint is float else hint)


def _words(hint: Any, several: bool = False) -> str:
    """A type as a person would say it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(one, several) for one in inner))
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is collections.abc.Callable:
        return "functions" if several else "a function"
    if origin is tuple:
        return f"{'tuples' if several else 'a tuple'} of {_words(inner[0], several=True)}"
    if origin is collections.abc.Mapping:
        return f"a mapping of {_words(inner[0], True)} to {_words(inner[1], True)}"
    if hint in _WORDS:
        return _WORDS[hint][several]
    return f"{hint.__name__} entries" if several else f"a {hint.__name__}"


def _refused(entry: Any, field: str, value: Any, fix: str) -> ValueError:
    name = getattr(entry, "name", None)
    whose = f"{type(entry).__name__} {name!r}" if isinstance(name, str) else type(entry).__name__
    return ValueError(f"{whose}: {field} is {clean(repr(value), 100)}; {fix}")

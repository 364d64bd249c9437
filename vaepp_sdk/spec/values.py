"""What a key takes: kinds of TOML values without coercion, ranges and choices."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import attrs

from vaepp_sdk.text import clean

__all__ = [
    "ABOUT",
    "MAX_INTEGER",
    "MAX_TEXT",
    "About",
    "RefusedError",
    "ValueType",
    "about",
    "text_problem",
    "value_type",
]

ABOUT = "vaepp"
"""The name under which a field's `About` stands in its attrs metadata."""

MAX_INTEGER = 2**63 - 1
MAX_TEXT = 100_000

_SCALARS: Mapping[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean"}
_ARTICLES: Mapping[str, str] = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
}


class RefusedError(Exception):
    """A value that its key cannot take; becomes a `Fault` where the path is known.

    Args:
        found: what was found.
        fix: what would work.
    """

    def __init__(self, found: str, fix: str) -> None:
        self.found = found
        self.fix = fix
        super().__init__(found, fix)


@attrs.frozen
class ValueType:
    """The values a key takes; nothing is ever converted to fit.

    Attributes:
        scalars: any of `integer`, `number` (an integer will do), `string`, `boolean`.
        items: what a list's items must be, or None where no list is taken.
        optional: whether None is taken; TOML cannot write it, Python can.
    """

    scalars: frozenset[str] = frozenset()
    items: ValueType | None = None
    optional: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether a value has one of the kinds."""
        if value is None:
            return self.optional
        if isinstance(value, list):
            return self.items is not None and all(self.items.accepts(item) for item in value)
        if isinstance(value, bool):
            return "boolean" in self.scalars
        if isinstance(value, int):
            return not self.scalars.isdisjoint({"integer", "number"})
        if isinstance(value, float):
            return "number" in self.scalars
        return isinstance(value, str) and "string" in self.scalars

    def __str__(self) -> str:
        names = [_ARTICLES[kind] for kind in _ARTICLES if kind in self.scalars]
        if self.items is not None:
            names.append(f"a list, each item {self.items}")
        return " or ".join(names)


def value_type(annotation: Any) -> ValueType:
    """The values that fit a field's annotation: a scalar, or a scalar or None."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    scalars = frozenset(_SCALARS[option] for option in options if option is not type(None))
    return ValueType(scalars, optional=type(None) in options)


@attrs.frozen(kw_only=True)
class About:
    """What the reference, the schema and the checks know about one key.

    Attributes:
        help: one sentence, with the unit.
        minimum: the smallest number allowed.
        maximum: the largest number allowed.
        choices: the only strings allowed, or empty.
        pattern: what a string must match as a whole, or None.
        form: the pattern in words.
    """

    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str | None = None
    form: str = ""

    def problem(self, kind: ValueType, value: Any) -> str | None:
        """What would work instead of `value`, or None where it is fine."""
        if not kind.accepts(value):
            return f"it must be {kind}"
        if isinstance(value, str):
            if self.choices and value not in self.choices:
                return f"it must be one of {', '.join(self.choices)}"
            if self.pattern is not None and not re.fullmatch(self.pattern, value):
                return f"it must be {self.form}"
            return text_problem(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self._number_problem(value)
        return None

    def _number_problem(self, value: int | float) -> str | None:
        if isinstance(value, float) and not math.isfinite(value):
            return "it must be a finite number"
        low = -MAX_INTEGER if self.minimum is None else self.minimum
        high = MAX_INTEGER if self.maximum is None else self.maximum
        if isinstance(value, float) and self.minimum is None and self.maximum is None:
            return None
        if low <= value <= high:
            return None
        if self.minimum is not None and value < low:
            return f"it must be at least {self.minimum:g}"
        bound = str(self.maximum if isinstance(self.maximum, int) else f"{high:g}")
        return f"it must be at most {bound}"


def about(help: str, **limits: Any) -> dict[str, About]:
    """Metadata for an attrs field that is a key of the spec; arguments as `About`."""
    return {ABOUT: About(help=help, **limits)}


def text_problem(text: str) -> str | None:
    """What is wrong with a string as such, whatever it is for."""
    if len(text) > MAX_TEXT:
        return f"it must be at most {MAX_TEXT} characters, and has {len(text)}"
    if "\0" in text:
        return "it must hold no NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = clean(text[error.start : error.start + 1])
        return f"it must be valid Unicode; {found} at character {error.start + 1} is half of a pair"
    return None

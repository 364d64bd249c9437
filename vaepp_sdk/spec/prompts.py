"""Requests from a file of JSON lines, as `vaepp-run --prompts` takes them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk.errors import Fault, SpecError
from vaepp_sdk.spec.calls import MAX_CALLS, copied, name_faults
from vaepp_sdk.spec.reading import Wanted, read_text
from vaepp_sdk.text import clean, shown

__all__ = ["MAX_PROMPT_BYTES", "NamedCall", "Upcoming", "read_prompts"]

MAX_PROMPT_BYTES = 16 << 20
"""The largest file of prompts read."""

_WANTED = Wanted("the path of a file of JSON lines", "a file of prompts", MAX_PROMPT_BYTES)
_FIX = 'write one JSON object a line, as in {"prompt": "a red cube", "seed": 7}'


@attrs.frozen
class NamedCall:
    """Arguments of one request to come.

    Attributes:
        name: what the request is called, for messages.
        path: where its arguments stand, for faults.
        arguments: those that replace the ones of `[call]`.
    """

    name: str
    path: str
    arguments: dict[str, Any]


@attrs.frozen
class Upcoming:
    """Requests to come, and what is wrong with how they are written.

    Attributes:
        calls: in the order they are served.
        faults: of those that are none.
    """

    calls: Sequence[NamedCall] = ()
    faults: Sequence[Fault] = ()


def read_prompts(path: Path) -> Upcoming:
    """Read a file with one JSON object a line, each with keys of `[call]`; empty lines do not count.

    Raises:
        SpecError: the file cannot be read, is too large, or holds no request or too many.
    """
    name = clean(str(path), 300)
    lines = [
        (f"{name}:{number}", line)
        for number, line in enumerate(read_text(path, _WANTED).split("\n"), 1)
        if line.strip()
    ]
    if not 1 <= len(lines) <= MAX_CALLS:
        found, fix = f"it holds {len(lines)} requests", f"1 to {MAX_CALLS} lines work"
        raise SpecError([Fault("$", found, fix)], name)
    calls: list[NamedCall] = []
    faults: list[Fault] = []
    for place, line in lines:
        try:
            arguments = _object(line)
        except _NoObjectError as problem:
            faults.append(Fault(place, str(problem), _FIX))
            continue
        call_path = f"{place}: $"
        faults += name_faults(arguments, call_path)
        calls.append(NamedCall(place, call_path, copied(arguments)))
    return Upcoming(calls, faults)


class _NoObjectError(ValueError):
    """What is wrong with a line."""


def _object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(
            line, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_table
        )
    except _NoObjectError:
        raise
    except json.JSONDecodeError as error:
        raise _NoObjectError(f"it is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise _NoObjectError("it is nested too deeply") from None
    except ValueError:
        # The only one left is Python's own refusal of huge integers.
        raise _NoObjectError("it holds a number with thousands of digits") from None
    if not isinstance(found, dict):
        raise _NoObjectError(f"found {shown(found)}")
    return found


def _refuse_constant(name: str) -> float:
    raise _NoObjectError(f"it is not JSON: {name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _NoObjectError(f"{clean(text, 40)} is too large")
    return number


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; two values of one name would leave it open which is meant."""
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise _NoObjectError(f"the name {shown(key)} stands there twice")
        table[key] = value
    return table

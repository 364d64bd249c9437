"""What can be said about `[call]` before the pipeline is known: common keys, and plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs

from vaepp_sdk.errors import Fault
from vaepp_sdk.spec.values import MAX_INTEGER, About, ValueType, text_problem
from vaepp_sdk.text import key_path, shown

__all__ = [
    "COMMON",
    "COUNTS",
    "MAX_CALLS",
    "MAX_IMAGES",
    "CommonKey",
    "call_faults",
    "copied",
    "each_prompt",
    "name_faults",
    "split_calls",
]

MAX_IMAGES = 1024
"""The most images of one request, and the most prompts."""

MAX_CALLS = 10_000
"""The most requests of one spec, and of one file of prompts."""

COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")
"""The keys that say how many pictures or clips each prompt makes; a pipeline has one of them."""

_MAX_DEPTH = 4


@attrs.frozen
class CommonKey:
    """A key of `[call]` whose meaning is the same for every pipeline that has it."""

    kind: ValueType
    about: About


def _integer(help: str, minimum: int, maximum: int) -> CommonKey:
    kind = ValueType(frozenset({"integer"}), optional=True)
    return CommonKey(kind, About(help=help, minimum=minimum, maximum=maximum))


_TEXT = ValueType(frozenset({"string"}))
_TEXTS = ValueType(frozenset({"string"}), items=_TEXT, optional=True)

COMMON: Mapping[str, CommonKey] = {
    "prompt": CommonKey(_TEXTS, About(help="What to paint; a list paints several.")),
    "negative_prompt": CommonKey(_TEXTS, About(help="What to keep out; a list has one per prompt.")),
    "height": _integer("The picture's height in pixels.", 1, 65536),
    "width": _integer("The picture's width in pixels.", 1, 65536),
    "num_inference_steps": _integer("Denoising steps.", 1, 10_000),
    "max_sequence_length": _integer(
        "The most tokens of a prompt; shorter ones may be padded to it.", 1, 65536
    ),
    "num_images_per_prompt": _integer("Pictures of each prompt.", 1, MAX_IMAGES),
    "num_videos_per_prompt": _integer("Clips of each prompt.", 1, MAX_IMAGES),
    "guidance_scale": CommonKey(
        ValueType(frozenset({"number"}), optional=True), About(help="How strongly the prompt guides.")
    ),
    "seed": _integer(
        "Picture i starts from noise of seed + i; left out, a seed is drawn and printed.", 0, MAX_INTEGER
    ),
}


def each_prompt(call: Mapping[str, Any]) -> int:
    """How many pictures or clips each prompt of a call makes."""
    return next((int(call[key]) for key in COUNTS if call.get(key)), 1)


def call_faults(call: Mapping[str, Any], path: str = "$.call") -> list[Fault]:
    """Every fault in call arguments that can be seen without the pipeline; None leaves one to it."""
    faults = []
    for key, value in call.items():
        if value is None:
            continue
        where = key_path(path, key)
        common = COMMON.get(key)
        if common is not None and not common.kind.accepts(value):
            faults.append(Fault(where, f"found {shown(value)}", f"it must be {common.kind}"))
            continue
        if common is not None and not isinstance(value, list):
            problem = common.about.problem(common.kind, value)
            if problem:
                faults.append(Fault(where, f"found {shown(value)}", problem))
            continue
        faults += _value_faults(where, value, 1)
    return faults + _prompt_faults(call.get("prompt"), path)


def split_calls(
    tables: Mapping[str, Any],
) -> tuple[dict[str, Any], tuple[Mapping[str, Any], ...], list[Fault]]:
    """Take `[[call]]` entries apart.

    Args:
        tables: a whole spec, whose `call` is one table or a list of them.

    Returns:
        The tables with the first entry as `call`, the entries after it, and the faults of all entries.
    """
    entries = tables.get("call")
    if not isinstance(entries, list):
        return dict(tables), (), []
    faults = _entry_faults(entries)
    if faults:
        return {**tables, "call": {}}, (), faults
    first, *more = (copied(entry) for entry in entries)
    return {**tables, "call": first}, tuple(more), []


def _entry_faults(entries: list[Any]) -> list[Fault]:
    if not 1 <= len(entries) <= MAX_CALLS:
        return [Fault("$.call", f"found {shown(entries)}", f"1 to {MAX_CALLS} entries work")]
    faults = []
    for index, entry in enumerate(entries):
        path = f"$.call[{index}]"
        if isinstance(entry, Mapping):
            faults += [*call_faults(entry, path), *name_faults(entry, path)]
        else:
            faults.append(Fault(path, f"found {shown(entry)}", "it must be a table, written under [[call]]"))
    return faults


def name_faults(table: Mapping[Any, Any], path: str) -> list[Fault]:
    """The faults of keys that cannot be the name of an argument or an option."""
    fix = "write a shorter name"
    return [
        Fault(key_path(path, key), "found a key that cannot be a name", fix)
        for key in table
        if not isinstance(key, str) or len(key) > 100
    ]


def copied(table: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose lists are its own: some pipelines write into the lists they are given."""
    return {key: _copied_value(value) for key, value in table.items()}


def _copied_value(value: Any) -> Any:
    return [_copied_value(item) for item in value] if isinstance(value, list) else value


def _prompt_faults(prompt: Any, path: str) -> list[Fault]:
    if isinstance(prompt, list) and not 1 <= len(prompt) <= MAX_IMAGES:
        fix = f"a list of prompts must hold 1 to {MAX_IMAGES}"
        return [Fault(f"{path}.prompt", f"found {shown(prompt)}", fix)]
    return []


def _value_faults(where: str, value: Any, depth: int) -> list[Fault]:
    """The first fault of one value that nothing more is known about: it must be plain, finite and bounded."""
    if isinstance(value, list):
        if depth > _MAX_DEPTH:
            return [Fault(where, "found lists nested too deeply", f"at most {_MAX_DEPTH} levels work")]
        for index, item in enumerate(value):
            faults = _value_faults(f"{where}[{index}]", item, depth + 1)
            if faults:
                return faults
        return []
    problem = _plain_problem(value)
    return [Fault(where, f"found {shown(value)}", problem)] if problem else []


def _plain_problem(value: Any) -> str | None:
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return None if abs(value) <= MAX_INTEGER else "it must fit in 64 bits"
    if isinstance(value, float):
        return None if math.isfinite(value) else "it must be a finite number"
    if isinstance(value, str):
        return text_problem(value)
    return "it must be a string, a number, true or false, or a list of these"

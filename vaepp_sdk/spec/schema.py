"""The spec's JSON schema, for editors that complete and check TOML; made from the live classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from vaepp_sdk.spec.calls import COMMON, MAX_CALLS
from vaepp_sdk.spec.pipeline_spec import PipelineSpec
from vaepp_sdk.spec.structure import keys, table_class
from vaepp_sdk.spec.values import ABOUT, About, ValueType, value_type

__all__ = ["schema_text", "spec_schema"]


_ADAPTER: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["path"],
    "properties": {"path": {"type": "string"}, "weight": {"type": "number"}},
}


def spec_schema() -> dict[str, Any]:
    """The schema of a whole spec."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vaepp pipeline spec",
        **_table(PipelineSpec),
    }


def schema_text() -> str:
    """The schema as the file that is committed."""
    return json.dumps(spec_schema(), indent=2) + "\n"


def _table(cls: type) -> dict[str, Any]:
    fields = keys(cls)
    required = [name for name, field in fields.items() if field.default is attrs.NOTHING]
    table: dict[str, Any] = {"type": "object", "additionalProperties": False}
    if required:
        table["required"] = required
    table["properties"] = {name: _field(field) for name, field in fields.items()}
    return table


def _field(field: attrs.Attribute[Any]) -> dict[str, Any]:
    about: About = field.metadata[ABOUT]
    inner = table_class(field)
    if inner is not None:
        return {"description": about.help, **_table(inner)}
    if field.name == "call":
        common = {name: _value(key.kind, key.about) for name, key in COMMON.items()}
        entry = {"type": "object", "properties": common}
        several = {"type": "array", "minItems": 1, "maxItems": MAX_CALLS, "items": entry}
        return {"description": about.help, "anyOf": [entry, several]}
    if field.name == "options":
        return {"description": about.help, "type": "object"}
    if field.name == "lora":
        items = {"anyOf": [{"type": "string"}, _ADAPTER]}
        return {"description": about.help, "type": "array", "items": items}
    found = _value(value_type(field.type), about)
    if field.default is not attrs.NOTHING and field.default is not None:
        found["default"] = field.default
    return found


def _value(kind: ValueType, about: About) -> dict[str, Any]:
    limits: Mapping[str, Any] = {
        "minimum": about.minimum,
        "maximum": about.maximum,
        "pattern": f"^{about.pattern}$" if about.pattern else None,
        "enum": list(about.choices) or None,
    }
    written = {name: limit for name, limit in limits.items() if limit is not None}
    return {"description": about.help, **_type(kind), **written}


def _type(kind: ValueType) -> dict[str, Any]:
    names = sorted(kind.scalars)
    if kind.items is None:
        return {"type": names[0] if len(names) == 1 else names}
    return {"type": [*names, "array"], "items": _type(kind.items)}

"""The key tables of `docs/spec.md`, made from the live classes.

`python -m vaepp_sdk.spec.reference docs` brings `spec.md` and `spec.schema.json` in a folder up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk.spec.calls import COMMON
from vaepp_sdk.spec.pipeline_spec import PipelineSpec
from vaepp_sdk.spec.schema import schema_text
from vaepp_sdk.spec.structure import keys, table_class
from vaepp_sdk.spec.values import ABOUT, About, ValueType, value_type
from vaepp_sdk.text import shown

__all__ = ["key_tables", "updated"]

_HEAD = "| key | type | default | range | meaning |\n| --- | --- | --- | --- | --- |"
_BLOCK = re.compile(r"<!-- keys: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def key_tables() -> dict[str, str]:
    """A Markdown table of each spec table's keys, by the spec table's name."""
    tables = {}
    for name, field in keys(PipelineSpec).items():
        inner = table_class(field)
        if inner is not None:
            tables[name] = "\n".join([_HEAD, *(_field_row(key) for key in keys(inner).values())])
    rows = [_row(name, key.kind, "", key.about) for name, key in COMMON.items()]
    tables["call"] = "\n".join([_HEAD, *rows])
    return tables


def updated(text: str) -> str:
    """A page with the tables between its markers replaced by the current ones."""
    tables = key_tables()
    return _BLOCK.sub(lambda found: f"<!-- keys: {found[1]} -->\n{tables[found[1]]}\n<!-- end -->", text)


def _field_row(field: attrs.Attribute[Any]) -> str:
    about: About = field.metadata[ABOUT]
    if field.name == "options":
        return _row(field.name, None, "empty", about)
    if field.name == "lora":
        return _row(field.name, "a list", "empty", about)
    if field.default is attrs.NOTHING:
        default = "required"
    else:
        default = "none" if field.default is None else f"`{shown(field.default)}`"
    return _row(field.name, value_type(field.type), default, about)


def _row(name: str, kind: ValueType | str | None, default: str, about: About) -> str:
    cells = [f"`{name}`", str(kind) if kind else "a table", default, _range(about), about.help]
    return f"| {' | '.join(cells)} |"


def _range(about: About) -> str:
    if about.choices:
        return ", ".join(f"`{choice}`" for choice in about.choices)
    if about.form:
        return about.form
    if about.minimum is None or about.maximum is None:
        return ""
    return f"{about.minimum} to {about.maximum}"


def main(arguments: Sequence[str]) -> None:
    """Rewrite the two files in the folder that is named."""
    folder = Path(arguments[0])
    page = folder / "spec.md"
    page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
    (folder / "spec.schema.json").write_text(schema_text(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

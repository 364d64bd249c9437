"""The reference page and the editor schema follow the classes."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
import tomli

from vaepp_sdk.errors import SpecError
from vaepp_sdk.spec import PipelineSpec
from vaepp_sdk.spec.calls import COMMON
from vaepp_sdk.spec.reference import main, updated
from vaepp_sdk.spec.schema import schema_text, spec_schema
from vaepp_sdk.spec.structure import keys, table_class
from vaepp_sdk.text import shown

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "spec.md").read_text(encoding="utf-8")
HINT = "run `python -m vaepp_sdk.spec.reference docs`"


def test_the_schema_is_current() -> None:
    assert (DOCS / "spec.schema.json").read_text(encoding="utf-8") == schema_text(), HINT


def test_the_tables_are_current() -> None:
    assert updated(PAGE) == PAGE, HINT


def test_every_key_stands_in_the_reference_with_its_default() -> None:
    for name, field in keys(PipelineSpec).items():
        assert f"## `[{name}]`" in PAGE
        section = PAGE.split(f"## `[{name}]`")[1].split("\n## ")[0]
        for key, inner in keys(table_class(field) or type(None)).items() if table_class(field) else ():
            (row,) = (line for line in section.splitlines() if line.startswith(f"| `{key}` |"))
            if isinstance(inner.default, str | int | float | bool):
                assert f"`{shown(inner.default)}`" in row
    for key in COMMON:
        assert f"| `{key}` |" in PAGE


def test_every_key_stands_in_the_schema() -> None:
    schema = spec_schema()
    assert set(schema["properties"]) == set(keys(PipelineSpec))
    for name, field in keys(PipelineSpec).items():
        table = table_class(field)
        if table is not None:
            inner = schema["properties"][name]
            assert set(inner["properties"]) == {key.name for key in attrs.fields(table)}
            assert inner["additionalProperties"] is False
    assert schema["properties"]["model"]["required"] == ["id"]
    json.loads(schema_text())


def test_the_pages_example_loads() -> None:
    block = PAGE.split("```toml\n")[1].split("```")[0]
    spec = PipelineSpec.load(tomli.loads(block))
    assert spec.parallel.dims.dit_parallel_size == 2


def test_the_pages_refusal_is_what_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pipeline.toml").write_text(
        '[model]\nid = "org/name"\n[parallel]\ntensor_parallel_size = "2"\n'
        '[vae]\nstrategi = "x"\n[call]\nseed = -1'
    )
    with pytest.raises(SpecError) as caught:
        PipelineSpec.load("pipeline.toml")
    assert str(caught.value) in PAGE


def test_the_files_are_rewritten(tmp_path: Path) -> None:
    (tmp_path / "spec.md").write_text("<!-- keys: output -->\nold\n<!-- end -->\n")
    main([str(tmp_path)])
    assert "| `overwrite` |" in (tmp_path / "spec.md").read_text()
    assert (tmp_path / "spec.schema.json").read_text() == schema_text()

"""The table of dimensions in the documentation, and what `vaepp-run --plugins` prints, are the entries'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vaepp_sdk.cli.plugins import list_plugins
from vaepp_sdk.parallel.dims import AXES
from vaepp_sdk.registry import default_registry

PAGE = Path(__file__).resolve().parents[2] / "docs" / "dimensions.md"


def test_the_table_is_that_of_the_entries() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index("| pipeline | dimensions |") + 2
    entries = default_registry().pipelines
    wanted = [
        f"| {name} | {', '.join(entry.dit.axes)} |" for name, entry in sorted(entries.items()) if entry.dit
    ]
    assert lines[start : lines.index("", start)] == wanted


def test_axes_of_an_entry_are_named_as_everywhere() -> None:
    plan = default_registry().pipelines["ZImagePipeline"].dit
    assert plan is not None
    assert plan.axes == AXES


def test_plugins_are_listed_with_their_dimensions(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_plugins() == 0
    assert json.loads(capsys.readouterr().out)["dimensions"]["ZImagePipeline"] == list(AXES)

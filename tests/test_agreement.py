"""What ranks state before they load: another spec, version or plugin on one of them is seen and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vaepp_sdk import agreement
from vaepp_sdk.agreement import start_facts
from vaepp_sdk.parallel.gate import differences
from vaepp_sdk.registry import Registry
from vaepp_sdk.resolve import resolve
from vaepp_sdk.spec import PipelineSpec


def facts(model: Path, *overrides: str) -> dict[str, str]:
    tables: dict[str, Any] = {
        "model": {"id": str(model), "dtype": "float32"},
        "call": {"prompt": "a", "height": 64, "width": 64, "seed": 3},
    }
    registry = Registry.load()
    return start_facts(resolve(PipelineSpec.load(tables, overrides), registry), registry)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.dtype=bfloat16", 'model.dtype is "float32" on ranks 0, 1 and "bfloat16" on rank 2'),
        ("call.seed=4", '"seed": 3'),
        ("vae.strategy=patch", 'vae.strategy is "auto" on ranks 0, 1 and "patch" on rank 2'),
    ],
)
def test_another_spec(override: str, words: str, tiny_model: Path) -> None:
    same = facts(tiny_model)
    assert differences([same, facts(tiny_model), same]) == ""
    assert words in differences([same, same, facts(tiny_model, override)])


def test_other_software(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = facts(tiny_model)
    monkeypatch.setattr(agreement, "software", lambda: "vaepp 9.9")
    assert "and vaepp 9.9, Python" in differences([same, facts(tiny_model)])


def test_another_set_of_plugins(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = facts(tiny_model)
    monkeypatch.setenv("VAEPP_PLUGINS_BLOCK", "patch")
    assert "plugin patch is vaepp-sdk 0.1.0 on rank 0 and not there on rank 1" in differences(
        [same, facts(tiny_model, "vae.strategy=tile")]
    )

"""What ranks send in denoising steps is what the arithmetic says, for every family and dimension."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.layout_families import FAMILIES
from benchmarks.traffic import TOKENS, cases, counted, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "dimensions.md"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in TOKENS:
        FAMILIES[name].build(folder / name)
    return folder


@pytest.mark.parametrize(("size", "axes"), [(2, ("cfg", "tensor")), (3, ("pipeline", "ring", "ulysses"))])
def test_counted_bytes_are_those_of_the_arithmetic(models: Path, size: int, axes: tuple[str, ...]) -> None:
    """On 3 ranks neither heads nor tokens divide; of FLUX.2 the two forms differ in guidance only."""
    chosen = [case for case in cases(axes, size) if case[0] != "flux2_klein" or case[1] == "cfg"]
    found = list(counted(models, chosen))
    assert {row["axis"] for row in found} == set(axes)
    for row in found:
        assert row["counted"] == row["wanted"], (row["family"], row["axis"])
        assert min(row["counted"]) > 0


def test_the_table_of_published_models_is_in_the_documentation() -> None:
    assert "\n".join(table()) in PAGE.read_text(encoding="utf-8")

"""Shared by every test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dims_jobs import Made


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Z-Image checkpoint with tiles of 64 pixels; tests read it and never write to it."""
    from vaepp_plugins.tiny_z_image import build

    return build(tmp_path_factory.mktemp("models") / "tiny", vae_width=8, sample_size=64)


@pytest.fixture(scope="session")
def layered_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with five main layers, which no number of stages divides."""
    from vaepp_plugins.tiny_z_image import build

    return build(tmp_path_factory.mktemp("models") / "layered", vae_width=8, sample_size=64, layers=5)


@pytest.fixture(scope="session")
def one_process(layered_model: Path) -> list[Made]:
    """What one process makes of every case of `dims_jobs`."""
    from dims_jobs import alone

    return alone(layered_model)

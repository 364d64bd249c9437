"""Shared by every test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Z-Image checkpoint with tiles of 64 pixels; tests read it and never write to it."""
    from vaepp_plugins.tiny_z_image import build

    return build(tmp_path_factory.mktemp("models") / "tiny", vae_width=8, sample_size=64)

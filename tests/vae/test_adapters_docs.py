"""`docs/vaes.md` names every VAE class of diffusers, and says of each what the registry says."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest

from vaepp_sdk import UnsupportedError
from vaepp_sdk.registry import default_registry

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "vaes.md").read_text(encoding="utf-8")
SERVED, _, NOT_SERVED = PAGE.partition("## Not served")


def minor() -> str:
    return ".".join(diffusers.__version__.split(".")[:2])


def rows(text: str) -> dict[str, str]:
    """The second cell of every row, by the class its first cell names."""
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", text, re.M))


def test_the_first_table_is_the_registry() -> None:
    entries = default_registry().vaes
    assert rows(SERVED).keys() == entries.keys()
    for name, cell in rows(SERVED).items():
        assert tuple(re.findall(r"`(\w+)`", cell)) == entries[name].strategies, name


@pytest.mark.skipif(f"diffusers {minor()} " not in PAGE, reason="the page speaks of another diffusers")
def test_every_class_is_in_one_table() -> None:
    found = {name for name in dir(diffusers) if re.match(r"(Asymmetric)?Autoencoder(?!Mixin)", name)}
    assert found <= rows(SERVED).keys() | rows(NOT_SERVED).keys()
    assert not rows(SERVED).keys() & rows(NOT_SERVED).keys()


@pytest.mark.parametrize("name", sorted(rows(NOT_SERVED)))
def test_what_is_not_served_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        default_registry().vae(getattr(diffusers, name, None) or type(name, (), {}))

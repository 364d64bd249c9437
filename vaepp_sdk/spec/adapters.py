"""`model.lora`: which adapters, how strongly, and where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk.spec.places import absolute_place
from vaepp_sdk.spec.values import RefusedError
from vaepp_sdk.text import shown

__all__ = ["Adapter", "placed_adapters", "read_adapters"]

_FIX = 'write paths, as in ["style.safetensors"], or tables, as in {path = "style.safetensors", weight = 0.8}'
_MAX = 32
_STRONGEST = 100


@attrs.frozen
class Adapter:
    """One LoRA adapter.

    Attributes:
        path: a safetensors file.
        weight: how strongly it counts; 1 is as it was trained.
    """

    path: str
    weight: float = 1.0


def read_adapters(value: Any) -> tuple[Adapter, ...]:
    """The adapters of a spec, their paths as written.

    Raises:
        RefusedError: it is no list of paths or of tables.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) > _MAX:
        raise RefusedError(f"found {shown(value)}", f"{_FIX}; at most {_MAX}")
    return tuple(_adapter(item) for item in value)


def _adapter(item: Any) -> Adapter:
    if isinstance(item, Adapter):
        return item
    table = {"path": item} if isinstance(item, str) else item
    if not isinstance(table, Mapping) or "path" not in table or set(table) - {"path", "weight"}:
        raise RefusedError(f"found {shown(item)}", _FIX)
    path, weight = table["path"], table.get("weight", 1.0)
    if not isinstance(path, str) or not path:
        raise RefusedError(f"found the path {shown(path)}", _FIX)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < abs(weight) <= _STRONGEST:
        fix = f"it must be a number other than 0, between -{_STRONGEST} and {_STRONGEST}"
        raise RefusedError(f"found the weight {shown(weight)}", fix)
    return Adapter(path, float(weight))


def placed_adapters(adapters: Sequence[Adapter], base: Path) -> tuple[Adapter, ...]:
    """The adapters with absolute paths.

    Args:
        adapters: as written.
        base: the folder that relative paths are relative to.

    Raises:
        RefusedError: one is no path, or not in safetensors format by its name.
    """
    found = []
    for adapter in adapters:
        place = str(absolute_place(adapter.path, base))
        if not place.endswith(".safetensors"):
            raise RefusedError(f"found {shown(adapter.path)}", "give a file whose name ends in .safetensors")
        found.append(attrs.evolve(adapter, path=place))
    return tuple(found)

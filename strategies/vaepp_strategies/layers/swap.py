"""Replaces the `forward` of module instances while a call runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from vaepp_sdk.errors import RunError

__all__ = ["swapped"]

_LOCK = threading.Lock()


@contextmanager
def swapped(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give module instances other forwards inside the block, and their class's own again after it.

    Whatever happens inside, no module keeps an attribute of this block.

    Args:
        forwards: what each module runs instead.

    Raises:
        RunError: a module already has a forward of its own, such as that of another call under way.
    """
    taken: list[nn.Module] = []
    try:
        with _LOCK:
            for module, forward in forwards.items():
                if "forward" in vars(module):
                    raise RunError(
                        f"a {type(module).__name__} already runs a replaced forward: the same VAE is in use "
                        "by another call, or was wrapped; use one VAE object for one call at a time"
                    )
                module.forward = forward
                taken.append(module)
        yield
    finally:
        for module in taken:
            del module.forward

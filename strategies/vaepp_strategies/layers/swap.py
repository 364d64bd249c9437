"""Replaces the `forward` of module instances while a call runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import nn

from vaepp_sdk.errors import RunError

__all__ = ["swapped"]

_LOCK = threading.Lock()
_INSIDE: ContextVar[bool] = ContextVar("vaepp_swapped", default=False)
"""Whether this is the call that replaced forwards: threads that it starts have a copy of its context."""


@contextmanager
def swapped(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give module instances other forwards inside the block, and their class's own again after it.

    Whatever happens inside, no module keeps an attribute of this block. The other forwards are for this
    thread and those that it starts with its context: any other that calls a module meanwhile is refused.

    Args:
        forwards: what each module runs instead.

    Raises:
        RunError: a module already has a forward of its own, such as that of another call under way.
    """
    taken: list[nn.Module] = []
    outside = _INSIDE.set(True)
    try:
        with _LOCK:
            for module, forward in forwards.items():
                if "forward" in vars(module):
                    raise RunError(
                        f"a {type(module).__name__} already runs a replaced forward: the same VAE is in use "
                        "by another call, or was wrapped; use one VAE object for one call at a time"
                    )
                module.forward = partial(_inside, module, forward)
                taken.append(module)
        yield
    finally:
        for module in taken:
            del module.forward
        _INSIDE.reset(outside)


def _inside(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a replaced forward, if the call that replaced it asks for it."""
    if not _INSIDE.get():
        raise RunError(
            f"a {type(module).__name__} of a VAE that runs over several ranks was called from another "
            "thread; use one VAE object for one call at a time"
        )
    return forward(*args, **kwargs)

"""Counts live tensor bytes, on any device, without the allocator's help."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """The live bytes of all tensors born inside the block, and their peak.

    Storages are counted once however many views share them. What kernels allocate inside themselves, and
    tensors that existed before (weights, inputs), are not counted::

        with LiveBytes() as live:
            vae.decode(z)
        print(live.peak)

    Attributes:
        now: bytes alive at present.
        peak: the most bytes alive at any one time.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own class is not annotated
        self.now = 0
        self.peak = 0
        self._known: set[int] = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and count storages that it made."""
        before = {key for leaf in tree_leaves((args, kwargs)) for key in _storage_key(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf, before)
        return result

    def _count(self, tensor: torch.Tensor, inputs: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in inputs:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storage_key(leaf: Any) -> list[int]:
    return [leaf.untyped_storage()._cdata] if isinstance(leaf, torch.Tensor) else []

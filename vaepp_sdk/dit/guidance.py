"""Guidance parallelism: the ranks of a row each run a part of a transformer call's batch.

A pipeline that makes one call of both guidance branches has one of them on each of two ranks. A call without
guidance, as after truncation, is shared out by pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from vaepp_sdk.dit.row import Row, even_parts
from vaepp_sdk.entries import BatchPlan

__all__ = ["BatchSplit"]


class BatchSplit:
    """Stands for a transformer's forward.

    Args:
        forward: the transformer's own.
        plan: which of its arguments hold a batch.
        row: the ranks that share it.
    """

    def __init__(self, forward: Callable[..., Any], plan: BatchPlan, row: Row) -> None:
        self._forward, self._plan, self._row = forward, plan, row
        self._signature = inspect.signature(forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output for the whole batch, on every rank."""
        bound = self._signature.bind(*args, **kwargs)
        batch = len(bound.arguments[self._plan.arguments[0]])
        if batch < self._row.size:
            return self._forward(*args, **kwargs)  # too few to share: every rank runs all, alike
        own = self._row.own(batch)
        for name in self._plan.arguments:
            value = bound.arguments.get(name)
            if value is not None:
                bound.arguments[name] = value[own.start : own.stop]
        result = self._forward(*bound.args, **bound.kwargs)
        whole = self._whole(result[0], even_parts(batch, self._row.size))
        return (whole, *result[1:]) if isinstance(result, tuple) else type(result)(whole)

    def _whole(self, made: Any, counts: tuple[int, ...]) -> Any:
        """All ranks' outputs, as one tensor or as a list of one tensor each, whichever the model gives."""
        if isinstance(made, torch.Tensor):
            return self._row.gather(made, 0, counts, "transformer outputs")
        return list(self._row.gather(torch.stack(made), 0, counts, "transformer outputs").unbind(0))

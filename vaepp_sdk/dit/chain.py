"""A list of blocks that a model calls one after another, run over several ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from vaepp_sdk.dit.line import Elsewhere, Stage
from vaepp_sdk.dit.sequence import SequenceSplit, SplitAttention
from vaepp_sdk.entries import ChainPlan
from vaepp_sdk.errors import UnsupportedError

__all__ = ["Chain"]


class Chain(nn.ModuleList):
    """Stands for a model's list of blocks; the names of its weights stay.

    A model that calls each block of the list finds a single one, which runs them all. So what has to happen
    before the first and after the last has its place, and the model's own forward stays as it is.

    Args:
        blocks: the model's list.
        plan: what its blocks take.
        split: the ranks that share the sequence, or None.
        stage: the ranks that share the layers, or None.
    """

    def __init__(
        self, blocks: nn.ModuleList, plan: ChainPlan, split: SequenceSplit | None, stage: Stage | None
    ) -> None:
        super().__init__(blocks)
        self._plan, self._split, self._stage = plan, split, stage
        self._own = [block for block in blocks if not isinstance(block, Elsewhere)]

    def __iter__(self) -> Iterator[Callable[..., Any]]:  # type: ignore[override]
        """All blocks as one."""
        return iter((self._run,))

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The carried values after the last block, as the blocks themselves return them."""
        bound = inspect.signature(self._own[0].forward).bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        split, plan = self._split, self._plan
        lengths = {
            name: arguments[name].shape[dim] for name, dim in plan.sequence.items() if name in plan.carried
        }
        if split is not None:
            for name, dim in plan.sequence.items():
                arguments[name] = split.cut(arguments.get(name), dim)
        attention = SplitAttention(split, self._parts(lengths)) if split is not None else nullcontext()
        with attention:
            carried = self._stage.run(arguments, self._blocks) if self._stage else self._blocks(arguments)
        if split is not None:
            self._check(attention)
            carried = tuple(
                split.gather(value, plan.sequence[name], lengths[name], f"{name} after {plan.blocks}")
                for name, value in zip(plan.carried, carried, strict=True)
            )
        return carried[0] if len(carried) == 1 else carried

    def _blocks(self, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Run this rank's blocks."""
        carried: tuple[torch.Tensor, ...] = ()
        for block in self._own:
            made = block(**arguments)
            carried = (made,) if isinstance(made, torch.Tensor) else tuple(made)
            arguments = arguments | dict(zip(self._plan.carried, carried, strict=True))
        return carried

    def _parts(self, lengths: dict[str, int]) -> tuple[int, ...]:
        """How much of the joined sequence each rank has."""
        assert self._split is not None
        cut = [self._split.parts(length) for length in lengths.values()]
        return tuple(map(sum, zip(*cut, strict=True)))

    def _check(self, attention: Any) -> None:
        if attention.calls < len(self._own):
            raise UnsupportedError(
                f"the attention of {self._plan.blocks} is not torch's own and cannot be split over the "
                "sequence; leave DIFFUSERS_ATTN_BACKEND unset, or set it to native"
            )

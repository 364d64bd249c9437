"""A list of blocks that a model calls one after another, run over several ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from vaepp_sdk.dit.line import Carried, Elsewhere, RowsInPlace, Stage
from vaepp_sdk.dit.sequence import Joined, LocalAttention, SequenceSplit, SplitAttention
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

    Attributes:
        compiled: whether torch.compile has its blocks.
        local: their submodules whose attention stays as it is.
    """

    def __init__(
        self, blocks: nn.ModuleList, plan: ChainPlan, split: SequenceSplit | None, stage: Stage | None
    ) -> None:
        super().__init__(blocks)
        self._plan, self._split, self._stage = plan, split, stage
        self.compiled, self.local = False, plan.local
        self._own = [block for block in blocks if not isinstance(block, Elsewhere)]
        if split is not None:
            for module in self._local_modules():
                module.forward = LocalAttention(module.forward)

    def leave_to_compiler(self) -> None:
        """Be ready for compiled blocks: their graphs say which attention is local, and are to be alike."""
        self.compiled = True
        if self._split is not None:
            for module in self._local_modules():
                del module.forward

    def _local_modules(self) -> list[nn.Module]:
        return [block.get_submodule(name) for block in self._own for name in self.local]

    def __iter__(self) -> Iterator[Callable[..., Any]]:  # type: ignore[override]
        """All blocks as one."""
        return iter((self._run,))

    @property
    def functions(self) -> tuple[Any, ...]:
        """What of torch's this rank takes over while they run."""
        attention = (SplitAttention.function,) if self._split else ()
        return (*attention, RowsInPlace.function) if self._stage else attention

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The carried values after the last block, as the blocks themselves return them."""
        bound = inspect.signature(self._own[0].forward).bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        split, plan = self._split, self._plan
        places = _places(plan, arguments)
        lengths = {name: arguments[name].shape[dim] for name, dim in places.items() if name in plan.carried}
        if split is not None:
            arguments = self._cut(arguments, places, lengths)
        work = partial(self._blocks, lengths)
        carried = self._stage.run(arguments, work, compiled=self.compiled) if self._stage else work(arguments)
        if split is not None:
            carried = tuple(
                None
                if value is None
                else split.gather(value, places[name], lengths[name], f"{name} after {plan.blocks}")
                for name, value in zip(plan.carried, carried, strict=True)
            )
        return carried[0] if len(carried) == 1 else carried

    def _blocks(self, lengths: Mapping[str, int], arguments: dict[str, Any]) -> Carried:
        """Run this rank's blocks, on the whole batch or on a part of it."""
        split = self._split
        if split is None:
            return self._each(arguments)
        masks = {name: arguments[name] for name in self._plan.masks.values() if name in arguments}
        attention = SplitAttention(split, self._layouts(lengths, masks))
        with attention.over(compiled=self.compiled):
            carried = self._each(arguments | {name: split.cut(mask, 1) for name, mask in masks.items()})
        self._check(attention)
        return carried

    def _each(self, arguments: dict[str, Any]) -> Carried:
        """Run them one after another."""
        carried: Carried = ()
        for block in self._own:
            made = block(**arguments)
            carried = (made,) if isinstance(made, torch.Tensor) else tuple(made)
            arguments = arguments | dict(zip(self._plan.carried, carried, strict=True))
        return carried

    def _cut(
        self, arguments: dict[str, Any], places: Mapping[str, int], lengths: Mapping[str, int]
    ) -> dict[str, Any]:
        """This rank's part of the arguments."""
        assert self._split is not None
        own = dict(arguments)
        for name, dim in places.items():
            own[name] = self._split.cut(arguments.get(name), dim)
        for name, dim in self._plan.joined.items():
            joined = [lengths[sequence] for sequence in self._joins[0]]
            own[name] = self._split.cut_joined(arguments.get(name), dim, joined)
        return own

    @property
    def _joins(self) -> tuple[tuple[str, ...], ...]:
        return self._plan.joins or (self._plan.carried,)

    def _layouts(self, lengths: Mapping[str, int], masks: Mapping[str, Any]) -> list[Joined]:
        """How the sequences lie on the ranks that each kind of attention sees."""
        assert self._split is not None
        found = []
        for names in self._joins:
            given = [masks.get(self._plan.masks.get(name, "")) for name in names]
            of_each = [lengths[name] for name in names]
            found.append(self._split.joined(of_each, _whole_mask(given, of_each)))
        return found

    def _check(self, attention: SplitAttention) -> None:
        if attention.calls < len(self._own):
            raise UnsupportedError(
                f"the attention of {self._plan.blocks} is not torch's own and cannot be split over the "
                "sequence; leave DIFFUSERS_ATTN_BACKEND unset, or set it to native"
            )


def _whole_mask(masks: Sequence[torch.Tensor | None], lengths: Sequence[int]) -> torch.Tensor | None:
    """Which tokens of joined sequences are seen, `(batch, 1, 1, tokens)`; all of one without a mask."""
    known = next((mask for mask in masks if mask is not None), None)
    if known is None:
        return None
    each = [
        known.new_ones(len(known), length) if mask is None else mask
        for mask, length in zip(masks, lengths, strict=True)
    ]
    return torch.cat(each, 1)[:, None, None]


def _places(plan: ChainPlan, arguments: Mapping[str, Any]) -> dict[str, int]:
    """The dimension that the sequence lies on, of each argument that holds it this time."""
    places = {}
    for name, place in plan.sequence.items():
        if isinstance(place, int):
            places[name] = place
        elif arguments[name].ndim == place[1]:
            places[name] = place[0]
    return places

"""Pipeline parallelism: each rank of a row holds a run of a model's layers and passes on what they make.

What comes before and after the layers runs on every rank alike, so a stage knows the shapes that arrive, and
the arguments that all layers share are never sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import nn
from torch.nn import functional as F

from vaepp_sdk.dit.row import Row, even_parts
from vaepp_sdk.dit.takeover import Takeover
from vaepp_sdk.entries import ChainPlan
from vaepp_sdk.errors import UnsupportedError

__all__ = ["Carried", "Elsewhere", "RowsInPlace", "Stage"]

Carried = tuple[torch.Tensor | None, ...]
"""What a list of blocks makes of its carried arguments; None for those that its last block drops."""


class Elsewhere(nn.Module):
    """Stands where a layer is that another rank holds; it has no weights and never runs."""


class RowsInPlace(Takeover):
    """Inside its block, linear layers over one row for each item of a part round as on the whole batch.

    A kernel is picked by the number of rows, so among fewer rows a row would round otherwise. These layers,
    which make scales and shifts of the timestep, cost next to nothing.

    Args:
        batch: the number of rows of the whole batch.
        start: the part's first row.
        length: the part's number of rows.
    """

    function = F.linear

    def __init__(self, batch: int, start: int, length: int) -> None:
        super().__init__()
        self._batch, self._start, self._length = batch, start, length

    def own(self, given: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output, computed in the rows of the whole batch."""
        if given.ndim != 2 or len(given) != self._length:
            return F.linear(given, *args, **kwargs)
        whole = given.new_zeros((self._batch, given.shape[1]))
        whole.narrow(0, self._start, self._length).copy_(given)
        return F.linear(whole, *args, **kwargs).narrow(0, self._start, self._length)


@attrs.frozen(eq=False)
class Stage:
    """This rank's run of the layers.

    Attributes:
        plan: the layers.
        row: the ranks that hold them, first layers first.
    """

    plan: ChainPlan
    row: Row

    def keep_own(self, model: nn.Module) -> tuple[str, ...]:
        """Drop the layers of other ranks from a model.

        Returns:
            How the names of their weights begin.

        Raises:
            UnsupportedError: there are fewer layers than ranks.
        """
        layers = model.get_submodule(self.plan.blocks)
        assert isinstance(layers, nn.ModuleList)
        if len(layers) < self.row.size:
            raise UnsupportedError(
                f"pipeline_parallel_size={self.row.size} is more than the {len(layers)} layers"
            )
        own = self.row.own(len(layers))
        others = [index for index in range(len(layers)) if index not in own]
        for index in others:
            layers[index] = Elsewhere()
        return tuple(f"{self.plan.blocks}.{index}." for index in others)

    def run(
        self,
        arguments: Mapping[str, Any],
        work: Callable[[dict[str, Any]], Any],
        *,
        compiled: bool,
    ) -> Carried:
        """Run all layers, this rank its own ones, and give every rank what the last layer makes.

        The batch goes through in parts, so that the stages work at the same time.

        Args:
            arguments: the layers' arguments by name; the carried ones count on the first rank only.
            work: runs this rank's layers, and returns the carried values.
            compiled: whether the layers are.
        """
        batch = arguments[self.plan.carried[0]].shape[0]
        made, sends = [], []
        for part in torch.arange(batch).split(even_parts(batch, min(batch, self.row.size))):
            start, length = int(part[0]), len(part)
            own = self._narrowed(arguments, start, length)
            own |= self._received(own)
            with RowsInPlace(batch, start, length).over(compiled=compiled):
                made.append(work(own))
            sends += self._sent(made[-1])
        for sending in sends:
            sending.wait()
        return self._shared(dict(zip(self.plan.carried, zip(*made, strict=True), strict=True)))

    def _narrowed(self, arguments: Mapping[str, Any], start: int, length: int) -> dict[str, Any]:
        return {
            name: value.narrow(0, start, length)
            if name in self.plan.batched and isinstance(value, torch.Tensor)
            else value
            for name, value in arguments.items()
        }

    def _received(self, own: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """What the stage before made; nothing on the first."""
        if self.row.index == 0:
            return {}
        arrived = {}
        for name in self.plan.carried:
            arrived[name] = torch.empty_like(own[name], memory_format=torch.contiguous_format)
            self.row.receive(arrived[name], self.row.index - 1, f"{name} of {self.plan.blocks}")
        return arrived

    def _sent(self, made: tuple[torch.Tensor, ...]) -> list[Any]:
        if self.row.index == self.row.size - 1:
            return []
        return [
            self.row.send(value.contiguous(), self.row.index + 1, f"{name} of {self.plan.blocks}")
            for name, value in zip(self.plan.carried, made, strict=True)
        ]

    def _shared(self, made: Mapping[str, tuple[torch.Tensor, ...]]) -> Carried:
        """What the last stage made, on every rank; None for what its last block drops."""
        whole: dict[str, torch.Tensor | None] = dict.fromkeys(made)
        for name in (name for name in made if name not in self.plan.dropped):
            value = torch.cat(made[name])
            self.row.broadcast(value, self.row.size - 1, f"last {name} of {self.plan.blocks}")
            whole[name] = value
        return tuple(whole.values())

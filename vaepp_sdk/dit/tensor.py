"""Tensor parallelism: each rank holds a slice of every planned linear layer.

A column-wise layer holds some output features, so a row-wise layer behind it finds its own input features on
the same rank; the row-wise layers' partial outputs are summed over the ranks. The sum is one collective, so
every rank of the row holds the same bits after it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, TypeVar

import attrs
import torch
from torch import nn
from torch.nn import functional as F

from vaepp_sdk.dit.row import Row
from vaepp_sdk.entries import TensorPlan
from vaepp_sdk.errors import UnsupportedError

__all__ = ["RowwiseLinear", "Shard", "SharedNorm", "shard_modules"]

LayerT = TypeVar("LayerT", bound=nn.Module)


@attrs.frozen
class Shard:
    """The part of one stored weight that a rank holds.

    Attributes:
        dim: the dimension that is cut.
        spans: what is held, in order: the first index, and the first one no longer held.
    """

    dim: Literal[0, 1]
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, dim: Literal[0, 1], parts: Sequence[int], group: Row) -> Shard:
        """This rank's share of every part of a dimension; their widths divide by the number of ranks."""
        spans = []
        for start, width in zip(accumulate(parts, initial=0), parts, strict=False):
            share = width // group.size
            spans.append((start + group.index * share, start + (group.index + 1) * share))
        return cls(dim, tuple(spans))

    def read(self, whole: Any) -> torch.Tensor:
        """The part of a weight, which is a tensor or a slice of a safetensors file: only the part is read."""
        found = [whole[(slice(None),) * self.dim + (slice(*span),)] for span in self.spans]
        return found[0] if len(found) == 1 else torch.cat(found, self.dim)


class RowwiseLinear(nn.Linear):
    """A linear layer over this rank's input features, whose outputs are summed over the ranks."""

    def __init__(self, whole: nn.Linear, group: Row, name: str) -> None:
        width = whole.in_features // group.size
        super().__init__(width, whole.out_features, whole.bias is not None, device="meta")
        self._group = group
        self._name = name

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The whole layer's output, the same on every rank."""
        output = F.linear(input, self.weight)
        self._group.sum(output, _name(self))
        # Each rank holds the whole bias: added before the sum it would count once for every rank.
        return output if self.bias is None else output + self.bias


class SharedNorm(nn.RMSNorm):
    """An RMS norm over features that lie on all ranks, of which this one has a part."""

    def __init__(self, whole: nn.RMSNorm, group: Row, name: str) -> None:
        self._whole = whole.normalized_shape[0]
        affine = whole.elementwise_affine
        super().__init__(self._whole // group.size, whole.eps, affine, device="meta")
        self._group = group
        self._name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of the normalised features."""
        # In float32, as torch's own norm works inside.
        values = x.float()
        squares = values.square().sum(-1, keepdim=True)
        self._group.sum(squares, _name(self))
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        normed = values * torch.rsqrt(squares / self._whole + eps)
        return (normed if self.weight is None else normed * self.weight).to(x.dtype)


def _name(layer: RowwiseLinear | SharedNorm) -> str:
    """A layer's name for errors; not in compiled graphs, as all layers of a kind are to share one."""
    return "a layer" if torch.compiler.is_compiling() else layer._name


def shard_modules(model: nn.Module, plan: TensorPlan, group: Row) -> Mapping[str, Shard]:
    """Replace a model's planned layers by this rank's slices of them, without weights.

    Args:
        model: the model, its weights on the meta device.
        plan: which layers.
        group: the ranks that share it.

    Returns:
        What this rank holds of each weight that is cut, by its name in the state dict.

    Raises:
        UnsupportedError: the model lacks a planned layer, or a width does not divide by the number of ranks.
    """
    shards: dict[str, Shard] = {}
    for prefix, block in _blocks(model, plan):
        missing = {name for name in plan.optional if not _has(block, name)}
        for name in _present(plan.colwise, missing):
            shards |= _cut_columns(model, f"{prefix}.{name}", group, _parts(model, plan, name))
        for name in _present(plan.rowwise, missing):
            shards |= _cut_rows(model, f"{prefix}.{name}", group, _parts(model, plan, name))
        for name in _present(plan.norms, missing):
            shards |= _cut_norm(model, f"{prefix}.{name}", group)
        for name in _present(plan.head_attributes, missing):
            _divide_attribute(block, prefix, name, group.size)
    for further in plan.further:
        shards |= shard_modules(model, further, group)
    return shards


def _blocks(model: nn.Module, plan: TensorPlan) -> Iterator[tuple[str, nn.Module]]:
    for name in plan.blocks:
        blocks = getattr(model, name, None)
        if not isinstance(blocks, nn.ModuleList):
            raise UnsupportedError(
                f"{type(model).__name__} has no list of blocks {name!r}; its plan names it"
            )
        for index, block in enumerate(blocks):
            yield f"{name}.{index}", block


def _present(names: Sequence[str], missing: set[str]) -> list[str]:
    return [name for name in names if name not in missing]


def _has(block: nn.Module, name: str) -> bool:
    """Whether a block has a submodule, or an attribute of a submodule; None counts as missing."""
    try:
        return functools.reduce(getattr, name.split("."), block) is not None
    except AttributeError:
        return False


def _parts(model: Any, plan: TensorPlan, name: str) -> tuple[int, ...]:
    """The widths of a layer's packed parts; empty where it is all one."""
    return plan.packed[name](model.config) if name in plan.packed else ()


def _cut_columns(model: nn.Module, name: str, group: Row, parts: tuple[int, ...]) -> dict[str, Shard]:
    whole = _linear(model, name)
    shard = _shard(0, whole.out_features, parts, f"the output width of {name}", group)
    width = whole.out_features // group.size
    model.set_submodule(name, nn.Linear(whole.in_features, width, whole.bias is not None, device="meta"))
    return {f"{name}.weight": shard} | ({} if whole.bias is None else {f"{name}.bias": shard})


def _cut_rows(model: nn.Module, name: str, group: Row, parts: tuple[int, ...]) -> dict[str, Shard]:
    whole = _linear(model, name)
    shard = _shard(1, whole.in_features, parts, f"the input width of {name}", group)
    model.set_submodule(name, RowwiseLinear(whole, group, name))
    return {f"{name}.weight": shard}


def _shard(dim: Literal[0, 1], width: int, parts: tuple[int, ...], what: str, group: Row) -> Shard:
    if parts and sum(parts) != width:
        raise UnsupportedError(f"{what} is {width}; the model's plan packs parts of {parts} in it")
    for part in parts or (width,):
        _part(part, what, group.size)
    return Shard.of(dim, parts or (width,), group)


def _cut_norm(model: nn.Module, name: str, group: Row) -> dict[str, Shard]:
    whole = _planned(model, name, nn.RMSNorm, "a torch RMS norm")
    shard = _shard(0, whole.normalized_shape[0], (), f"the width of {name}", group)
    model.set_submodule(name, SharedNorm(whole, group, name))
    return {} if whole.weight is None else {f"{name}.weight": shard}


def _linear(model: nn.Module, name: str) -> nn.Linear:
    return _planned(model, name, nn.Linear, "a linear layer")


def _planned(model: nn.Module, name: str, kind: type[LayerT], wanted: str) -> LayerT:
    try:
        found = model.get_submodule(name)
    except AttributeError:
        found = None
    if not isinstance(found, kind):
        is_what = "missing" if found is None else f"a {type(found).__name__}"
        raise UnsupportedError(f"{type(model).__name__}: {name} is {is_what}; its plan wants {wanted}")
    return found


def _divide_attribute(block: nn.Module, prefix: str, name: str, size: int) -> None:
    path, _, attribute = name.rpartition(".")
    try:
        owner = block.get_submodule(path)
        count = getattr(owner, attribute)
    except AttributeError:
        raise UnsupportedError(f"{prefix}.{name} is missing; the model's plan divides it") from None
    setattr(owner, attribute, _part(count, f"{prefix}.{name}", size))


def _part(width: int, what: str, size: int) -> int:
    if width % size:
        fits = ", ".join(str(n) for n in range(2, width + 1) if width % n == 0)
        raise UnsupportedError(
            f"tensor_parallel_size={size} does not divide {what} ({width}); sizes that divide it: {fits}"
        )
    return width // size

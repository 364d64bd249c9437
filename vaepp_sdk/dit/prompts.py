"""One rank of each replica encodes the prompts and tells the others: they hold no text encoder."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import attrs
import torch
import torch.distributed as dist

from vaepp_sdk.dit.row import Row
from vaepp_sdk.errors import RankError, UnsupportedError, UserError, VaeppError, is_check
from vaepp_sdk.parallel.dims import AXES
from vaepp_sdk.parallel.group import DiTGroup
from vaepp_sdk.text import named

__all__ = ["PromptShare"]

_ALIGNMENT = 16
"""Each tensor starts at a multiple of this many bytes, so that it can be read where it arrived."""

_KINDS = "float32", "bfloat16", "float16", "float64", "int64", "int32", "bool"
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _KINDS}

_PROBLEM, _REFUSED, _FAILED = "", "refused", "failed"
"""What stands in place of the arguments where there are none, and the kinds of it."""

_PLAIN = (bool, int, float, str, type(None))


@attrs.frozen(eq=False)
class PromptShare:
    """This rank's place among those of its replica.

    Attributes:
        rows: this rank's rows inside its replica, outermost first.
        device: where this rank computes.
    """

    rows: tuple[Row, ...]
    device: torch.device

    @classmethod
    def over(cls, group: DiTGroup) -> PromptShare:
        """View the DiT group; no process group is created."""
        inside = AXES[AXES.index("data") + 1 :]
        return cls(tuple(Row.over(group.axis(axis)) for axis in inside), group.device)

    @property
    def encodes(self) -> bool:
        """Whether this rank is its replica's first, which encodes."""
        return all(row.index == 0 for row in self.rows)

    def share(self, encode: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the replica's first rank encodes, on every rank of the replica; all of them call this.

        The message goes down one row after the other: a rank that has it tells its row of the next dimension.

        Args:
            encode: encodes the prompts; runs on the first rank only.

        Returns:
            Keyword arguments. Tensors are on this rank's device, and lists and tuples are lists.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
            UnsupportedError: an argument is neither tensor, plain value, nor list or dict of those; on every
                rank alike, as is a refusal of `encode`.
            RankError: `encode` failed in a check; on every rank alike.
        """
        if all(row.size == 1 for row in self.rows):
            return encode()
        encoded, problem = self._tried(encode) if self.encodes else ({}, None)
        header, payload = b"", torch.empty(0, dtype=torch.uint8)
        if self.encodes:
            header, payload = self._packed(encoded if problem is None else {_PROBLEM: problem})
        for place, row in enumerate(self.rows):
            # Ranks behind the first of a later row wait for that row's turn.
            if row.size > 1 and all(later.index == 0 for later in self.rows[place + 1 :]):
                header, payload = self._told(row, header, payload)
        found: dict[str, Any] = _unpacked(json.loads(header), payload)
        if _PROBLEM in found:
            _raise(*found[_PROBLEM])
        return encoded if self.encodes else found

    def _tried(self, encode: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], list[str] | None]:
        """What is encoded, or why nothing is: the others wait, and are to say the same."""
        try:
            return encode(), None
        except UserError as error:
            return {}, [_REFUSED, str(error)]
        except Exception as error:
            if not is_check(error) or isinstance(error, VaeppError):
                raise
            traceback.print_exc()  # the others' errors have no traceback, and neither has the one raised here
            return {}, [_FAILED, named(error)]

    def _packed(self, encoded: dict[str, Any]) -> tuple[bytes, torch.Tensor]:
        """The description of all arguments, and the bytes of their tensors."""
        pieces: list[torch.Tensor] = []
        try:
            header = _described(encoded, "", pieces)
        except UnsupportedError as error:
            # Told to all: the others wait for it.
            header, pieces = _described({_PROBLEM: [_REFUSED, str(error)]}, "", []), []
        payload = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)
        return json.dumps(header).encode(), payload.to(self.device)

    def _told(self, row: Row, header: bytes, payload: torch.Tensor) -> tuple[bytes, torch.Tensor]:
        """What the first rank of a row has."""
        sizes = torch.tensor([len(header), payload.numel()], dtype=torch.int64, device=self.device)
        row.broadcast(sizes, 0, "size of the encoded prompts")
        length, count = (int(size) for size in sizes)
        text = torch.frombuffer(bytearray(header or bytes(length)), dtype=torch.uint8).to(self.device)
        row.broadcast(text, 0, "shape of the encoded prompts")
        if row.index:
            payload = torch.empty(count, dtype=torch.uint8, device=self.device)
        if count:
            row.broadcast(payload, 0, "encoded prompts")
        return bytes(text.cpu().tolist()), payload


def _raise(kind: str, what: str) -> NoReturn:
    if kind == _REFUSED:
        raise UnsupportedError(what)
    raise RankError(dist.get_rank(), "encode_prompt", what, harmless=True)


def _described(value: Any, name: str, pieces: list[torch.Tensor]) -> dict[str, Any]:
    """A value as data that JSON can hold; the bytes of tensors go to `pieces`."""
    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        if kind in _DTYPES:
            flat = value.detach().contiguous().view(-1).view(torch.uint8)
            start = sum(piece.numel() for piece in pieces)
            pieces += [flat, flat.new_zeros(-flat.numel() % _ALIGNMENT)]
            return {"tensor": [kind, list(value.shape), start]}
    if isinstance(value, _PLAIN):
        return {"plain": value}
    if isinstance(value, list | tuple):
        return {"list": [_described(item, name, pieces) for item in value]}
    if isinstance(value, dict):
        return {"dict": {key: _described(item, name or str(key), pieces) for key, item in value.items()}}
    what = f"tensor of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
    raise UnsupportedError(f"{name!r} of the encoded prompts holds what cannot be sent to ranks: {what}")


def _unpacked(header: dict[str, Any], payload: torch.Tensor) -> Any:
    """What `_described` was given."""
    ((kind, content),) = header.items()
    if kind == "tensor":
        dtype, shape, start = content
        size = torch.Size(shape).numel() * _DTYPES[dtype].itemsize
        return payload[start : start + size].view(_DTYPES[dtype]).view(shape)
    if kind == "list":
        return [_unpacked(item, payload) for item in content]
    if kind == "dict":
        return {key: _unpacked(item, payload) for key, item in content.items()}
    return content

"""A fingerprint of a tensor's bits that is the same however the device adds: integers only."""

from __future__ import annotations

import torch

__all__ = ["fingerprint"]

_CHUNK = 1 << 20
"""Elements at a time, so that the sums need a few MiB however large the tensor."""

_PERIOD = 65521


def fingerprint(tensor: torch.Tensor) -> str:
    """Shape, dtype and two sums over the bits of a tensor.

    The sums are exact modulo 2**64, so that their order does not matter; one weighs each place, so that
    values that change places are seen. Two numbers leave the device.

    Args:
        tensor: of any shape and dtype.
    """
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    width = torch.int16 if bits.numel() % 2 == 0 else torch.uint8
    words = bits.view(width)
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].to(torch.int64)
        weights = torch.arange(start, start + part.numel(), device=tensor.device) % _PERIOD + 1
        sums += torch.stack((part.sum(), (part * weights).sum()))
    plain, weighed = (number % 2**64 for number in sums.tolist())
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)} with bits {plain:x}-{weighed:x}"

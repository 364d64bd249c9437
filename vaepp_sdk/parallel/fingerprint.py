"""A fingerprint of a tensor's bits that is the same however the device adds: integers only."""

from __future__ import annotations

import torch

__all__ = ["fingerprint"]

_PARTS, _LEAST = 64, 512
"""Into how many parts the bits are cut, and the fewest words of one: the sums need a fraction of the tensor's
memory, for the peak of what comes after must not be theirs."""

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
    size = max(_LEAST, -(-words.numel() // _PARTS))
    for start in range(0, words.numel(), size):
        part = words[start : start + size].to(torch.int64)
        weights = torch.arange(start, start + part.numel(), device=tensor.device).remainder_(_PERIOD).add_(1)
        sums += torch.stack((part.sum(), weights.mul_(part).sum()))
    plain, weighed = (number % 2**64 for number in sums.tolist())
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)} with bits {plain:x}-{weighed:x}"

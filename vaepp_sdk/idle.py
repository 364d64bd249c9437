"""What waits while the VAE works, and can wait on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vaepp_sdk.vae.memory import host_room

__all__ = ["IdleModules"]


class IdleModules:
    """The models of a pipeline other than its VAE, moved off the device while memory is short.

    Left where they are: models on the host already, quantized ones, those that an offload hook moves by
    itself, and those for which the host has no room.

    Args:
        pipe: the diffusers pipeline.
        device: where this rank computes.
        sharers: ranks that share this host's memory.
    """

    def __init__(self, pipe: Any, device: torch.device, sharers: int) -> None:
        self._pipe = pipe
        self._device = device
        self._sharers = sharers
        self._parked: list[nn.Module] = []

    def park(self) -> None:
        """Move what can be moved to the host; the CPU's ranks are there already."""
        if self._device.type == "cpu":
            return
        for name, model in self._pipe.components.items():
            if name != "vae" and isinstance(model, nn.Module) and self._may_move(model):
                model.to("cpu")
                self._parked.append(model)

    def bring_back(self) -> None:
        """Move everything back, before the next request needs it."""
        while self._parked:
            self._parked.pop().to(self._device)

    def _may_move(self, model: nn.Module) -> bool:
        tensors = [*model.parameters(), *model.buffers()]
        if not any(tensor.device.type == self._device.type for tensor in tensors):
            return False
        hooked = any("_hf_hook" in vars(module) for module in model.modules())
        quantized = getattr(model, "quantization_method", None) or getattr(model, "is_quantized", False)
        if hooked or quantized:
            return False
        free = host_room()
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return free is None or nbytes <= free // self._sharers

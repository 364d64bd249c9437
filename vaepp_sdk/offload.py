"""`model.offload = "stages"`: the device holds a module only while a stage that uses it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import nn

from vaepp_sdk.entries import PipelineEntry

__all__ = ["Residence", "needs", "pin_device"]

_HOME = torch.device("cpu")


def needs(entry: PipelineEntry) -> Mapping[str, tuple[str, ...]]:
    """The components that each stage uses and no other does."""
    transformers = entry.dit.components if entry.dit is not None else ()
    return {"encode_prompt": entry.text_encoders, "denoise": transformers, "decode": ("vae",)}


@attrs.define(eq=False)
class Residence:
    """Which modules are on the device.

    Attributes:
        modules: those that come and go, by component; they start on the CPU.
        stages: the components that each stage uses.
        device: where stages compute.
    """

    modules: Mapping[str, nn.Module]
    stages: Mapping[str, tuple[str, ...]]
    device: torch.device
    _here: frozenset[str] = attrs.field(default=frozenset(), init=False)

    @classmethod
    def of(cls, pipe: Any, entry: PipelineEntry, device: torch.device) -> Residence:
        """The modules of a pipeline; what no one stage has for itself goes to the device at once."""
        stages = needs(entry)
        coming = {name for names in stages.values() for name in names}
        modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        for name in sorted(modules.keys() - coming):
            modules[name].to(device)
        return cls({name: part for name, part in modules.items() if name in coming}, stages, device)

    def enter(self, stage: str) -> None:
        """Make room for a stage first, then bring what it uses."""
        wanted = frozenset(self.stages[stage]) & frozenset(self.modules)
        self._move(self._here - wanted, _HOME)
        self._move(wanted - self._here, self.device)
        self._here = wanted

    def _move(self, names: Iterable[str], device: torch.device) -> None:
        for name in sorted(names):
            self.modules[name].to(device)


def pin_device(pipe: Any, device: torch.device) -> None:
    """Tell a pipeline where it computes: by itself it takes the place of its first module, which moves."""
    own = type(pipe)
    where = property(lambda _: device)
    pipe.__class__ = type(own.__name__, (own,), {"device": where, "_execution_device": where})

"""Which settings of `[model]` a pipeline can run with, and which do nothing for it."""

from __future__ import annotations

from vaepp_sdk.entries import PipelineEntry
from vaepp_sdk.errors import Fault
from vaepp_sdk.spec import ModelSpec

__all__ = ["IDLE_OFFLOAD", "model_faults", "model_notices"]

IDLE_OFFLOAD = "model.offload takes no effect: ranks compute on the CPU, where modules live already."


def model_faults(model: ModelSpec, pipeline: str, entry: PipelineEntry | None) -> list[Fault]:
    """Every setting that the pipeline's plugins do not allow."""
    unknown = entry is None or entry.dit is None
    faults = []
    if unknown and model.offload != "none":
        found = f"found {model.offload!r}, and no plugin says what the stages of {pipeline} use"
        faults.append(Fault("$.model.offload", found, "write 'none'"))
    if unknown and model.compile != "off":
        found = f"found {model.compile!r}, and no plugin says what the transformer of {pipeline} is"
        faults.append(Fault("$.model.compile", found, "write 'off'"))
    if unknown and model.lora:
        found = f"found {len(model.lora)}, and no plugin says what the transformer of {pipeline} is"
        faults.append(Fault("$.model.lora", found, "leave it out"))
    return faults


def model_notices(model: ModelSpec) -> list[str]:
    """What is said of settings that do nothing; what device `auto` is, ranks find out."""
    notices = []
    if model.folder is not None and model.revision is not None:
        notices.append("model.revision takes no effect: the model is a local folder.")
    if model.device == "cpu" and model.offload != "none":
        notices.append(IDLE_OFFLOAD)
    return notices

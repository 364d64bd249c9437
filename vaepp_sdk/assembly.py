"""Builds one rank's diffusers pipeline: its part of the transformer, everything else whole."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import vaepp_sdk
from vaepp_sdk.dit.compiling import compile_blocks
from vaepp_sdk.dit.loading import load_sharded
from vaepp_sdk.dit.lora import fuse_adapters
from vaepp_sdk.dit.prompts import PromptShare
from vaepp_sdk.dit.row import Row
from vaepp_sdk.dit.spread import spread, stages_of, transformers_of
from vaepp_sdk.entries import load_object
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.offload import pin_device
from vaepp_sdk.parallel.group import DiTGroup
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.weight_files import PICKLED, SAVE_ANEW

__all__ = ["build_pipeline", "moves_by_stage", "quiet_libraries", "software"]


def quiet_libraries(rank: int) -> None:
    """Switch the libraries' progress bars off, and on ranks other than 0 what rank 0 says already."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if rank != 0:
        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", module=r"(diffusers|transformers)\b")


def build_pipeline(resolved: Resolved, group: DiTGroup) -> Any:
    """Load a pipeline onto this rank's device.

    Every rank of the DiT group calls this; nothing is exchanged.

    Raises:
        UnsupportedError: the pipeline class or its weights are not such as can be loaded.
    """
    model = resolved.spec.model
    pipeline_class = _pipeline_class(resolved)
    _refuse_pickles(resolved.model_path)
    dtype: torch.dtype = getattr(torch, model.dtype)
    given = _given_components(resolved, group, dtype)
    pipe = pipeline_class.from_pretrained(
        resolved.model_path,
        variant=model.variant,
        use_safetensors=True,
        local_files_only=True,
        **{_dtype_argument(): dtype},
        **given,
    )
    if moves_by_stage(resolved, group):
        pin_device(pipe, group.device)
    else:
        pipe.to(group.device)
    pipe.set_progress_bar_config(disable=True)
    dit = resolved.entry.dit if resolved.entry else None
    if dit is not None and not resolved.decode_only:
        if dit.component not in given:
            weights = getattr(pipe, dit.component).state_dict()
            shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
            fuse_adapters(weights, dit.component, model.lora, shapes=shapes, shards={})
        for transformer in transformers_of(pipe, dit):
            spread(transformer, dit, group)
            if model.compile != "off":
                compile_blocks(transformer, model.compile)
    return pipe


def moves_by_stage(resolved: Resolved, group: DiTGroup) -> bool:
    """Whether modules come to the device and leave it with the stages; on the CPU they stay."""
    return resolved.spec.model.offload == "stages" and group.device.type != "cpu"


def software() -> str:
    """Names and versions of what makes pictures."""
    versions = (("vaepp", vaepp_sdk), ("diffusers", diffusers), ("torch", torch))
    return ", ".join(f"{name} {module.__version__}" for name, module in versions)


def _pipeline_class(resolved: Resolved) -> Any:
    """The class, from its entry's module or from diffusers."""
    name, entry = resolved.pipeline_class, resolved.entry
    if entry is not None:
        return load_object(f"{entry.module}:{name}", f"pipeline {name!r}")
    found = getattr(diffusers, name, None)
    if found is None:
        raise UnsupportedError(
            f"diffusers {diffusers.__version__} has no {name}; upgrade it, or install the plugin that has it"
        )
    return found


def _given_components(resolved: Resolved, group: DiTGroup, dtype: torch.dtype) -> dict[str, Any]:
    """The components that diffusers is not to load itself."""
    if resolved.decode_only:
        return _without_weights(resolved)
    given = _sharded_components(resolved, group, dtype)
    if resolved.entry is not None and not PromptShare.over(group).encodes:
        given |= dict.fromkeys(resolved.entry.text_encoders)
    return given


def _without_weights(resolved: Resolved) -> dict[str, Any]:
    """The components that have weights and that decoding does not need, each as nothing."""
    folders = (path for path in resolved.model_path.iterdir() if path.is_dir() and path.name != "vae")
    return {path.name: None for path in folders if any(path.glob("*.safetensors"))}


def _sharded_components(resolved: Resolved, group: DiTGroup, dtype: torch.dtype) -> dict[str, Any]:
    """This rank's part of each transformer by its component's name; nothing where it holds all of them."""
    dit = resolved.entry.dit if resolved.entry else None
    lacking = [axis for axis in group.dims.active if dit is None or axis not in dit.axes]
    if lacking:
        raise UnsupportedError(f"no plugin says how to split {resolved.pipeline_class} by {lacking[0]}")
    tensor = Row.over(group.axis("tensor"))
    stages = stages_of(dit, group) if dit is not None else ()
    if dit is None or (tensor.size == 1 and not stages):
        return {}
    index = json.loads((resolved.model_path / "model_index.json").read_text(encoding="utf-8"))
    return {
        component: load_sharded(
            _component_class(index, component),
            resolved.model_path / component,
            dit.tensor if tensor.size > 1 else None,
            tensor,
            dtype=dtype,
            device=torch.device("cpu") if moves_by_stage(resolved, group) else group.device,
            variant=resolved.spec.model.variant,
            stages=stages,
            adapters=resolved.spec.model.lora if component == dit.component else (),
        )
        for component in dit.components
        if any(index.get(component, ()))
    }


def _component_class(index: Mapping[str, Any], component: str) -> Any:
    library, name = index[component]
    found = getattr(diffusers, name, None) if library == "diffusers" else None
    if found is None:
        raise UnsupportedError(f"{component} is {library}.{name}; only models of diffusers can be split")
    return found


def _refuse_pickles(model_path: Path) -> None:
    """Refuse components whose weights come as pickles alone: reading those runs code from the file."""
    for folder in sorted(path for path in model_path.iterdir() if path.is_dir()):
        files = sorted(path.name for path in folder.iterdir() if path.is_file())
        pickled = [name for name in files if name.endswith(PICKLED)]
        if pickled and not any(name.endswith(".safetensors") for name in files):
            raise UnsupportedError(
                f"{folder} has its weights in {pickled[0]} only, and vaepp reads safetensors only; "
                f"{SAVE_ANEW}"
            )


def _dtype_argument() -> str:
    """The name of `from_pretrained`'s dtype argument: it changed in diffusers 0.40."""
    release = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return "dtype" if release >= (0, 40) else "torch_dtype"

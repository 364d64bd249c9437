"""Loads one rank's part of a transformer: of each cut weight only its own slice is read from the files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
from safetensors import safe_open
from torch import nn

from vaepp_sdk.dit.line import Stage
from vaepp_sdk.dit.lora import fuse_adapters
from vaepp_sdk.dit.row import Row
from vaepp_sdk.dit.tensor import Shard, shard_modules
from vaepp_sdk.entries import TensorPlan
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.spec.adapters import Adapter

__all__ = ["load_sharded", "weight_files"]

_STEM = "diffusion_pytorch_model"


def load_sharded(
    model_class: Any,
    folder: Path,
    plan: TensorPlan | None,
    group: Row,
    *,
    dtype: torch.dtype,
    device: torch.device,
    variant: str | None = None,
    stages: Sequence[Stage] = (),
    adapters: Sequence[Adapter] = (),
) -> Any:
    """Build a model that holds this rank's slices, of this rank's layers, only.

    Args:
        model_class: a diffusers model class.
        folder: the component's folder, with `config.json` and safetensors files.
        plan: which layers are cut; None cuts none.
        group: the ranks that share the slices.
        dtype: of the weights, but for those the class keeps in float32.
        device: where they go.
        variant: as in diffusers' `from_pretrained`.
        stages: of each list of layers that other ranks hold some of, which ones this rank holds.
        adapters: LoRA adapters to fuse.

    Returns:
        The model, in evaluation mode, with no weight left on the meta device.

    Raises:
        UnsupportedError: the files do not fit the class or the plan; names the weights.
    """
    config = model_class.load_config(folder)
    if "quantization_config" in config:
        raise UnsupportedError(
            f"{folder} is quantized; a model can be spread over ranks with plain weights only"
        )
    # Buffers stay real: the class computes those that no file holds.
    with accelerate.init_empty_weights(include_buffers=False):
        model = model_class.from_config(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    shards = shard_modules(model, plan, group) if plan is not None else {}
    files = weight_files(folder, variant)
    elsewhere = tuple(prefix for stage in stages for prefix in stage.keep_own(model))
    own = {key: path for key, path in files.items() if not key.startswith(elsewhere)}
    state = _read(shards, own, _dtypes(model_class, dtype), device)
    _check_names(model, set(state), folder)
    fuse_adapters(state, folder.name, adapters, shapes=shapes, shards=shards)
    model.load_state_dict(state, strict=True, assign=True)
    _move_buffers(model, device)
    model.register_to_config(_name_or_path=str(folder))
    return model.eval()


def weight_files(folder: Path, variant: str | None = None) -> Mapping[str, Path]:
    """Every weight of a diffusers model, and the safetensors file that holds it.

    Raises:
        UnsupportedError: the folder has no safetensors weights, or its index names a file outside it.
    """
    single, index = _file_names(folder, variant)
    if index.is_file():
        held = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = sorted({name for name in held.values() if Path(name).name != name})
        if outside:
            raise UnsupportedError(f"{index} names files outside its folder: {', '.join(outside)}")
        return {key: folder / name for key, name in held.items()}
    if not single.is_file():
        kind = f"of variant {variant!r} " if variant else ""
        raise UnsupportedError(
            f"{folder} has no weights {kind}in safetensors files; weights in other formats are not read"
        )
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _file_names(folder: Path, variant: str | None) -> tuple[Path, Path]:
    """The single file and the index; a component without the variant's files uses the plain ones."""
    infix = f".{variant}" if variant else ""
    named = folder / f"{_STEM}{infix}.safetensors", folder / f"{_STEM}.safetensors.index{infix}.json"
    if not variant or any(path.is_file() for path in named):
        return named
    return _file_names(folder, None)


def _read(
    shards: Mapping[str, Shard],
    files: Mapping[str, Path],
    dtypes: Callable[[str], torch.dtype],
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """This rank's part of every weight in the files."""
    state = {}
    for key, tensor in _parts(files, shards):
        kind = dtypes(key) if tensor.is_floating_point() else tensor.dtype
        # Memory of its own: what a file hands out may be the file itself, mapped.
        state[key] = torch.empty(tensor.shape, dtype=kind, device=device).copy_(tensor)
    return state


def _parts(files: Mapping[str, Path], shards: Mapping[str, Shard]) -> Iterator[tuple[str, torch.Tensor]]:
    for key, path in sorted(files.items()):
        # Opened anew for each weight: the pages of an open file that were read count as this rank's memory.
        with safe_open(path, framework="pt") as file:
            if key in shards:
                yield key, shards[key].read(file.get_slice(key))
            else:
                yield key, file.get_tensor(key)


def _dtypes(model_class: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """The dtype of a weight by its name, by the rule of diffusers' `_keep_in_fp32_modules`."""
    kept = getattr(model_class, "_keep_in_fp32_modules", None) or []

    def of(name: str) -> torch.dtype:
        return torch.float32 if set(kept) & set(name.split(".")) else dtype

    return of


def _check_names(model: nn.Module, found: set[str], folder: Path) -> None:
    wanted = set(model.state_dict())
    problems = [
        f"{label} {', '.join(sorted(names)[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for label, names in (("missing:", wanted - found), ("unknown:", found - wanted))
        if names
    ]
    if problems:
        raise UnsupportedError(
            f"the weights in {folder} do not fit {type(model).__name__}; {'; '.join(problems)}"
        )


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers that no file holds; weights are there already."""
    model.to(device)
    left = [name for name, value in model.state_dict().items() if value.is_meta]
    left += [name for name, value in model.named_buffers() if value.is_meta]
    if left:
        raise UnsupportedError(f"{type(model).__name__}: nothing gives a value to {', '.join(sorted(left))}")

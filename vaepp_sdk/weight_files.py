"""Which files a model's weights are loaded from, and whether these are whole: only headers are read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vaepp_sdk.entries import PipelineEntry
from vaepp_sdk.errors import Fault
from vaepp_sdk.headers import BrokenFileError, tensor_names
from vaepp_sdk.model_folder import ModelFolder
from vaepp_sdk.spec import ModelSpec
from vaepp_sdk.spec.adapters import Adapter
from vaepp_sdk.text import clean, reason_of, shown

__all__ = ["PICKLED", "SAVE_ANEW", "adapter_faults", "weight_faults"]

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""How files of weights end that are not read: reading them runs code from the file."""

SAVE_ANEW = "save the model anew with save_pretrained(..., safe_serialization=True)"

_VARIANT_FILE = re.compile(r"[^.]+\.([A-Za-z0-9_-]+?)(-\d{5}-of-\d{5})?\.safetensors")
_MAX_INDEX = 64 << 20
_TOLD = 3


def adapter_faults(adapters: Sequence[Adapter]) -> list[Fault]:
    """The LoRA adapters whose file is broken or missing."""
    faults = []
    for index, adapter in enumerate(adapters):
        try:
            tensor_names(Path(adapter.path))
        except BrokenFileError as problem:
            found = f"{clean(adapter.path, 200)}: {problem}"
            faults.append(Fault(f"$.model.lora[{index}]", found, "give a whole safetensors file"))
    return faults


def weight_faults(
    model: ModelSpec, folder: ModelFolder, entry: PipelineEntry | None, *, decode_only: bool
) -> list[Fault]:
    """What keeps the weights from being loaded, as far as their files show.

    Args:
        model: the `[model]` table.
        folder: a folder with weights in it.
        entry: the pipeline's entry, if there is one.
        decode_only: only the VAE is loaded.
    """
    faults = _variant_faults(model, folder)
    if faults:
        return faults
    for component in ("vae",) if decode_only else folder.components:
        path = _first_file(folder.path / component, model.variant)
        if path is not None:
            faults += _broken(component, list(_problems(path)))
        elif component in _weighty(entry):
            faults.append(_without_weights(folder.path / component))
    return faults


def _variant_faults(model: ModelSpec, folder: ModelFolder) -> list[Fault]:
    """A variant that no component has weights of; where some have them, the others use their plain ones."""
    if model.variant is None:
        return []
    there = set()
    for component in folder.components:
        for path in (folder.path / component).glob("*.safetensors"):
            named = _VARIANT_FILE.fullmatch(path.name)
            there |= {named[1]} if named else set()
    if model.variant in there:
        return []
    found = f"the model has no safetensors files of {shown(model.variant)}"
    fix = f"it has those of {', '.join(sorted(there))}; or leave it out" if there else "leave it out"
    return [Fault("$.model.variant", found, fix)]


def _weighty(entry: PipelineEntry | None) -> tuple[str, ...]:
    """The components that are known to have weights; others may be tokenizers and the like."""
    if entry is None:
        return ()
    return ("vae", *entry.text_encoders, *(entry.dit.components if entry.dit is not None else ()))


def _broken(component: str, problems: Sequence[str]) -> list[Fault]:
    """What is wrong with a component's files, as one fault."""
    if not problems:
        return []
    more = len(problems) - _TOLD
    told = "; ".join([*problems[:_TOLD], *([f"and {more} more files"] if more > 0 else [])])
    return [Fault("$.model.id", told, f"fetch or copy the model's {clean(component)} again")]


def _without_weights(folder: Path) -> Fault:
    """A component without any file that weights could be loaded from."""
    fix = f"fetch or copy the model's {clean(folder.name)} again"
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    if pickled:
        fix = f"it has {clean(pickled[0])}, which is not read: {SAVE_ANEW}"
    return Fault("$.model.id", f"{clean(folder.name)} has no weights in safetensors files", fix)


def _first_file(folder: Path, variant: str | None) -> Path | None:
    """The file that leads to a component's weights: the one that its library finds first."""
    # not Path.is_file, which raises where a folder may not be read
    return next((path for path in _candidates(folder, variant) if os.path.isfile(path)), None)  # noqa: PTH113


def _problems(path: Path) -> Iterator[str]:
    """What is wrong with the files that one component is loaded from."""
    return _file_problems(path) if path.suffix == ".safetensors" else _index_problems(path)


def _candidates(folder: Path, variant: str | None) -> Iterator[Path]:
    """The files that may lead to a component's weights, in the order in which its library looks for them."""
    for infix in (f".{variant}", "") if variant else ("",):
        yield folder / f"diffusion_pytorch_model.safetensors.index{infix}.json"
        yield folder / f"diffusion_pytorch_model{infix}.safetensors"
        yield folder / f"model{infix}.safetensors"  # transformers takes one file before several
        yield folder / f"model.safetensors.index{infix}.json"


def _file_problems(path: Path, wanted: Sequence[str] = ()) -> Iterator[str]:
    try:
        held = tensor_names(path)
    except BrokenFileError as problem:
        yield f"{_name(path)}: {problem}"
        return
    lacking = [key for key in wanted if key not in held]
    if lacking:
        more = f" and {len(lacking) - 1} more weights" if len(lacking) > 1 else ""
        yield f"{_name(path)} lacks {shown(lacking[0])}{more}, by its index"


def _index_problems(index: Path) -> Iterator[str]:
    try:
        files = _weights_by_file(index)
    except BrokenFileError as problem:
        yield f"{_name(index)}: {problem}"
        return
    for file, weights in sorted(files.items()):
        if (index.parent / file).is_file():
            yield from _file_problems(index.parent / file, weights)
        else:
            yield f"{_name(index)} names {shown(file)}, which is no file"


def _weights_by_file(index: Path) -> dict[str, list[str]]:
    """The weights that an index says each file holds.

    Raises:
        BrokenFileError: it is no index.
    """
    files: dict[str, list[str]] = {}
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise BrokenFileError(f"it is larger than {_MAX_INDEX >> 20} MiB")
        found = json.loads(index.read_text(encoding="utf-8"))
        for weight, file in found["weight_map"].items():
            files.setdefault(Path(file).as_posix(), []).append(weight)
    except OSError as error:
        raise BrokenFileError(f"it cannot be read: {reason_of(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BrokenFileError("it does not say which file holds which weight") from None
    return files


def _name(path: Path) -> str:
    """A file of a component, as seen from the model's folder."""
    return clean(f"{path.parent.name}/{path.name}", 200)

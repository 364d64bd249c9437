"""Weight files that are broken or missing are named before any rank starts; only their headers are read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from spec_models import WEIGHTS, model_folder, stand_in_registry

from vaepp_sdk import weight_files
from vaepp_sdk.errors import SpecError
from vaepp_sdk.headers import tensor_names
from vaepp_sdk.resolve import resolve
from vaepp_sdk.spec import PipelineSpec

REGISTRY = stand_in_registry()
INDEX = f"{WEIGHTS}.index.json"
SHARDS = [f"diffusion_pytorch_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
WORDS = "fetch or copy the model's transformer again"


def store(path: Path, *names: str) -> None:
    """A safetensors file of one float32 a tensor."""
    tensors = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * index, 4 * index + 4]}
        for index, name in enumerate(names)
    }
    header = json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * len(names)))


def index(folder: Path, files: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The transformer's weights are in three files, with an index, those of the VAE in one."""
    folder = model_folder(tmp_path / "model")
    store(folder / "vae" / WEIGHTS, "x0", "y0")
    transformer = folder / "transformer"
    (transformer / WEIGHTS).unlink()
    for number, name in enumerate(SHARDS):
        store(transformer / name, f"a{number}", f"b{number}")
    index(transformer, {f"{letter}{number}": SHARDS[number] for letter in "ab" for number in range(3)})
    return folder


def faults(model: Path, *overrides: str, decode_only: bool = False) -> list[str]:
    try:
        spec = PipelineSpec.load({"model": {"id": str(model)}}, overrides)
        resolve(spec, REGISTRY, decode_only=decode_only)
    except SpecError as error:
        return [str(fault) for fault in error.faults]
    return []


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def within_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:30])


def pointer(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def no_offsets(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 12) + b'{"a": [1,2]}')


def no_json(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 5) + b"hello")


SIZE = 140
"""Of a file of two tensors."""

SPOILT = [
    (shorter, f"it has {SIZE - 4} bytes, and by its header {SIZE}"),
    (longer, f"it has {SIZE + 1} bytes, and by its header {SIZE}"),
    (within_header, f"it has 30 bytes, and its header alone {SIZE - 8}"),
    (pointer, "it is a pointer of Git LFS, and not the file itself"),
    (no_offsets, "its header does not say where its tensors are"),
    (no_json, "its header does not say where its tensors are"),
    (
        lambda path: path.write_bytes(b"\xff" * 64),
        "it does not begin as a safetensors file does, and has 64 bytes",
    ),
    (lambda path: path.write_bytes(b""), "it does not begin as a safetensors file does, and has 0 bytes"),
]
NAMES = ["short", "long", "header cut", "pointer", "no offsets", "no json", "garbage", "empty"]


def test_whole_files_are_fine_and_looked_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []

    def noted(path: Path) -> frozenset[str]:
        looked_at.append(path.name)
        return tensor_names(path)

    monkeypatch.setattr(weight_files, "tensor_names", noted)
    assert faults(model) == []
    assert sorted(looked_at) == sorted([WEIGHTS, *SHARDS])


@pytest.mark.parametrize(("spoil", "found"), SPOILT, ids=NAMES)
@pytest.mark.parametrize("place", [f"vae/{WEIGHTS}", f"transformer/{SHARDS[1]}"])
def test_a_broken_file_is_named(model: Path, spoil: Callable[[Path], None], found: str, place: str) -> None:
    assert (model / place).stat().st_size == SIZE
    spoil(model / place)
    component = place.partition("/")[0]
    assert faults(model) == [f"$.model.id: {place}: {found}; fetch or copy the model's {component} again"]


def test_what_an_index_says_and_is_not_there(model: Path) -> None:
    transformer = model / "transformer"
    (transformer / SHARDS[2]).unlink()
    store(transformer / SHARDS[0], "a0")
    missing = f'transformer/{INDEX} names "{SHARDS[2]}", which is no file'
    assert faults(model) == [
        f'$.model.id: transformer/{SHARDS[0]} lacks "b0", by its index; {missing}; {WORDS}'
    ]
    for broken in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\udcff"):
        (transformer / INDEX).write_text(broken, errors="surrogateescape")
        told = "it does not say which file holds which weight"
        assert faults(model) == [f"$.model.id: transformer/{INDEX}: {told}; {WORDS}"]


def test_many_broken_files_are_one_fault(model: Path) -> None:
    names = [f"model-{number}.safetensors" for number in range(9)]
    index(model / "transformer", {name: name for name in names})
    (told,) = faults(model)
    assert told.count("which is no file") == 3
    assert told.endswith(f"; and 6 more files; {WORDS}")


def test_a_component_without_weights(model: Path) -> None:
    weights = model / "vae" / WEIGHTS
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    lacking = "$.model.id: vae has no weights in safetensors files; "
    assert faults(model)[0].startswith(
        f"{lacking}it has diffusion_pytorch_model.bin, which is not read: save"
    )
    (model / "vae" / "diffusion_pytorch_model.bin").unlink()
    assert faults(model) == [f"{lacking}fetch or copy the model's vae again"]


def test_only_what_is_loaded_is_looked_at(model: Path) -> None:
    """Of a model's copies in other types, and of what decoding kept latents does without, nothing."""
    vae, transformer = model / "vae", model / "transformer"
    (vae / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"broken")
    (vae / "old.safetensors").write_bytes(b"broken")
    assert faults(model) == []
    (told,) = faults(model, "model.variant=fp16")
    assert "vae/diffusion_pytorch_model.fp16.safetensors: it does not begin" in told
    (transformer / SHARDS[0]).unlink()
    assert faults(model) != []
    assert faults(model, decode_only=True) == []
    shorter(vae / WEIGHTS)
    assert len(faults(model, decode_only=True)) == 1


def test_an_adapter_that_is_missing_or_broken(model: Path, tmp_path: Path) -> None:
    one, other, pipe = (tmp_path / f"{name}.safetensors" for name in ("one", "other", "pipe"))
    store(one, "x")
    os.mkfifo(pipe)
    lora = f"model.lora={json.dumps([str(one), str(other), str(pipe)])}"
    assert faults(model, lora, decode_only=True) == []
    missing = "there is no such file; give a whole safetensors file"
    assert faults(model, lora) == [
        f"$.model.lora[1]: {other}: {missing}",
        f"$.model.lora[2]: {pipe}: {missing}",
    ]
    within_header(one)
    assert faults(model, f'model.lora=["{one}"]')[0].startswith(f"$.model.lora[0]: {one}: it has 30 bytes")

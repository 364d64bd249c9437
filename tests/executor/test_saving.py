"""Picture files: whole or not there, never over another, with what made them inside."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vaepp_sdk.errors import OutputError
from vaepp_sdk.saving import Origin, PictureFolder, slug

PICTURE = Image.new("RGB", (8, 8), (10, 20, 30))
PROMPTS = [
    "a city at sunset",
    "一幅创意海报",
    "naïve café “quoted”",
    "emoji 🌇 and right-to-left \u202eevil",
    "lone \ud800 surrogate",
    "line\nbreak\ttab\x00nul",
    "x" * 100_000,
]


def info(prompt: str = "p", seed: int = 7, **details: Any) -> Any:
    return Origin(prompt, seed, details, "vaepp 0").png()


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_metadata_survives_any_prompt(tmp_path: Path, prompt: str) -> None:
    saved = PictureFolder(tmp_path).save(PICTURE, "a.png", info(prompt, spec={"model": {"id": "m"}}))
    with Image.open(saved) as image:
        image.load()
        text = image.text  # type: ignore[attr-defined]
    held = json.loads(text["vaepp"])
    assert held == {"prompt": prompt, "seed": 7, "spec": {"model": {"id": "m"}}}
    assert text["prompt"] == prompt.replace("\ud800", "\ufffd")
    assert text["seed"] == "7"
    assert text["Software"] == "vaepp 0"


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("A futuristic city, at sunset!", "a-futuristic-city-at-sunset"),
        ("../../etc/passwd", "etc-passwd"),
        ("naïve café", "naive-cafe"),
        ("一幅创意海报", "picture"),
        ("", "picture"),
        ("a " * 100, "a-" * 23 + "a"),
        ("x" * 100, "x" * 48),
        ("\ud800\x00\n", "picture"),
    ],
)
def test_slugs_hold_letters_digits_and_dashes_only(prompt: str, wanted: str) -> None:
    assert slug(prompt) == wanted
    assert len(slug(prompt)) <= 48


def test_numbers_go_on_after_those_that_are_there(tmp_path: Path) -> None:
    assert PictureFolder(tmp_path / "new").number(2) == 0
    for name in ("0003-a-seed1.png", "0012-b.png", "99-not-ours.png", "0050-notes.txt"):
        (tmp_path / name).write_text("x")
    folder = PictureFolder(tmp_path)
    assert [folder.number(2), folder.number(1), folder.number(1)] == [13, 15, 16]
    assert PictureFolder(tmp_path, overwrite=True).number(1) == 0


def test_an_existing_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("old")
    with pytest.raises(OutputError, match=r"a\.png exists and is not replaced.*overwrite = true"):
        PictureFolder(tmp_path).save(PICTURE, "a.png", info())
    assert (tmp_path / "a.png").read_text() == "old"
    assert names(tmp_path) == ["a.png"]


def test_overwrite_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("old")
    PictureFolder(tmp_path, overwrite=True).save(PICTURE, "a.png", info())
    assert size_of(tmp_path / "a.png") == (8, 8)
    assert names(tmp_path) == ["a.png"]


def test_a_file_system_without_links_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    folder = PictureFolder(tmp_path)
    folder.save(PICTURE, "a.png", info())
    assert size_of(tmp_path / "a.png") == (8, 8)
    with pytest.raises(OutputError, match="exists"):
        folder.save(PICTURE, "a.png", info())
    assert names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("where", ["fsync", "image"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, code: int, where: str
) -> None:
    name = "old.png" if overwrite else "new.png"
    (tmp_path / "old.png").write_text("old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    owner, attribute = (os, "fsync") if where == "fsync" else (Image.Image, "save")
    monkeypatch.setattr(owner, attribute, fail)
    with pytest.raises(OutputError, match=f"cannot write .*{name}: {os.strerror(code)}"):
        PictureFolder(tmp_path, overwrite).save(PICTURE, name, info())
    assert names(tmp_path) == ["old.png"]
    assert (tmp_path / "old.png").read_text() == "old"


@pytest.mark.parametrize("path", ["file", "file/below", "/dev/full/x", "/proc/nothing"])
def test_a_place_that_is_no_folder_is_refused_early(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("x")
    place = tmp_path / path
    with pytest.raises(OutputError, match=r"cannot write .*name another") as caught:
        PictureFolder(place).prepare()
    assert str(place) in str(caught.value)


def test_preparing_makes_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    PictureFolder(tmp_path / "a" / "b").prepare()
    assert names(tmp_path / "a" / "b") == []


def test_a_read_only_folder_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)  # a root user may write to any folder, so its mode says nothing
    with pytest.raises(OutputError, match="Read-only file system"):
        PictureFolder(tmp_path).prepare()


FRAMES = [Image.new("RGB", (16, 8), (10 * number, 20, 30)) for number in range(3)]
ORIGIN = Origin("p", 7, {"spec": {}}, "vaepp 0")


def test_a_clip_is_a_folder_of_frames(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    made = folder.save_clip(FRAMES, "0004-a-seed7", ORIGIN, None)
    assert made == tmp_path / "0004-a-seed7-frames"
    assert names(tmp_path) == [made.name]
    assert names(made) == ["frame-0000.png", "frame-0001.png", "frame-0002.png"]
    for frame, file in zip(FRAMES, sorted(made.iterdir()), strict=True):
        with Image.open(file) as image:
            assert image.tobytes() == frame.tobytes()
            assert json.loads(image.text["vaepp"]) == {"prompt": "p", "seed": 7, "spec": {}}  # type: ignore[attr-defined]
    assert folder.number(1) == 5
    with pytest.raises(OutputError, match="0004-a-seed7-frames exists and is not replaced"):
        folder.save_clip(FRAMES[:1], "0004-a-seed7", ORIGIN, None)
    assert len(names(made)) == 3
    PictureFolder(tmp_path, overwrite=True).save_clip(FRAMES[:1], "0004-a-seed7", ORIGIN, None)
    assert names(made) == ["frame-0000.png"]
    assert names(tmp_path) == [made.name], "nothing is left beside it"


def test_a_clip_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=r"cannot write .*a-frames: No space"):
        PictureFolder(tmp_path).save_clip(FRAMES, "a", ORIGIN, None)
    assert names(tmp_path) == []


def test_a_clip_is_a_video_file_with_its_origin_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("imageio", reason="the video extra is not installed")
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="the video extra is not installed")
    made = PictureFolder(tmp_path).save_clip(FRAMES, "0004-a-seed7", ORIGIN, 8)
    assert made == tmp_path / "0004-a-seed7.mp4"
    assert names(tmp_path) == ["0004-a-seed7.json", "0004-a-seed7.mp4"]
    held = json.loads((tmp_path / "0004-a-seed7.json").read_text())
    assert held == {"prompt": "p", "seed": 7, "software": "vaepp 0", "spec": {}}
    frames, seconds = ffmpeg.count_frames_and_secs(str(made))
    assert (frames, frames / seconds) == (3, pytest.approx(8, rel=0.05))

"""Many requests: `[[call]]` entries and files of prompts, checked as wholes before anything starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from spec_models import model_folder, stand_in_registry

from vaepp_sdk.errors import SpecError
from vaepp_sdk.resolve import resolve
from vaepp_sdk.spec import PipelineSpec
from vaepp_sdk.spec.calls import MAX_CALLS
from vaepp_sdk.spec.prompts import MAX_PROMPT_BYTES, NamedCall, Upcoming, read_prompts

MODEL = {"model": {"id": "org/name"}}
ENTRIES = [{"prompt": "a", "height": 64, "seed": 7}, {"prompt": "b"}, {"prompt": "c", "height": 96}]


def faults_of(error: pytest.ExceptionInfo[SpecError]) -> dict[str, str]:
    return {fault.path: f"{fault.found}; {fault.fix}" for fault in error.value.faults}


def test_what_an_entry_leaves_out_is_as_in_the_first(tmp_path: Path) -> None:
    path = tmp_path / "many.toml"
    path.write_text(
        '[model]\nid = "org/name"\n[[call]]\nprompt = "a"\nheight = 64\nseed = 7\n'
        '[[call]]\nprompt = "b"\n[[call]]\nprompt = "c"\nheight = 96\n'
    )
    spec = PipelineSpec.load(path)
    assert spec.calls == (
        {"prompt": "a", "height": 64, "seed": 7},
        {"prompt": "b", "height": 64, "seed": 7},
        {"prompt": "c", "height": 96, "seed": 7},
    )
    assert spec.call == spec.calls[0]
    assert spec.to_dict()["call"] == ENTRIES
    assert PipelineSpec.load(spec.to_dict()) == spec == PipelineSpec.load(spec)
    assert "call" not in spec.to_shareable(), "a picture comes from one of them"
    assert [call["height"] for call in PipelineSpec.load(path, ["call.height=32"]).calls] == [32] * 3
    one = PipelineSpec.load({**MODEL, "call": [{"prompt": "a"}]})
    assert one == PipelineSpec.load({**MODEL, "call": {"prompt": "a"}})


@pytest.mark.parametrize(
    ("call", "path", "words"),
    [
        ([], "$.call", "1 to 10000 entries work"),
        ([{}] * (MAX_CALLS + 1), "$.call", "1 to 10000 entries work"),
        ([{}, 3], "$.call[1]", "must be a table"),
        ([{"height": "64"}, {}], "$.call[0].height", "must be an integer"),
        ([{}, {"seed": -1}], "$.call[1].seed", "at least 0"),
        ([{}, {"x" * 101: 1}], f'$.call[1]."{"x" * 60}... (101 characters)"', "shorter name"),
    ],
)
def test_a_bad_entry_is_named(call: Any, path: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        PipelineSpec.load({**MODEL, "call": call})
    assert words in faults_of(caught)[path]


def test_entries_meet_the_pipelines_signature(tmp_path: Path) -> None:
    model = {"model": {"id": str(model_folder(tmp_path / "m"))}}
    spec = PipelineSpec.load({**model, "call": [{"prompt": "a"}, {"hieght": 64}, {"generator": 1}]})
    with pytest.raises(SpecError) as caught:
        resolve(spec, stand_in_registry())
    assert list(faults_of(caught)) == ["$.call[1].hieght", "$.call[2].generator"]


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "seed": 3}\r\n\n{"prompt": ["b", "c"], "height": null}')
    read = read_prompts(path)
    assert read == Upcoming(
        [
            NamedCall(f"{path}:1", f"{path}:1: $", {"prompt": "a", "seed": 3}),
            NamedCall(f"{path}:3", f"{path}:3: $", {"prompt": ["b", "c"], "height": None}),
        ],
        [],
    )


HOSTILE = {
    "not json": ("{prompt}", "it is not JSON: Expecting property name enclosed in double quotes at column 2"),
    "a list": ('["a"]', "found a list of 1"),
    "a string": ('"a"', 'found "a"'),
    "nan": ('{"guidance_scale": NaN}', "NaN is no number of JSON"),
    "infinity": ('{"guidance_scale": 1e999}', "1e999 is too large"),
    "digits": ('{"seed": ' + "9" * 5000 + "}", "thousands of digits"),
    "deep": ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
    "twice": ('{"seed": 1, "seed": 2}', 'the name "seed" stands there twice'),
    "escapes": ('{"a": "\\u001b[2J", "\\u001b": 1', "it is not JSON"),
    "long name": ('{"' + "x" * 101 + '": 1}', "cannot be a name"),
}


def test_bad_lines_are_told_all_at_once_with_their_numbers(tmp_path: Path) -> None:
    """And with what only the pipeline and the whole request can tell; nothing is fetched before."""
    path = tmp_path / "p.jsonl"
    rest = ['{"height": "64"}', '{"prompt": null}', '{"hieght": 1}', '{"prompt": "\\ud800"}', '{"seed": 4}']
    path.write_text("\n".join([*(text for text, _ in HOSTILE.values()), *rest]))
    tables = {"model": {"id": str(model_folder(tmp_path / "m"))}, "call": {"prompt": "a"}}
    with pytest.raises(SpecError) as caught:
        resolve(PipelineSpec.load(tables), stand_in_registry(), upcoming=read_prompts(path))
    found = faults_of(caught)
    for number, (_, words) in enumerate(HOSTILE.values(), 1):
        (fault,) = [text for place, text in found.items() if f"{place}: ".startswith(f"{path}:{number}: ")]
        assert words in fault, number
    last = len(HOSTILE)
    assert [place for place in found if ": $" in place][1:] == [
        f"{path}:{last + 1}: $.height",
        f"{path}:{last + 2}: $.prompt",
        f"{path}:{last + 3}: $.hieght",
        f"{path}:{last + 4}: $.prompt",
    ]
    assert str(caught.value).isprintable() or "\x1b" not in str(caught.value)


def test_thousands_of_bad_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("x\n" * MAX_CALLS)
    tables = {"model": {"id": str(model_folder(tmp_path / "m"))}}
    with pytest.raises(SpecError) as caught:
        resolve(PipelineSpec.load(tables), stand_in_registry(), upcoming=read_prompts(path))
    assert len(caught.value.faults) == 51
    assert caught.value.faults[-1].found == f"there are {MAX_CALLS - 50} more faults in the requests"


def test_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    empty, many, large = tmp_path / "empty", tmp_path / "many", tmp_path / "large"
    empty.write_text("\n\n")
    many.write_text("{}\n" * (MAX_CALLS + 1))
    large.touch()
    os.truncate(large, MAX_PROMPT_BYTES + 1)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, words in {
        empty: "it holds 0 requests",
        many: f"it holds {MAX_CALLS + 1} requests",
        large: f"a file of prompts has at most {MAX_PROMPT_BYTES} bytes",
        fifo: "it is a pipe; give the path of a file of JSON lines",
        tmp_path: "it is a folder",
        tmp_path / "nowhere": "there is no such file",
    }.items():
        with pytest.raises(SpecError, match=words):
            read_prompts(path)

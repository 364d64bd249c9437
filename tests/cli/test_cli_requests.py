"""Many requests of one command over stand-in ranks: each has its own outcome."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.commands import light, run_folders, write_spec

TILING = ("--set", "vae.vae_use_tiling=true")
REFUSE_SECOND = {"kind": "refuse", "rank": "all", "stage": "encode_prompt", "request": 1}


@pytest.fixture
def spec(tmp_path: Path, tiny_model: Path) -> str:
    return str(write_spec(tmp_path, tiny_model))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n{"prompt": "three", "seed": 9}\n')
    return str(path)


def test_a_file_of_prompts_is_served_by_one_pool(spec: str, prompts: str, tmp_path: Path) -> None:
    done = light(spec, "--prompts", prompts, *TILING, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [f"/pictures/{name}.png" for name in ("one", "two", "three")]
    assert [line.split() for line in lines[4:8]] == [
        ["request", "seed", "seconds", "files"],
        [f"{prompts}:1", "5", "3.00", "1"],
        [f"{prompts}:3", "5", "3.00", "1"],
        [f"{prompts}:4", "9", "3.00", "1"],
    ]
    assert lines[-1] == "3 requests served, 0 refused"
    assert done.stderr == ""


def test_a_refused_request_fails_alone(spec: str, prompts: str, tmp_path: Path) -> None:
    done = light(spec, "--prompts", prompts, "--json", *TILING, tmp_path=tmp_path, fault=REFUSE_SECOND)
    assert done.returncode == 2
    assert done.stderr == f"vaepp-run: {prompts}:3 is refused: this size is not served\n"
    requests = json.loads(done.stdout)["requests"]
    assert [one.get("files") for one in requests] == [["/pictures/one.png"], None, ["/pictures/three.png"]]
    assert requests[1] == {"request": f"{prompts}:3", "error": "this size is not served"}
    assert run_folders(tmp_path) == []


def test_a_request_that_fails_alike_on_all_ranks_fails_alone(spec: str, prompts: str, tmp_path: Path) -> None:
    fault = {"kind": "check", "rank": "all", "stage": "denoise", "request": 1}
    done = light(spec, "--prompts", prompts, *TILING, tmp_path=tmp_path, fault=fault)
    assert done.returncode == 1
    (folder,) = run_folders(tmp_path)
    words = "failed: the request failed in stage denoise, and the ranks are ready for others"
    assert done.stderr.splitlines() == [
        f"vaepp-run: {prompts}:3 {words}: no such size",
        f"  the logs of all ranks are in {folder}",
    ]
    assert done.stdout.splitlines()[-1] == "2 requests served, 0 refused, 1 failed"
    assert done.stdout.count("/pictures/") == 2


def test_a_failure_names_its_request_and_reports_what_was_served(
    spec: str, prompts: str, tmp_path: Path
) -> None:
    fault = {"kind": "KILL", "rank": 1, "stage": "decode", "request": 1}
    done = light(spec, "--prompts", prompts, "--quiet", *TILING, tmp_path=tmp_path, fault=fault)
    assert done.returncode == 1
    assert done.stdout == "/pictures/one.png\n"
    first, _, third, fourth = done.stderr.splitlines()
    assert first.startswith("vaepp-run: rank 1 failed in stage decode: its process was killed by SIGKILL")
    assert third == f"  it was request 2 of 3, {prompts}:3"
    assert fourth == "  1 came before it; 2 got no picture, this one included"


def test_entries_of_the_spec_under_torchruns_variables_too(spec: str, tmp_path: Path) -> None:
    """One rank that a launcher started serves the same entries in place."""
    path = Path(spec)
    text = (
        path.read_text().replace("[call]", "[[call]]") + '\n[[call]]\nprompt = "b"\n[[call]]\nprompt = "c"\n'
    )
    path.write_text(text)
    sizes = ("--set", "parallel.tensor_parallel_size=1", "--set", "parallel.vae_patch_parallel_size=1")
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = light(spec, "--quiet", *sizes, tmp_path=tmp_path, fault=REFUSE_SECOND, **place)
    assert done.returncode == 2
    assert done.stdout.splitlines() == ["/pictures/a red cube.png", "/pictures/c.png"]
    assert done.stderr == "vaepp-run: rank 0: call[1] is refused: this size is not served\n"


def test_bad_requests_start_nothing(spec: str, prompts: str, tmp_path: Path) -> None:
    Path(prompts).write_text('{"prompt": "one"}\n{"prompt": 2}\nthree\n{"width": 10}\n')
    for check in ((), ("--check",)):
        done = light(spec, "--prompts", prompts, *check, tmp_path=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        head, *lines = done.stderr.splitlines()
        assert head == f"vaepp-run: {spec}: 3 faults"
        assert lines[0].startswith(f"  {prompts}:3: it is not JSON: ")
        assert lines[1].startswith(f"  {prompts}:2: $.prompt: found 2; it must be a string")
        assert lines[2] == f"  {prompts}:4: $.width: found 10; multiples of 16 work; 16 is nearest"
    done = light(spec, "--prompts", prompts, "--resume", str(tmp_path), tmp_path=tmp_path)
    assert done.returncode == 2
    Path(spec).write_text(Path(spec).read_text().replace("[call]", "[[call]]") + '\n[[call]]\nprompt = "b"\n')
    done = light(spec, "--prompts", prompts, tmp_path=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--prompts names requests too" in done.stderr
    assert run_folders(tmp_path) == []

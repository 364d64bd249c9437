"""Commands that start no rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli.commands import environment, real, run_folders, write_spec

from vaepp_sdk import __version__
from vaepp_sdk.cli.main import main
from vaepp_sdk.spec.schema import schema_text

BAD = """
[model]
id = 5
[parallel]
tensor_parallel_size = "2"
vae_patch_parallel_sise = 2
"""


def test_a_bad_spec_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    spec = tmp_path / "bad.toml"
    spec.write_text(BAD)
    done = real(str(spec), tmp_path=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == f"vaepp-run: {spec}: 3 faults"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "$.model.id",
        "$.parallel.tensor_parallel_size",
        "$.parallel.vae_patch_parallel_sise",
    ]
    assert run_folders(tmp_path) == []


def test_a_bad_spec_is_refused_without_torch(tmp_path: Path) -> None:
    """Importing torch takes seconds; a refusal takes none."""
    spec = tmp_path / "bad.toml"
    spec.write_text(BAD)
    code = (
        "import sys; from vaepp_sdk.cli.main import main; code = main([sys.argv[1]]); "
        "print(code, 'torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(spec)],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        check=True,
    )
    assert done.stdout == "2 False False\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "which spec?"),
        (["nowhere.toml"], "nowhere.toml"),
        (["--check", "nowhere.toml"], "nowhere.toml"),
        ([""], "found an empty string; give the path of a TOML file"),
        (["--resume", ""], "found an empty string; give the folder of a run"),
        (["--plugins", "a.toml"], "--plugins does not go together with a spec: "),
        (["--plugins", ""], "--plugins does not go together with a spec: "),
        (["--plugins", "--schema"], "--plugins does not go together with --schema: "),
        (["--schema", "--set", "a.b=1"], "--schema does not go together with --set: "),
        (["--schema", "--check"], "--schema does not go together with --check: "),
        (["--resume", "run-0", "a.toml"], "--resume does not go together with a spec: "),
        (["--resume", "run-0", "--prompts", "p"], "--resume does not go together with --prompts: "),
        (["--check", "--quiet", "a.toml"], "--check does not go together with --quiet: "),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("vaepp-run: ")
    assert words in shown.err


def test_an_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--jsno"])
    assert caught.value.code == 2
    assert "--jsno" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"vaepp {__version__}\n"


def test_plugins(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plugins"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {plugin["name"] for plugin in found["plugins"]} >= {"tile", "patch", "vaes", "z_image"}
    assert set(found["strategies"]) >= {"tile", "patch"}
    assert all(found["strategies"].values()), "each with its promise"
    assert "ZImagePipeline" in found["allowlist"]


ENDING = """
import os
{at_import}
from vaepp_sdk import hookimpl
VAEPP_API = 1

@hookimpl
def vaepp_register_vaes(register):
    os._exit(0)
"""


@pytest.mark.parametrize(("at_import", "code"), [("os._exit(0)", 0), ("", 2)], ids=["import", "hook"])
def test_a_plugin_cannot_end_vaepp_run_without_a_word(at_import: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "ending.py").write_text(ENDING.format(at_import=at_import))
    package = tmp_path / "ending-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: ending\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[vaepp_sdk]\nending = ending\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = real("--plugins", tmp_path=tmp_path, PYTHONPATH=path)
    assert done.returncode == code
    assert f"os._exit(0) is called by {tmp_path}/ending.py:" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--schema"]) == 0
    assert capsys.readouterr().out == schema_text()


def test_check_says_what_would_run(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = str(write_spec(tmp_path, tiny_model))
    assert main([spec, "--check"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "pipeline  ZImagePipeline",
        f"model     {tiny_model}",
        "device    cpu",
        "ranks     data 1 x cfg 1 x pipeline 1 x ring 1 x ulysses 1 x tensor 2 = 2",
        "vae       2 ranks, strategy auto, output rank0; tiling: on",
    ]
    assert shown.err.startswith("vaepp-run: warning: vae_use_tiling is switched on")
    assert main([spec, "--check", "--json", "--set", "parallel.vae_patch_parallel_size=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["vae_size"], found["pipeline_class"]) == (1, "ZImagePipeline")
    assert main([spec, "--check", "--set", "vae.strategy=shard", "--set", "vae.vae_use_tiling=true"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == "vae       2 ranks, strategy shard, output rank0; tiling: off"
    assert "vae.vae_use_tiling takes no effect: strategy 'shard'" in shown.err
    assert main([spec, "--check", "--prompts", ""]) == 2
    assert "--prompts: 1 fault\n  $: found an empty string" in capsys.readouterr().err
    assert main([spec, "--check", "--set", "call.seed=-1"]) == 2
    assert "$.call.seed" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_fault() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        command = [
            sys.executable,
            "-c",
            "from vaepp_sdk.cli.main import entry_point; entry_point()",
            "--schema",
        ]
        ran = subprocess.run(
            command, stdout=gone, stderr=subprocess.PIPE, text=True, timeout=120, check=False
        )
    assert ran.returncode == 128 + signal.SIGPIPE
    assert ran.stderr == ""

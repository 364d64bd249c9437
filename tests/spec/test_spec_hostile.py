"""Spec files nobody should write: each is refused with readable sentences, quickly, and nothing else."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vaepp_sdk.errors import SpecError
from vaepp_sdk.spec import PipelineSpec

MODEL = '[model]\nid = "org/name"\n'

# name: (text or bytes of the file, path in the message, what works in the message)
TEXTS: dict[str, tuple[str | bytes, str, str]] = {
    "empty": ("", "$.model", "write a table [model] with id"),
    "blank": ("\n \n", "$.model", "write a table"),
    "no id": ("[model]\n", "$.model.id", "write it: A hub id"),
    "unknown table": (MODEL + "[paralel]\n", "$.paralel", "did you mean 'parallel'?"),
    "unknown key": (
        MODEL + "[parallel]\ntensor_paralel_size = 2",
        "$.parallel.tensor_p",
        "tensor_parallel_size",
    ),
    "unknown root key": (MODEL.replace("[model]", "x = 1\n[model]"), "$.x", "known here"),
    "misplaced key": (
        MODEL + "tensor_parallel_size = 2",
        "$.model.tensor_parallel_size",
        "belongs in [parallel]",
    ),
    "wrong case": (MODEL + 'Dtype = "float32"', "$.model.Dtype", "did you mean 'dtype'?"),
    "id number": ("[model]\nid = 5", "$.model.id", "it must be a string"),
    "id list": ('[model]\nid = ["a"]', "$.model.id", "it must be a string"),
    "id table": ("[model]\nid = {a = 1}", "$.model.id", "it must be a string"),
    "id empty": ('[model]\nid = ""', "$.model.id", "write a hub id"),
    "id climbs": ('[model]\nid = "a/../b"', "$.model.id", "write a hub id"),
    "id absolute": ('[model]\nid = "/no/such/model"', "$.model.id", "does not exist"),
    "id relative": ('[model]\nid = "./no-such"', "$.model.id", "does not exist"),
    "id parent": ('[model]\nid = "../no-such"', "$.model.id", "does not exist"),
    "id home": ('[model]\nid = "~/no-such-model"', "$.model.id", "does not exist"),
    "id no home": ('[model]\nid = "~nobody-like-this/x"', "$.model.id", "no such home"),
    "id file url": ('[model]\nid = "file:///etc"', "$.model.id", "write a hub id"),
    "id file": ('[model]\nid = "file:/etc"', "$.model.id", "write a hub id"),
    "id credentials": ('[model]\nid = "https://me:secret@host/x"', "$.model.id", "write a hub id"),
    "id ssh": ('[model]\nid = "git@host:org/name"', "$.model.id", "write a hub id"),
    "id three parts": ('[model]\nid = "a/b/c"', "$.model.id", "write a hub id"),
    "id spaces": ('[model]\nid = "a b"', "$.model.id", "write a hub id"),
    "id NUL": ('[model]\nid = "a\\u0000b"', "$.model.id", "NUL"),
    "id long": (f'[model]\nid = "{"x" * 97}"', "$.model.id", "write a hub id"),
    "id very long": (f'[model]\nid = "./{"x" * 300}"', "$.model.id", "255 bytes"),
    "id escape": ('[model]\nid = "\\u001b[31mred\\u202e"', "$.model.id", "write a hub id"),
    "revision climbs": (MODEL + 'revision = "../../x"', "$.model.revision", "without '..'"),
    "variant climbs": (MODEL + 'variant = "../x"', "$.model.variant", "letters"),
    "remote code": (MODEL + "trust_remote_code = true", "$.model.trust_remote_code", "leave the key out"),
    "dtype": (MODEL + 'dtype = "int8"', "$.model.dtype", "bfloat16, float16, float32"),
    "device": (MODEL + 'device = "cuda:1"', "$.model.device", "auto, cuda, cpu"),
    "quoted boolean": (MODEL + 'local_files_only = "false"', "$.model.local_files_only", "true or false"),
    "size quoted": (MODEL + '[parallel]\nring_degree = "2"', "$.parallel.ring_degree", "an integer"),
    "size float": (MODEL + "[parallel]\nring_degree = 2.0", "$.parallel.ring_degree", "an integer"),
    "size true": (MODEL + "[parallel]\nring_degree = true", "$.parallel.ring_degree", "an integer"),
    "size zero": (MODEL + "[parallel]\nring_degree = 0", "$.parallel.ring_degree", "at least 1"),
    "size negative": (MODEL + "[parallel]\nring_degree = -8", "$.parallel.ring_degree", "at least 1"),
    "size huge": (MODEL + f"[parallel]\nring_degree = {10**30}", "$.parallel.ring_degree", "at most 4096"),
    "size capped": (MODEL + "[parallel]\nring_degree = 4097", "$.parallel.ring_degree", "at most 4096"),
    "VAE size zero": (
        MODEL + "[parallel]\nvae_patch_parallel_size = 0",
        "$.parallel.vae_patch",
        "at least 1",
    ),
    "VAE size negative": (
        MODEL + "[parallel]\nvae_patch_parallel_size = -1",
        "$.parallel.vae_p",
        "at least 1",
    ),
    "product": (
        MODEL + "[parallel]\nring_degree = 64\nulysses_degree = 65",
        "$.parallel",
        "at most 4096 work",
    ),
    "table as number": (MODEL + "vae = 3\n[model2]", "$.model.vae", "known here"),
    "parallel number": ("parallel = 3\n" + MODEL, "$.parallel", "it must be a table"),
    "array of tables": (MODEL + "[[parallel]]\n", "$.parallel", "it must be a table"),
    "tiling text": (MODEL + '[vae]\nvae_use_tiling = "false"', "$.vae.vae_use_tiling", "true or false"),
    "tiling number": (MODEL + "[vae]\nvae_use_tiling = 2", "$.vae.vae_use_tiling", "true or false"),
    "slicing number": (MODEL + "[vae]\nvae_use_slicing = 1", "$.vae.vae_use_slicing", "true or false"),
    "output place": (MODEL + '[vae]\noutput = "rank1"', "$.vae.output", "rank0, all, sharded"),
    "options list": (MODEL + "[vae]\noptions = [1]", "$.vae.options", "it must be a table"),
    "height text": (MODEL + '[call]\nheight = "512"', "$.call.height", "an integer"),
    "height float": (MODEL + "[call]\nheight = 512.9", "$.call.height", "an integer"),
    "height true": (MODEL + "[call]\nheight = true", "$.call.height", "an integer"),
    "height zero": (MODEL + "[call]\nheight = 0", "$.call.height", "at least 1"),
    "height negative": (MODEL + "[call]\nheight = -8", "$.call.height", "at least 1"),
    "text huge": (
        MODEL + "[call]\nmax_sequence_length = 65537",
        "$.call.max_sequence_length",
        "at most 65536",
    ),
    "text zero": (MODEL + "[call]\nmax_sequence_length = 0", "$.call.max_seq", "at least 1"),
    "width huge": (MODEL + f"[call]\nwidth = {10**30}", "$.call.width", "at most 65536"),
    "steps zero": (MODEL + "[call]\nnum_inference_steps = 0", "$.call.num_inference_steps", "at least 1"),
    "steps negative": (MODEL + "[call]\nnum_inference_steps = -1", "$.call.num_inference", "at least 1"),
    "steps huge": (MODEL + "[call]\nnum_inference_steps = 1_000_000_000", "$.call.num_i", "at most 10000"),
    "seed negative": (MODEL + "[call]\nseed = -1", "$.call.seed", "at least 0"),
    "seed 2^63": (MODEL + f"[call]\nseed = {2**63}", "$.call.seed", "at most 9223372036854775807"),
    "seed 2^64": (MODEL + f"[call]\nseed = {2**64}", "$.call.seed", "at most 9223372036854775807"),
    "guidance nan": (MODEL + "[call]\nguidance_scale = nan", "$.call.guidance_scale", "finite"),
    "guidance inf": (MODEL + "[call]\nguidance_scale = inf", "$.call.guidance_scale", "finite"),
    "guidance text": (MODEL + '[call]\nguidance_scale = "nan"', "$.call.guidance_scale", "a number"),
    "sigmas inf": (MODEL + "[call]\nsigmas = [1.0, -inf]", "$.call.sigmas[1]", "finite"),
    "call date": (MODEL + "[call]\nfoo = 2026-01-01", "$.call.foo", "it must be a string"),
    "call table": (MODEL + "[call.foo]\na = 1", "$.call.foo", "it must be a string"),
    "call deep": (MODEL + "[call]\nfoo = [[[[[1]]]]]", "$.call.foo", "at most 4 levels"),
    "prompt number": (MODEL + "[call]\nprompt = 3", "$.call.prompt", "it must be a string or a list"),
    "prompts mixed": (MODEL + '[call]\nprompt = ["a", 3]', "$.call.prompt", "each item a string"),
    "prompts none": (MODEL + "[call]\nprompt = []", "$.call.prompt", "must hold 1 to 1024"),
    "prompt long": (MODEL + f'[call]\nprompt = "{"x" * 100_001}"', "$.call.prompt", "at most 100000"),
    "prompts long": (MODEL + f'[call]\nprompt = ["{"x" * 100_001}"]', "$.call.prompt[0]", "at most 100000"),
    "prompt surrogate": (MODEL + '[call]\nprompt = "\\ud800"', "$", "correct the TOML there"),
    "limit zero": (MODEL + "[limits]\nboot = 0", "$.limits.boot", "at least 0.1"),
    "limit negative": (MODEL + "[limits]\nboot = -3.5", "$.limits.boot", "at least 0.1"),
    "limit nan": (MODEL + "[limits]\nboot = nan", "$.limits.boot", "finite"),
    "limit inf": (MODEL + "[limits]\nboot = inf", "$.limits.boot", "finite"),
    "limit huge": (MODEL + "[limits]\nboot = 1e300", "$.limits.boot", "at most 2592000"),
    "limit true": (MODEL + "[limits]\nboot = true", "$.limits.boot", "a number"),
    "output empty": (MODEL + '[output]\ndir = ""', "$.output.dir", "write the path of a folder"),
    "output NUL": (MODEL + '[output]\ndir = "a\\u0000"', "$.output.dir", "NUL"),
    "output long": (MODEL + f'[output]\ndir = "{"x" * 300}"', "$.output.dir", "255 bytes"),
    "output device": (MODEL + '[output]\ndir = "/dev/full"', "$.output.dir", "write the path of a folder"),
    "output in device": (MODEL + '[output]\ndir = "/dev/full/x"', "$.output.dir", "write the path"),
    "output number": (MODEL + "[output]\ndir = 3", "$.output.dir", "it must be a string"),
    "nested lists": (MODEL + "[call]\na = " + "[" * 5000 + "]" * 5000, "$", "4 levels"),
    "nested tables": (MODEL + "[call]\na = " + "{a=" * 5000 + "1" + "}" * 5000, "$", "4 levels"),
    "open brackets": (MODEL + "a = " + "[" * 500_000, "$", "4 levels"),
    "dotted key": (MODEL + ".".join("a" * 20_000) + " = 1", "$", "4 levels"),
    "many keys": (MODEL + "".join(f"k{n} = 1\n" for n in range(50_000)), "$.model", "more unknown keys"),
    "5,000 digits": (MODEL + "[call]\nseed = " + "9" * 5000, "$", "write it shorter"),
    "duplicate key": (MODEL + 'id = "b"\n', "$", "line 3"),
    "duplicate table": (MODEL + MODEL, "$", "line 3"),
    "not TOML": ("model: {id: x}", "$", "line 1"),
    "raw NUL": (MODEL.encode() + b"\0", "$", "line 3"),
    "raw escape": (MODEL + 'dtype = "\x1b[31m"', "$", "line 3"),
    "UTF-16": (MODEL.encode("utf-16"), "$", "save it as UTF-8"),
    "latin-1": (MODEL.encode() + b'[call]\nprompt = "caf\xe9"', "$", "save it as UTF-8"),
    "surrogate bytes": (MODEL.encode() + b'[call]\nprompt = "\xed\xa0\x80"', "$", "save it as UTF-8"),
    "bidi key": (MODEL + '"\\u202eabc" = 1', '$.model."\\u202eabc"', "known here"),
    "long key": (MODEL + f'"{"k" * 5000}" = 1', "$.model.", "known here"),
    "1 MiB and more": ("#" * (1 << 20) + "\n", "$", "at most 1048576 bytes"),
}


def refusal(path: Path | str, overrides: tuple[str, ...] = ()) -> SpecError:
    """The refusal of a file; it must come within a second and be safe to print."""
    # Processor time is the same on a loaded machine; a wait that never ends is caught by the other clock.
    worked, started = time.process_time(), time.monotonic()
    with pytest.raises(SpecError) as caught:
        PipelineSpec.load(path, overrides)
    assert time.process_time() - worked < 1
    assert time.monotonic() - started < 20
    message = str(caught.value)
    assert len(message) < 6000
    assert all(char.isprintable() or char == "\n" for char in message)
    assert "Traceback" not in message
    assert "cattrs" not in message
    assert all(fault.path and fault.found and fault.fix for fault in caught.value.faults)
    return caught.value


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_text_is_refused(name: str, tmp_path: Path) -> None:
    content, path, fix = TEXTS[name]
    file = tmp_path / "spec.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    error = refusal(file)
    lines = str(error).splitlines()
    assert str(file) in lines[0]
    assert any(line.startswith(f"  {path}") and fix in line for line in lines[1:]), str(error)


@pytest.fixture
def odd_files(tmp_path: Path) -> Iterator[dict[str, tuple[Path | str, str]]]:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_text("")
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(1 << 30)
    listener = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(tmp_path)  # a socket's own name must be short
    listener.bind("socket")
    os.chdir(here)
    yield {
        "missing": (tmp_path / "none.toml", "there is no such file"),
        "inside a file": (tmp_path / "file" / "x", "there is no such file"),
        "folder": (tmp_path, "it is a folder"),
        "fifo": (tmp_path / "fifo", "it is a pipe"),
        "zeros": ("/dev/zero", "it is a device"),
        "loop": (tmp_path / "a", "leads back to itself"),
        "1 GiB": (big, "1073741824 bytes"),
        "socket": (tmp_path / "socket", "it is a socket"),
        "NUL": ("a\0b", "NUL"),
        "long": ("x" * 300, "longer than a file name can be"),
        "empty name": ("", "found an empty string"),
    }
    listener.close()


def test_what_is_no_spec_file_is_refused_without_waiting(
    odd_files: dict[str, tuple[Path | str, str]],
) -> None:
    for name, (path, found) in odd_files.items():
        assert found in str(refusal(path)), name


def test_a_file_of_the_kernel_that_claims_no_size_is_limited_too() -> None:
    refusal("/proc/self/environ")


@pytest.mark.parametrize("source", [None, 3, b"spec.toml", [], object(), PipelineSpec])
def test_other_sources_are_refused(source: object) -> None:
    with pytest.raises(SpecError, match="give a path, a mapping or a PipelineSpec"):
        PipelineSpec.load(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
def test_byte_order_mark_windows_lines_and_bidi_prompts_are_fine(prefix: bytes, tmp_path: Path) -> None:
    file = tmp_path / "spec.toml"
    text = MODEL + '[call]\nprompt = "\u202eabc \\u001b"\nseed = 9223372036854775807\n'
    file.write_bytes(prefix + text.replace("\n", "\r\n").encode())
    spec = PipelineSpec.load(file)
    assert spec.call == {"prompt": "\u202eabc \x1b", "seed": 2**63 - 1}


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "spec.toml"
    file.write_text(
        'x = 1\n[model]\nid = 5\ntype = "f"\n[parallel]\nring_degree = 0\n[vae]\noutput = ""\n'
        '[call]\nseed = -1\nheight = "1"\n[output]\ndir = "/dev/null"\n[limits]\nboot = 0\n'
    )
    error = refusal(file, ("nothing",))
    paths = {fault.path for fault in error.faults}
    assert paths == {
        'override "nothing"',
        "$.x",
        "$.model.id",
        "$.model.type",
        "$.parallel.ring_degree",
        "$.vae.output",
        "$.call.seed",
        "$.call.height",
        "$.output.dir",
        "$.limits.boot",
    }
    assert len(error.faults) == len(paths)


def test_a_working_folder_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SpecError, match="no longer exists"):
        PipelineSpec.load({"model": {"id": "org/name"}})

"""Make `.venv` and install vaepp into it, with the torch build that suits this machine.

Run by the Makefile; the standard library only, because it runs before anything is installed. It does nothing
where the environment is already up to date.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

MINIMUM = (3, 11)
CPU_TORCH = "torch==2.13.0+cpu"
PLAIN_TORCH = "torch==2.13.0"
ACCELERATOR_TORCH = "torch>=2.11"
INDEX_VARIABLE = "VAEPP_TORCH_INDEX"

ROOT = Path(__file__).resolve().parent.parent
ACCELERATOR_DEVICES = ("/dev/nvidiactl", "/dev/kfd")


class SetupError(Exception):
    """Set-up cannot go on; the message says what to do."""


def say(message: str) -> None:
    """One line of progress."""
    print(f"vaepp set-up: {message}", flush=True)


def fingerprint() -> str:
    """What the stamp file holds: it changes when what is to be installed changes."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", Path(__file__).resolve()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def has_accelerator() -> bool:
    """Whether this machine has a GPU that a driver answers for."""
    if any(Path(device).exists() for device in ACCELERATOR_DEVICES):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listing = subprocess.run([tool, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return listing.returncode == 0 and b"GPU" in listing.stdout


def make_venv(folder: Path) -> Path:
    """Create the virtual environment where there is none, and return its interpreter."""
    python = folder / "bin" / "python"
    if python.exists():
        return python
    say(f"creating {folder}")
    made = subprocess.run([sys.executable, "-m", "venv", str(folder)], check=False)
    if made.returncode != 0:
        # Debian and Ubuntu ship venv apart from Python; a half-made folder would be taken for a whole one.
        shutil.rmtree(folder, ignore_errors=True)
        raise SetupError(
            "python's venv module does not work here; on Debian or Ubuntu install it with "
            f"'apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv'"
        )
    return python


def pip(python: Path, *arguments: str, quiet: bool = False) -> bool:
    """Run pip in the environment and say whether it succeeded; `compile_sources` makes the bytecode."""
    command = [str(python), "-m", "pip", "install", "--no-compile", *arguments]
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, cwd=str(ROOT), check=False, stderr=output).returncode == 0


def install_torch(python: Path) -> None:
    """Install torch in a pip command of its own, so that nothing else decides which build comes."""
    if any(python.parent.parent.glob("lib/python*/site-packages/torch/version.py")):
        return  # whatever build is there was chosen before; what follows checks its release
    if has_accelerator():
        say(f"an accelerator is here: installing {ACCELERATOR_TORCH}")
        if not pip(python, ACCELERATOR_TORCH):
            raise SetupError(f"pip could not install {ACCELERATOR_TORCH}; its message is above")
        return
    say("no accelerator is here: installing the CPU build of torch")
    index = os.environ.get(INDEX_VARIABLE)
    if index:
        if not pip(python, CPU_TORCH, "--extra-index-url", index):
            raise SetupError(f"pip found no {CPU_TORCH} at {INDEX_VARIABLE}={index}")
        return
    if pip(python, CPU_TORCH, quiet=True):
        return
    say("the package index holds no CPU-only build: installing the default one, several times larger")
    say(
        f"for the small one, stop here (Ctrl-C) and set {INDEX_VARIABLE} to the CPU index URL that "
        "pytorch.org's install page names"
    )
    if not pip(python, PLAIN_TORCH):
        raise SetupError(f"pip could not install {PLAIN_TORCH}; its message is above")


def compile_sources(python: Path) -> None:
    """Compile what was installed on all cores; pip would take one, for a third of the whole set-up."""
    packages = [str(path) for path in python.parent.parent.glob("lib/python*/site-packages")]
    command = [str(python), "-m", "compileall", "-q", "-j", "0", *packages]
    # Some packages ship files for other Python versions, which do not compile here and are never imported.
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def install(folder: Path) -> None:
    """Bring the environment up to date."""
    stamp = folder / ".vaepp-installed"
    wanted = fingerprint()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    python = make_venv(folder)
    install_torch(python)
    say("installing vaepp and its development tools")
    if not pip(python, "--quiet", "-e", ".[dev]"):
        raise SetupError("pip could not install vaepp; its message is above")
    compile_sources(python)
    stamp.write_text(wanted)
    say(f"done; to use it in this shell: source {folder}/bin/activate")


def main() -> None:
    """Check the interpreter, then install; a failure is one sentence."""
    if sys.version_info < MINIMUM:
        found = ".".join(str(part) for part in sys.version_info[:3])
        sys.exit(
            f"vaepp set-up: Python {found} is too old; 3.11 or later is needed. "
            "Name another one: make PYTHON=python3.12 ..."
        )
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".venv")
    try:
        install(folder)
    except SetupError as error:
        sys.exit(f"vaepp set-up: {error}")


if __name__ == "__main__":
    main()

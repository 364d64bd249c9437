"""The rules of the house: imports run one way, the SDK names no model, files stay small, nothing is local."""

from __future__ import annotations

import ast
import importlib
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from vaepp_sdk.registry import default_registry

ROOT = Path(__file__).resolve().parent.parent

# From the bottom up: a module imports modules of its own unit and of lines above its own, never of others
# beside it. A unit is a module or a package of vaepp_sdk; the longest name that fits counts.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "markers", "text"),
    ("entry_checks", "headers", "rules"),
    ("entries", "events", "kept", "nonfinite", "parallel.dims"),
    ("hookspecs", "options"),
    ("registry", "spec"),
    ("model_folder", "signature"),
    ("size_rules", "weight_files"),
    ("dit_rules", "model_rules", "vae_rules"),
    ("call_rules",),
    ("resolve",),
    ("request",),
    ("parallel", "resuming"),
    ("dit", "latents", "vae"),
    ("offload", "stages"),
    ("assembly", "idle", "pixels", "plain", "saving"),
    ("decoding",),
    ("agreement", "keeping", "saver"),
    ("executor",),
    ("runtime",),
    ("pipeline",),
    ("cli",),
)

TORCH_FREE = ("spec", "registry", "resolve", "request", "signature", "hookspecs", "cli.main")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


SDK = sources("vaepp_sdk")
SHIPPED = [*SDK, *sources("strategies", "plugins")]
EVERYTHING = [*SHIPPED, *sources("tests", "benchmarks", "examples", "scripts")]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_sdk_module = pytest.mark.parametrize("path", SDK, ids=name)
each_shipped_module = pytest.mark.parametrize("path", SHIPPED, ids=name)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, those that only type checkers see left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from run_time_nodes(child)


def imported(path: Path) -> set[str]:
    """Full names of the modules a file imports at run time, inside functions too."""
    found: set[str] = set()
    for node in run_time_nodes(tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: a relative import"
            assert node.module is not None
            found.add(node.module)
            # `from vaepp_sdk.parallel import dims` imports a module too.
            found.update(
                f"{node.module}.{alias.name}" for alias in node.names if is_module(node.module, alias.name)
            )
    return found


def is_module(package: str, attribute: str) -> bool:
    place = ROOT.joinpath(*package.split("."), attribute)
    return place.with_suffix(".py").exists() or place.is_dir()


def unit(module: str) -> tuple[str, int] | None:
    """The unit a vaepp_sdk module belongs to and its layer; None for the package itself."""
    inner = module.removeprefix("vaepp_sdk").lstrip(".")
    fits = [
        (unit, layer)
        for layer, units in enumerate(LAYERS)
        for unit in units
        if inner == unit or inner.startswith(unit + ".")
    ]
    if not inner:
        return None
    assert fits, f"vaepp_sdk.{inner} has no layer; give it one in tests/test_house.py"
    return max(fits, key=lambda fit: len(fit[0]))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@each_sdk_module
def test_imports_run_one_way(path: Path) -> None:
    here = module_name(path)
    if here.startswith("vaepp_sdk.testing"):
        pytest.skip("tools for tests may use everything; that nothing uses them is checked below")
    mine = unit(here)
    for other in imported(path):
        if not other.startswith("vaepp_sdk.") or mine is None:
            continue
        assert not other.startswith("vaepp_sdk.testing"), f"{here} imports {other}"
        theirs = unit(other)
        assert theirs is not None
        assert theirs[0] == mine[0] or theirs[1] < mine[1], f"{here} imports {other}, which is not below it"


@each_sdk_module
def test_the_sdk_imports_no_strategy_and_no_plugin(path: Path) -> None:
    wrong = [other for other in imported(path) if other.startswith(("vaepp_strategies", "vaepp_plugins"))]
    assert wrong == []


@pytest.mark.parametrize("path", sources("strategies"), ids=name)
def test_strategies_import_no_plugin(path: Path) -> None:
    assert [other for other in imported(path) if other.startswith("vaepp_plugins")] == []


def test_a_spec_is_checked_without_torch() -> None:
    modules = ", ".join(f"vaepp_sdk.{module}" for module in TORCH_FREE)
    code = f"import sys, {modules}; vaepp_sdk.registry.Registry.load(); print(*sys.modules, sep='\\n')"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(ran.stdout.split())
    assert loaded & {"torch", "diffusers", "transformers", "numpy"} == set()


def docstrings(path: Path) -> set[int]:
    """Positions in memory of the constants that are docstrings, a string below an assignment included."""
    return {
        id(node.value)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


@pytest.mark.parametrize("path", [path for path in SDK if "testing" not in path.parts], ids=name)
def test_the_sdk_knows_no_strategy_and_no_model_by_name(path: Path) -> None:
    registry = default_registry()
    classes = [*registry.vaes, *registry.pipelines]
    families = re.compile(r"z.?image|flux|qwen|\bwan\b|hunyuan|" + "|".join(classes), re.IGNORECASE)
    prose = docstrings(path)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            assert node.value not in registry.strategies, f"{name(path)}:{node.lineno}"
            assert not families.search(node.value), f"{name(path)}:{node.lineno}"
        elif isinstance(node, ast.Name | ast.Attribute):
            word = node.id if isinstance(node, ast.Name) else node.attr
            assert not families.search(word), f"{name(path)}:{node.lineno}"


def public_names(path: Path) -> set[str]:
    """The functions and classes a module defines without a leading underscore."""
    return {
        node.name
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }


def is_hook_module(path: Path) -> bool:
    return any(
        isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VAEPP_API"
        for node in tree(path).body
    )


def exported(path: Path) -> list[str] | None:
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(word) for word in ast.literal_eval(node.value)]
    return None


def in_order(word: str) -> tuple[int, str]:
    """The order ruff keeps: CONSTANTS, then Classes, then the rest."""
    return (0 if word.isupper() else 1 if word[:1].isupper() else 2, word)


@each_shipped_module
def test_exports_are_sorted_and_complete(path: Path) -> None:
    if is_hook_module(path):
        return
    # `main` of a module that is run with `python -m` is its command, not something to import.
    defined, words = public_names(path) - {"main"}, exported(path)
    if words is None:
        assert not defined, f"{name(path)} defines {sorted(defined)} and has no __all__"
        return
    assert words == sorted(set(words), key=in_order)
    module = importlib.import_module(importable(path))
    assert [word for word in words if not hasattr(module, word)] == []
    assert defined <= set(words), f"{name(path)}: __all__ lacks {sorted(defined - set(words))}"


def importable(path: Path) -> str:
    return module_name(path).removeprefix("strategies.").removeprefix("plugins.")


def test_every_exported_name_can_be_imported() -> None:
    import vaepp_sdk

    for word in vaepp_sdk.__all__:
        assert getattr(vaepp_sdk, word) is not None


def test_a_type_checker_and_completion_see_the_names_there_are() -> None:
    """A `__getattr__` that a type checker sees would let every misspelt name pass."""
    import vaepp_sdk

    top = tree(ROOT / "vaepp_sdk" / "__init__.py").body
    assert "__getattr__" not in {node.name for node in top if isinstance(node, ast.FunctionDef)}
    assert set(vaepp_sdk.__all__) <= set(dir(vaepp_sdk))


def test_every_package_is_in_the_wheel() -> None:
    import tomli

    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    places = {"vaepp_sdk": ROOT, "vaepp_strategies": ROOT / "strategies", "vaepp_plugins": ROOT / "plugins"}
    packages = {
        ".".join(found.parent.relative_to(root).parts)
        for top, root in places.items()
        for found in (root / top).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == packages


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_functions_stay_small() -> None:
    lengths = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for path in SHIPPED
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert statistics.median(lengths) <= 15
    assert statistics.quantiles(lengths, n=10)[-1] <= 40


def tracked_texts() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    paths = (ROOT / entry for entry in listing.stdout.decode().split("\0") if entry)
    suffixes = {".py", ".md", ".toml", ".json", ".txt", ".yaml", ".yml", ""}
    return [path for path in paths if path.suffix in suffixes and path.is_file()]


def test_nothing_names_one_machine_or_one_registry() -> None:
    places = re.compile(
        r"(?<![\w.~])/(work|root|home|opt|mnt|Users)/\w|(pypi|download\.pytorch|pythonhosted)\.org"
    )
    for path in tracked_texts():
        if path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not places.search(line), f"{name(path)}:{number}: {line.strip()[:100]}"


def test_weights_never_come_through_pickle() -> None:
    """No pickle load, torch.load, eval, exec or shell in what ships, whatever a linter is told to ignore."""
    calls = {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "os.system", "marshal.loads"}
    for path in SHIPPED:
        if "testing" in path.parts:  # run_ranks reads what its own children pickled
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, f"{name(path)}:{node.lineno}"
                shell = [word for word in node.keywords if word.arg == "shell"]
                assert not shell, f"{name(path)}:{node.lineno}"

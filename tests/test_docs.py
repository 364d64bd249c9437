"""The documentation is true: every hook in it, every snippet runs, every link leads somewhere."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import tomli

from vaepp_sdk import PipelineSpec, entries, events, hookspecs
from vaepp_sdk.registry import Plugin, Registry, default_registry

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
SPECS = sorted((ROOT / "examples").glob("*.toml"))
SPEC_TABLES = {"model", "parallel", "vae", "call", "output", "limits"}
BLOCK = re.compile(
    r"(?:^<!-- file: (?P<file>\S+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@attrs.frozen
class Snippet:
    page: str
    line: int
    language: str
    text: str
    file: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(*languages: str) -> Iterator[Snippet]:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match["language"] in languages:
                line = text.count("\n", 0, match.start()) + 1
                page = str(path.relative_to(ROOT))
                yield Snippet(page, line, match["language"], match["text"], match["file"])


def each(*languages: str) -> pytest.MarkDecorator:
    found = list(snippets(*languages))
    assert found
    return pytest.mark.parametrize("snippet", found, ids=str)


@each("python")
def test_python_snippets_parse_and_name_what_exists(snippet: Snippet) -> None:
    # A part of a method is quoted with its indentation.
    text = snippet.text if not snippet.text.startswith(" ") else f"def quoted():\n{snippet.text}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vaepp_sdk"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{snippet}: {node.module}.{alias.name}"


@each("python", "toml")
def test_quoted_files_say_what_the_page_says(snippet: Snippet) -> None:
    if snippet.file is None:
        return
    assert snippet.text in (ROOT / snippet.file).read_text(encoding="utf-8")


@pytest.mark.parametrize("snippet", [s for s in snippets("python") if "VAEPP_API" in s.text], ids=str)
def test_plugin_snippets_run_and_register(snippet: Snippet) -> None:
    module = types.ModuleType("documented")
    exec(compile(snippet.text, str(snippet), "exec"), module.__dict__)
    registry = Registry()
    registry.add(Plugin("documented", "docs 1.0"), module)
    if "vaepp_register" in snippet.text:
        assert registry.strategies or registry.vaes or registry.pipelines
    start = events.StageStart(rank=0, world_size=1, stage="decode", request=0)
    end = events.StageEnd(**attrs.asdict(start), seconds=1.0, peak_bytes=1)
    # Warnings are errors here, so an observer that raises fails the test.
    registry.stage_start(start)
    registry.stage_end(end)


@each("toml")
def test_toml_snippets_are_specs_or_package_files(snippet: Snippet) -> None:
    tables = tomli.loads(snippet.text)
    if not set(tables) <= SPEC_TABLES:
        assert "project" in tables
        return
    # A part of a spec is a spec once it names a model.
    PipelineSpec.load({"model": {"id": "org/name"}, **tables})


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_example_specs_load(path: Path) -> None:
    spec = PipelineSpec.load(path)
    assert spec.parallel.dims.dit_parallel_size == 2
    assert spec.parallel.vae_patch_parallel_size == 2


def test_the_readme_shows_the_example_spec() -> None:
    shown = next(s for s in snippets("toml") if s.page == "README.md")
    example = tomli.loads((ROOT / "examples" / "z_image_turbo.toml").read_text(encoding="utf-8"))
    for table, values in tomli.loads(shown.text).items():
        assert values.items() <= example[table].items()


HOOKS = [getattr(hookspecs, name) for name in hookspecs.__all__]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_every_hook_stands_in_the_docs_with_its_signature_and_an_example(hook: Any) -> None:
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    signature = f"{hook.__name__}{inspect.signature(hook)}".replace("'", "")
    section = page.split(f"\n### {hook.__name__}\n")
    assert len(section) == 2, f"docs/plugins.md has no section {hook.__name__}"
    body = re.split(r"\n##+ ", section[1])[0]
    assert f"```text\n{signature}\n```" in body
    assert re.search(rf"^def {hook.__name__}\(", body, re.M)
    assert "```python" in body


def test_the_docs_name_no_hook_that_does_not_exist() -> None:
    for path in PAGES:
        names = set(re.findall(r"\bvaepp_(?:register|on)_\w+", path.read_text(encoding="utf-8")))
        assert names <= set(hookspecs.__all__), path


def test_every_strategy_is_in_the_readme_and_in_the_reference() -> None:
    registry = default_registry()
    built_in = [
        entry for entry in registry.strategies.values() if str(entry.factory).startswith("vaepp_strategies.")
    ]
    assert built_in
    reference = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for entry in built_in:
        assert f"| `{entry.name}` |" in readme
        section = reference.split(f"\n## {entry.name}\n")
        assert len(section) == 2, f"docs/strategies.md has no section {entry.name}"
        for option in entry.options:
            assert f"`{option.name}`" in section[1].split("\n## ")[0], f"{entry.name}: {option.name}"


def test_the_docs_name_the_environment_variables_and_classes_there_are() -> None:
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("vaepp_sdk", "strategies", "plugins", "scripts", "examples")
        for path in (ROOT / folder).rglob("*.py")
    )
    for path in PAGES:
        for variable in set(re.findall(r"\bVAEPP_[A-Z_]+\b", path.read_text(encoding="utf-8"))):
            assert variable in code, f"{path.name}: {variable}"
    for name in ("StrategyEntry", "VaeEntry", "PipelineEntry"):
        assert hasattr(entries, name)


def test_the_allowlist_in_the_warning_is_the_real_one() -> None:
    built_in = [
        name
        for name, entry in default_registry().pipelines.items()
        if entry.strategies and str(entry.stages).startswith("vaepp_plugins.")
    ]
    warning = f"VAE patch parallelism is only enabled for {', '.join(sorted(built_in))}; ignoring."
    for page in ("README.md", "docs/troubleshooting.md"):
        assert warning in (ROOT / page).read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """The anchors a page's headings get where it is shown."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue  # a test does not depend on other people's servers
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(place), f"{path.name}: {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_named_in_prose_exist(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for named in re.findall(
        r"`((?:vaepp_sdk|strategies|plugins|tests|examples|benchmarks|docs)/[\w./-]+)`", text
    ):
        assert (ROOT / named).exists(), f"{path.name}: {named}"
    for module in re.findall(r"`python -m (benchmarks\.\w+|vaepp_plugins\.\w+)", text):
        assert importlib.util.find_spec(module) is not None, f"{path.name}: {module}"


def test_make_help_describes_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.M)
    assert phony is not None
    described = set(re.findall(r"^([a-z]+):.*## \S", makefile, re.M))
    assert described == set(phony[1].split())
    for path in PAGES:
        assert set(re.findall(r"`make (\w+)`", path.read_text(encoding="utf-8"))) <= described, path

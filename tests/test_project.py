"""The project's own promises: modules import only what is below them, and the documentation is true."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import METHODS, CachePolicy, count_flops, create_model
from models.presets import PRESETS
from util.download import FILES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
of_each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


# What may import what: each part and the parts below it. `models` exports the sampler's names in its `__init__.py`.
BELOW = {
    "diffusion": set(),
    "models": {"diffusion"},
    "models.lazymar": {"models", "diffusion"},
    "models.methods": {"models.lazymar", "models", "diffusion"},
    "util": {"models.methods", "models.lazymar", "models", "diffusion"},
}


def part_of(module: str, scripts: set[str]) -> str | None:
    """Return which part of the project a module belongs to; None for other packages."""
    if module.split(".")[0] in scripts:
        return "scripts"
    return next((part for part in sorted(BELOW, reverse=True) if f"{module}.".startswith(f"{part}.")), None)


def imports_of(path: Path) -> set[str]:
    """Return the modules that a file imports, at its top or anywhere else."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def test_imports_only_go_down():
    scripts, seen = {path.stem for path in ROOT.glob("*.py")}, 0
    for path in (file for folder in ("diffusion", "models", "util") for file in (ROOT / folder).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module == "models.__init__":
            continue
        part = part_of(module, scripts)
        for imported in imports_of(path):
            target = part_of(imported, scripts)
            seen += target is not None
            assert target in {None, part, *BELOW[part]}, f"{module} imports {imported}"
    assert seen > 100


def test_what_users_download_is_not_offered_to_git():
    """`git add -A` would take 13 GB otherwise."""
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("this is no git checkout")
    files = [f"pretrained_models/{remote.path}" for remote in FILES.values()]
    files += [f"{path}.part" for path in files]
    files += [
        "pretrained_models/weights-inception-2015-12-05-6726825d.pth",
        "pretrained_models/mar/mar_huge/training.pt",
    ]
    listed = subprocess.run(["git", "check-ignore", "--no-index", *files], cwd=ROOT, capture_output=True, text=True)
    assert listed.stdout.splitlines() == files
    shipped = subprocess.run(["git", "ls-files", "pretrained_models"], cwd=ROOT, capture_output=True, text=True)
    command = ["git", "check-ignore", "--no-index", *shipped.stdout.splitlines()]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert shipped.stdout and not ignored.stdout


# The documentation


def fenced_and_inline_code(document: Path) -> tuple[list[str], list[str]]:
    """Return the lines of a document's shell blocks, without comments and with continued lines joined, and its code
    spans, each on one line."""
    blocks = re.split(r"^```(\w*)\n(.*?)^```$", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    shell = "".join(block for language, block in zip(blocks[1::3], blocks[2::3]) if language == "bash")
    lines = [line.partition(" #")[0].strip() for line in shell.replace("\\\n", " ").splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", "\n\n".join(blocks[::3]))]
    return [line for line in lines if line and not line.startswith("#")], spans


def program_and_flags(command: str) -> tuple[str, list[str]] | None:
    """Return the project's program that a command runs, with its stage if it has stages, and the flags it gets."""
    words = command.split()
    for index, (before, word) in enumerate(zip(["", *words], words)):
        rest = words[index + 1 :]
        program = {"-m": f"-m {word}", "sbatch": "eval.py"}.get(before, word)
        if rest and f"{program} {rest[0]}" in PROGRAMS:
            program = f"{program} {rest[0]}"
        if program in PROGRAMS:
            return program, [word.partition("=")[0] for word in rest if word.startswith("--")]
        ours = (before == "python" and word != "-m") or (before == "-m" and word.startswith(("models", "util")))
        assert not ours, f"{program} is none of the project's programs"
    return None


PROGRAMS = [
    *sorted(path.name for path in ROOT.glob("*.py")),
    *(f"score.py {stage}" for stage in ("statistics", "evaluate", "export")),
    "tests/soak.py",
    "-m util.download",
]
HELP_OF_EACH = """
import contextlib, io, json, os, runpy, sys
import numpy, PIL.Image, safetensors, scipy, timm.layers, torch, torch_fidelity, tqdm
for program in sys.argv[1:]:
    child = os.fork()
    if not child:
        *module, sys.argv = ["-m", program.split()[1:]] if program.startswith("-m ") else [program.split()]
        sys.argv.append("--help")
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            if module:
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
                runpy.run_path(sys.argv[0], run_name="__main__")
        print(json.dumps({program: printed.getvalue()}), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{program} --help fails")
"""


@pytest.fixture(scope="module")
def flags_of() -> dict[str, set[str]]:
    """The flags that each program's --help lists."""
    result = subprocess.run(
        [sys.executable, "-c", HELP_OF_EACH, *PROGRAMS],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "1000"},  # so that no flag is broken at its hyphen
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    helps = {program: text for line in result.stdout.splitlines() for program, text in json.loads(line).items()}
    listed = {
        program: " ".join(re.findall(r"^  (-.*?)(?:  |$)", text, re.MULTILINE)) for program, text in helps.items()
    }
    return {program: set(re.findall(r"--[\w-]+", flags)) for program, flags in listed.items()}


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@of_each_document
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    files = [document.parent / link.partition("#")[0] for link in links if not link.startswith(("https://", "#"))]
    _, spans = fenced_and_inline_code(document)
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"output", "pretrained_models"}
    files += [
        ROOT / span
        for span in spans
        if re.fullmatch(r"[\w./-]+", span)
        and (span.partition("/")[0] in folders or span.endswith((".py", ".md", ".yaml", ".toml", ".sh", ".sbatch")))
    ]
    assert len(files) > 1
    missing = {os.path.relpath(file, ROOT) for file in files if not file.exists()}
    assert not missing


@of_each_document
def test_commands_use_flags_that_there_are(document: Path, flags_of: dict[str, set[str]]) -> None:
    lines, spans = fenced_and_inline_code(document)
    for command in filter(None, map(program_and_flags, [*lines, *spans])):
        program, flags = command
        for flag in flags:
            assert flag in flags_of[program], f"{document.name} has {program} {flag}"
    everything = set.union(*flags_of.values())
    for span in spans:
        if span.startswith("--"):
            assert span.split()[0] in everything, f"{document.name} has {span}"
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {command.split()[1] for command in [*lines, *spans] if command.startswith("make ")} <= targets


@of_each_document
def test_python_examples_import_what_there_is(document: Path) -> None:
    for example in re.findall(r"^```python\n(.*?)^```$", document.read_text(), flags=re.DOTALL | re.MULTILINE):
        imports = [node for node in ast.parse(example).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, []), document.name, "exec"), {})


def test_the_readme_links_what_the_download_command_fetches() -> None:
    readme = README.read_text()
    for remote in (remote for remote in FILES.values() if "huggingface" not in remote.url):
        assert remote.url in readme or "github" in remote.url
        assert Path(remote.path).name in readme


def rows_of(document: Path) -> list[list[str]]:
    """Return the cells of each line of a document's tables; an empty first cell is left out."""
    return [line.strip("| ").split(" | ") for line in document.read_text().splitlines()]


@pytest.mark.parametrize(("label", "policy"), [("MAR-B", None), ("LazyMAR-B", CachePolicy())])
def test_the_flops_in_the_tables_are_those_that_are_counted(label: str, policy: CachePolicy | None) -> None:
    with torch.device("meta"):
        model = create_model("mar_base")
    counted = count_flops(model, num_iter=64, cfg=PRESETS["mar_base"].cfg, num_sampling_steps=100, cache=policy)
    tflops = f"{counted.total / 1e12:.2f}"
    assert [row[-1] for row in rows_of(README) if row[0] == label] == [tflops]
    names, here = (row for row in rows_of(ROOT / "docs" / "results.md") if label in row or row[0] == "here")
    assert here[1 + names.index(label)] == tflops


def test_the_costs_of_other_methods_are_those_that_are_counted() -> None:
    with torch.device("meta"):
        model = create_model("mar_base")
    text = (ROOT / "docs" / "methods.md").read_text()
    table = dict(re.findall(r"^\| `([a-z+]+)` \| ([\d.]+) \|", text, flags=re.MULTILINE))
    assert set(METHODS) < set(table)
    for name in ("gtr", "lazymar+gtr+lateguidance"):  # the quickest to count
        assert table[name] == f"{count_flops(model, name, cfg=PRESETS['mar_base'].cfg).total / 1e12:.2f}"


def test_the_changelog_begins_with_this_version() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    changes = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert version and changes and version[1] == changes[1]

"""The project's own promises: its two lists of requirements agree, and its command lines explain themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from util.weights.download import FILES

ROOT = Path(__file__).parents[1]


def test_conda_and_pip_requirements_agree():
    pip = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()]
    conda = (ROOT / "environment.yaml").read_text()
    listed = conda.partition("- pip:\n")[2].splitlines()
    assert [line.strip().removeprefix("- ") for line in listed] == pip
    assert "name: lazymar" in conda


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_each_script_explains_itself(script):
    result = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


IMPORT_EACH_FIRST = """
import importlib, os, sys
import numpy, PIL.Image, safetensors, scipy, timm.layers, torch, torch_fidelity, tqdm
for module in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module(module)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"import {module} fails in a new process")
"""


def test_each_module_can_be_imported_first():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("diffusion", "models", "util")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__main__.py"
    ]
    assert {"diffusion.ancestral", "models.lazymar.plan", "util.files"} <= set(modules)
    command = [sys.executable, "-c", IMPORT_EACH_FIRST, *modules]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_plan_is_printed_without_a_warning():
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "models.lazymar", "--lazy_mar", "--num_iter", "8"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1 + 8


def test_what_users_download_is_not_offered_to_git():
    """`git add -A` would take 13 GB otherwise."""
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("this is no git checkout")
    files = [f"pretrained_models/{remote.path}" for remote in FILES.values()]
    files += [f"{path}{ending}" for path in files for ending in (".part", ".part.json")]
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

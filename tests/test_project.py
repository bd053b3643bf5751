"""The project's own promises: its two lists of requirements agree, and its command lines explain themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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

"""What is installed without extras is enough to sample with the shipped model."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
REQUIRED = """
import setuptools
setuptools.setup = lambda **given: print(*given["install_requires"], sep="\\n")
exec(open("setup.py").read(), {"__file__": "setup.py", "__name__": "__main__"})
"""
# Packages that are not in argv[2:] are not to be found, as where they are not installed.
SAMPLE = """
import importlib.metadata
import sys

from mas.__main__ import main

output, *present = sys.argv[1:]
packages = importlib.metadata.packages_distributions()


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *where):
        owners = packages.get(name.partition(".")[0])
        if owners and not {owner.lower().replace("_", "-") for owner in owners} & {*present}:
            return None
        return self.finder.find_spec(name, *where)


sys.meta_path[:] = map(Without, sys.meta_path)
sys.exit(main(["sample", "a dog in the park", "--count", "1", "--output", output]))
"""


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def plain():
    """Names of the packages that a plain install brings."""
    found = {"mini-make-a-scene"}

    def add(requirement, extras):
        name = requirement.name.lower().replace("_", "-")
        if name in found and not extras:
            return
        found.add(name)
        for more in map(Requirement, importlib.metadata.requires(requirement.name) or []):
            if more.marker is None or any(
                more.marker.evaluate({"extra": extra}) for extra in ("", *extras)
            ):
                add(more, more.extras)

    for line in run(REQUIRED).stdout.split():
        add(Requirement(line), Requirement(line).extras)
    return found


def test_without_extras_the_shipped_model_samples(plain, tmp_path):
    result = run(SAMPLE, str(tmp_path / "out"), *plain)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/0000.png").is_file(), result.stdout


@pytest.mark.parametrize("package", ["pytorch-lightning", "ray", "gradio", "torchmetrics"])
def test_a_plain_install_brings_nothing_of_the_extras(package, plain):
    assert {"torch", "numpy"} <= plain and package not in plain

"""docs/train-your-own.md: its commands, word for word, take a folder of images to a model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented import ROOT, blocks, section
from PIL import Image

PAGE = "train-your-own.md"
HEADINGS = (
    "## Settings",
    "## Try it first",
    "## Six commands",
    "## Better pictures",
    "## Sample",
)


def script():
    """All commands of the page, in the order in which it tells to give them."""
    return "\n".join(block for heading in HEADINGS for block in blocks(section(PAGE, heading)))


def test_the_page_counts_its_commands_right():
    steps = section(PAGE, "## Six commands")
    assert re.findall(r"^\*\*(\d)\. ", steps, re.MULTILINE) == list("123456")


@pytest.mark.slow
def test_the_commands_of_the_page_make_a_model(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    mas = tmp_path / "bin/mas"
    mas.parent.mkdir()
    mas.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mas "$@"\n')
    mas.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script()],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{mas.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    work = tmp_path / "mine"
    assert len(list(Path(tmp_path / "photos").glob("*.jpg"))) == 40
    assert {path.name for path in (work / "model").iterdir()} >= {
        "model_index.json",
        "tokenizer.json",
        "vqseg",
        "vqgan",
        "gpt",
        "judge",
        "refiner",
    }
    for number in range(4):
        with Image.open(work / f"samples/{number:04}.png") as picture:
            assert picture.size == (64, 64)

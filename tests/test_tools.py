"""The tools that the documentation names say in one line what is wrong."""

import runpy
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
CURVES = TOOLS.parent / "docs/curves/tiny-gpt.csv"
NOWHERE = "nowhere: no such model folder"


def run(monkeypatch, name, *words):
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.syspath_prepend(str(TOOLS))
    runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("choice", "--model nowhere --input nowhere", NOWHERE),
        ("choice", "--input nowhere", "nowhere: no such shard or folder"),
        ("curves", f"{CURVES} --output nowhere/curves.png", "nowhere/curves.png"),
        ("move_gpt", "--gpt nowhere --before x --after x --input x --output x", "no such file"),
        ("round_trip", "--input nowhere", "nowhere: no such shard or folder"),
        ("sampling_pictures", "--model nowhere --output figures", NOWHERE),
        ("split_codes", "--vqseg nowhere --input x --codes 9 --output x", "no such file"),
    ],
)
def test_what_is_not_there_is_named_without_a_traceback(
    name, words, message, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, name, *words.split())
    assert stopped.value.code.startswith("error: ") and message in stopped.value.code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["demo", "demo_train"])
def test_a_file_in_the_place_of_an_output_is_named(name, monkeypatch, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(SystemExit, match=r"File exists: .*out"):
        run(monkeypatch, name, "--output", str(tmp_path / "out"))


@pytest.mark.parametrize(
    "content", ["", "step,train/loss\n", "a,b\n1,2\n", "step,a\n1,x\n", "\xff"]
)
def test_a_file_that_holds_no_metrics_is_named(content, monkeypatch, tmp_path, capsys):
    path = tmp_path / "numbers.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(SystemExit):
        run(monkeypatch, "curves", str(path), "--output", str(tmp_path / "curves.png"))
    assert f"error: {path}: holds no metrics" in capsys.readouterr().err

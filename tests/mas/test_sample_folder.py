"""`mas sample` and the folder it writes: it takes nothing from others, whatever happens."""

import sys
import tempfile
from pathlib import Path

import pytest

import mas.sample

CAPTION = "two dogs on a bench"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folders_made_for_a_run_that_fails_go_with_it(run, tmp_path):
    (tmp_path / "mine").mkdir()
    status, _, _ = run(CAPTION, "--output", "mine/new/newer", device="cuda:99")
    assert status == 1 and [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_folder_with_something_else_is_left_alone(run, tmp_path):
    for name in ("0000.png", "thesis.tex"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("precious")
        status, _, err = run(CAPTION, "--output", str(folder))
        assert status == 1 and f"something else ({name})" in err
        assert (folder / name).read_text() == "precious" and len(list(folder.iterdir())) == 1
    (tmp_path / "file").write_text("x")
    status, _, err = run(CAPTION, "--output", "file")
    assert status == 1 and "is a file" in err


def test_a_relative_output_is_filled_on_every_python(run, tmp_path, monkeypatch):
    """From 3.12 on, `tempfile` gives absolute paths, whatever it was asked."""
    made = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *a, **k: str(Path(made(*a, **k)).absolute()))
    assert run(CAPTION, "--count=1", "--output", "out")[0] == 0
    assert {"0000.png", "0000.scene.png", "samples.json"} <= files(tmp_path / "out").keys()


def test_a_failure_keeps_the_older_samples_and_no_half_written_ones(run, tmp_path, monkeypatch):
    assert run(CAPTION, "--count=1", "--output", "out")[0] == 0
    before = files(tmp_path / "out")

    def fail(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(mas.sample, "contact_sheet", fail)
    for output in ("out", "new"):
        status, _, err = run(CAPTION, "--count=2", "--seed=7", "--output", output)
        assert status == 1 and "No space left" in err
    assert files(tmp_path / "out") == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("failure", "status"), [(KeyboardInterrupt(), 130), (OSError("No space left"), 1)]
)
def test_a_failure_leaves_the_files_of_others_alone(run, tmp_path, monkeypatch, failure, status):
    def fail(*arguments, **options):
        for folder in ("new", "new/newer"):
            (tmp_path / folder / "thesis.tex").write_text("precious")
        raise failure

    monkeypatch.setattr(mas.sample, "contact_sheet", fail)
    assert run(CAPTION, "--count=1", "--output", "new/newer/out")[0] == status
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"new/thesis.tex", "new/newer/thesis.tex"}
    assert not (tmp_path / "new/newer/out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_second_run_into_the_same_folder_is_refused_and_the_first_ends_well(run, tmp_path):
    with mas.sample.writing(tmp_path / "out") as folder:
        (folder / "0000.png").write_text("first")
        status, out, err = run(CAPTION, "--count=1", "--output", "out")
        assert (status, out) == (1, "")
        assert err == "mas: error: out: another run is writing there; choose another folder\n"
    assert files(tmp_path / "out") == {"0000.png": b"first"}


def test_what_a_killed_run_left_is_cleared_away(run, tmp_path):
    (tmp_path / "out/.writing.abc").mkdir(parents=True)
    for name in (".writing.abc/0000.png", ".writing.lock", "0007.png"):
        (tmp_path / "out" / name).write_text("half")
    assert run(CAPTION, "--count=1", "--output", "out")[0] == 0
    names = {"0000.png", "0000.scene.png", "grid.png", "samples.json"}
    assert set(files(tmp_path / "out")) == names


def test_an_unwritable_place_is_one_line(run, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr(mas.sample.Path, "mkdir", refuse)
    status, _, err = run(CAPTION, "--output", "out")
    assert status == 1 and err == f"mas: error: {tmp_path / 'out'}: Permission denied\n"

"""`mas sample` and the folder it writes: it takes nothing from others, whatever happens."""

import errno
import io
import json
import os
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import mas.sample
import mas.sample_folder
from mas.model import MakeAScene
from mas.sample import STRETCH, Given, advance, next_stretch
from mas.scene import SceneMap

CAPTION = "two dogs on a bench"
PROMPTS = ("a dog", "two cats", "a bus that is far too long for these twelve tokens")


@pytest.fixture
def painted(monkeypatch):
    """The captions and seeds of every call of the model; one may be told to fail."""
    calls, generate = [], MakeAScene.generate

    def watch(self, captions, **options):
        calls.append((len(captions), options["seed"], options["count"]))
        if len(calls) == watch.failing:
            raise watch.failure
        return generate(self, captions, **options)

    watch.failing, watch.failure = 0, KeyboardInterrupt()
    monkeypatch.setattr(MakeAScene, "generate", watch)
    monkeypatch.setattr(mas.sample, "STRETCH", 4)
    watch.calls = calls
    return watch


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def seen(folder):
    """What is not hidden."""
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


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


def test_a_failure_keeps_the_older_samples_and_no_half_written_ones(run, tmp_path, monkeypatch):
    assert run(CAPTION, "--count=1", "--output", "out")[0] == 0
    before = files(tmp_path / "out")

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as writing does, without a name

    monkeypatch.setattr(mas.sample_folder, "write_part", fail)
    for output in ("out", "new"):
        status, _, err = run(CAPTION, "--count=2", "--seed=7", "--output", output)
        assert status == 1 and f"mas: error: {output}: No space left on device" in err
    assert files(tmp_path / "out") == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("failure", "status"), [(KeyboardInterrupt(), 130), (OSError("No space left"), 1)]
)
def test_a_failure_leaves_the_files_of_others_alone(run, tmp_path, monkeypatch, failure, status):
    def fail(*arguments, **options):
        for folder in ("new", "new/newer"):
            (tmp_path / folder / "thesis.tex").write_text("precious")
        raise failure

    monkeypatch.setattr(mas.sample_folder, "write_part", fail)
    assert run(CAPTION, "--count=1", "--output", "new/newer/out")[0] == status
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"new/thesis.tex", "new/newer/thesis.tex"}
    assert not (tmp_path / "new/newer/out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_second_run_into_the_same_folder_is_refused_and_the_first_ends_well(run, tmp_path):
    with mas.sample_folder.writing(tmp_path / "out") as first:
        first.begin(captions=["first"])
        (first.folder / "0000.png").write_text("first")
        status, out, err = run(CAPTION, "--count=1", "--output", "out")
        assert (status, out) == (1, "")
        assert err == "mas: error: out: another run is writing there; choose another folder\n"
        mas.sample_folder.replace_samples(first.output, first.folder)
    assert files(tmp_path / "out") == {"0000.png": b"first"}


def test_what_a_killed_run_left_is_cleared_away(run, tmp_path):
    (tmp_path / "out/.writing.abc").mkdir(parents=True)
    for name in (".writing.abc/0000.png", ".writing.abc/samples.json", ".writing.lock", "0007.png"):
        (tmp_path / "out" / name).write_text("half")
    assert run(CAPTION, "--count=1", "--output", "out")[0] == 0
    names = {"0000.png", "0000.scene.png", "grid.png", "samples.json"}
    assert set(files(tmp_path / "out")) == names


def test_an_interrupted_run_goes_on_where_it_was(run, tmp_path, painted):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ("--prompts", "prompts.txt", "--count=3", "--seed=5", "--batch=1")
    assert run(*flags, "--output", "whole")[0] == 0
    assert painted.calls == [(1, 5, 3)] * 3  # four pictures at most
    assert run(CAPTION, "--count=1", "--output", "out")[0] == 0
    before = files(tmp_path / "out")
    painted.calls.clear()
    painted.failing = 3
    status, _, err = run(*flags, "--output", "out")
    assert status == 130 and "interrupted" in err
    assert seen(tmp_path / "out") == before  # the older samples
    painted.calls.clear()
    painted.failing = 0
    status, out, _ = run(*flags, "--batch=2", "--output", "out")  # 6 of 9 are there
    assert (status, painted.calls) == (0, [(1, 5, 3)]) and out.startswith("out: 9 pictures, ")
    assert files(tmp_path / "out").keys() == files(tmp_path / "whole").keys()
    for name, content in files(tmp_path / "whole").items():
        if name.endswith(".png"):
            assert files(tmp_path / "out")[name] == content, name
    one, other = (
        json.loads((tmp_path / name / "samples.json").read_text()) for name in ("whole", "out")
    )
    for name in ("seconds", "tokens_per_second"):
        assert other.pop(name) > 0 and one.pop(name) > 0
    assert one == other


def test_a_picture_of_others_beside_what_is_kept_is_left_alone(run, tmp_path, painted):
    flags = (CAPTION, "--count=8", "--batch=1", "--output", "out")
    painted.failing = 2
    assert run(*flags)[0] == 130
    (tmp_path / "out/0000.png").write_text("precious")
    status, _, err = run(*flags)
    assert status == 1 and "something else (0000.png)" in err
    assert seen(tmp_path / "out") == {"0000.png": b"precious"}
    (tmp_path / "out/0000.png").unlink()
    painted.calls.clear()
    assert run(*flags)[0] == 0 and painted.calls == [(1, 4, 4)]


def test_many_pictures_of_one_caption_go_on_amid_it(run, tmp_path, painted):
    flags = (CAPTION, "--count=11", "--seed=2", "--batch=1")
    painted.failing, painted.failure = 2, OSError("No space left on device")
    status, _, err = run(*flags, "--output", "out")
    assert status == 1 and "No space left" in err
    assert painted.calls == [(1, 2, 4), (1, 6, 4)]
    painted.failing = 0
    assert run(*flags, "--output", "out")[0] == 0
    assert painted.calls[2:] == [(1, 6, 4), (1, 10, 3)]
    painted.calls.clear()
    assert run(*flags, "--batch=16", "--output", "whole")[0] == 0
    assert painted.calls == [(1, 2, 11)]
    pngs = [name for name in files(tmp_path / "whole") if name.endswith(".png")]
    assert len(pngs) == 23
    assert all(seen(tmp_path / "whole")[n] == seen(tmp_path / "out")[n] for n in pngs)


def test_a_run_stopped_while_it_moves_its_pictures_paints_none_again(
    run, tmp_path, painted, monkeypatch
):
    flags = (CAPTION, "--batch=1", "--output", "out")
    assert run(*flags, "--count=7", "--seed=9")[0] == 0  # older samples, more of them
    moved, move = [], mas.sample_folder.Path.replace

    def stop(path, target):
        if path.parent.name.startswith(".writing.") and target.parent.name == "out":
            if len(moved) == 3:
                raise KeyboardInterrupt
            moved.append(target.name)
        return move(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(mas.sample_folder.Path, "replace", stop)
        assert run(*flags, "--count=5")[0] == 130
    assert sorted(seen(tmp_path / "out")) == moved == ["0000.png", "0000.scene.png", "0001.png"]
    painted.calls.clear()
    assert run(*flags, "--count=5")[0] == 0 and not painted.calls
    assert run(*flags[:-1], "whole", "--count=5")[0] == 0
    out, whole = files(tmp_path / "out"), files(tmp_path / "whole")
    assert out.keys() == whole.keys()
    assert all(out[name] == whole[name] for name in whole if name.endswith(".png"))


@pytest.mark.parametrize("damage", ["picture", "empty", "cut", "note", "torn"])
def test_what_is_not_whole_is_painted_again(run, tmp_path, painted, damage):
    flags = (CAPTION, "--count=12", "--batch=1", "--output", "out")
    painted.failing = 3
    assert run(*flags)[0] == 130
    (kept,) = (tmp_path / "out").glob(".writing.*")
    if damage == "picture":
        (kept / "0005.scene.png").unlink()
    elif damage == "empty":
        (kept / "0007.png").write_bytes(b"")
    elif damage == "cut":
        (kept / "0007.png").write_bytes((kept / "0007.png").read_bytes()[:-100])
    elif damage == "note":
        (kept / "00000004.part.json").unlink()
    else:
        (kept / "00000004.part.json").write_text('{"first": 4, "sam')
    painted.failing = 0
    painted.calls.clear()
    assert run(*flags)[0] == 0
    assert painted.calls == [(1, 4, 4), (1, 8, 4)]
    names = {f"{i:04}{kind}.png" for i in range(12) for kind in ("", ".scene")}
    assert set(files(tmp_path / "out")) == names | {"grid.png", "samples.json"}


@pytest.mark.parametrize(
    "other", [("--seed=1",), ("--guidance=2",), ("--precision=bfloat16",), ("--count=13",)]
)
def test_another_run_begins_anew(run, tmp_path, painted, other):
    flags = (CAPTION, "--count=12", "--batch=1", "--output", "out")
    painted.failing = 2
    assert run(*flags)[0] == 130
    painted.failing = 0
    painted.calls.clear()
    assert run(*flags, *other)[0] == 0
    assert sum(count for _, _, count in painted.calls) == (13 if "--count=13" in other else 12)
    assert not list((tmp_path / "out").glob(".*"))


def test_ranked_runs_go_on_with_whole_captions(run, tmp_path, painted, clip_folder):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ("--prompts", "prompts.txt", "--count=6", "--rerank=clip", "--keep=2")
    flags += ("--clip", str(clip_folder), "--batch=1")
    painted.failing = 3
    assert run(*flags, "--output", "out")[0] == 130
    painted.failing = 0
    painted.calls.clear()
    assert run(*flags, "--output", "out")[0] == 0
    assert painted.calls == [(1, 0, 6)]  # all of the last caption, and no other's
    painted.calls.clear()
    assert run(*flags, "--batch=16", "--output", "whole")[0] == 0
    assert painted.calls == [(3, 0, 6)]
    out, whole = (
        json.loads((tmp_path / name / "samples.json").read_text()) for name in ("out", "whole")
    )
    assert out["pictures"] == whole["pictures"] and out["dropped"] == whole["dropped"]
    assert len(out["pictures"]) == 6 and len(out["dropped"]) == 12
    assert (tmp_path / "out/grid.png").read_bytes() == (tmp_path / "whole/grid.png").read_bytes()


def test_pictures_ranked_by_another_clip_of_the_same_name_are_not_taken(
    run, tmp_path, painted, clip_folder
):
    clip = shutil.copytree(clip_folder, tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ("--prompts", "prompts.txt", "--count=2", "--rerank=clip", "--clip", str(clip))
    flags += ("--batch=1", "--output", "out")
    painted.failing = 2
    assert run(*flags)[0] == 130
    weights = load_file(clip / "model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    painted.failing = 0
    painted.calls.clear()
    assert run(*flags)[0] == 0 and painted.calls == [(2, 0, 2), (1, 0, 2)]


def test_a_digest_is_of_what_is_given_and_not_of_its_file(tmp_path):
    labels_HW = np.full((32, 32), 5, np.uint8)
    free_HW = np.zeros((32, 32), np.bool_)
    scenes = [SceneMap.from_labels(labels_HW.copy())]
    labels_HW[3, 4] = 6
    scenes += [SceneMap.from_labels(labels_HW), SceneMap(labels_HW, free_HW)]
    given = [Given(path=tmp_path / "a", content=scene, free_HW=None) for scene in scenes]
    given += [replace(given[0], free_HW=free_HW), replace(given[0], free_HW=~free_HW)]
    given.append(replace(given[0], content=Image.new("RGB", (32, 32)), free_HW=free_HW))
    digests = [some.digest for some in given]
    assert len(set(digests)) == len(given)
    assert digests == [replace(some, path=tmp_path / "b").digest for some in given]


def test_the_bar_of_a_run_that_goes_on_begins_where_it_was():
    bar = tqdm(file=io.StringIO())
    for first, done, shown in ((4, 1, 129), (4, 64, 192), (6, 1, 193), (6, 64, 256)):
        advance(bar, SimpleNamespace(done=done, total=64), first=first, pictures=2, total=8)
        assert (bar.n, bar.initial, bar.total) == (shown, 128, 256)
        assert bar.last_print_n >= 128  # from where it takes the speed


def test_warnings_come_once_and_the_bar_counts_all(run, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ("--prompts", "prompts.txt", "--count=4", "--batch=1", "--output", "out")
    status, _, err = run(*flags)
    assert status == 0 and "384/384" in err and "128/384" not in err.split("384/384")[1]
    said = [record.getMessage() for record in caplog.records if "longer than" in record.msg]
    assert len(said) == 1 and said[0].startswith("1 of 3 captions are longer than 12 tokens")


@pytest.mark.parametrize("whole", [False, True])
def test_stretches_cover_every_picture_once(whole):
    for captions in (1, 2, 7):
        names = [f"caption {i}" for i in range(captions)]
        for count in (1, 3, 10):
            for batch in (1, 4, 16):
                got, first = [], 0
                knobs = {"count": count, "seed": 100, "batch": batch}
                while first < captions * count:
                    part = next_stretch(names, knobs, first=first, whole=whole)
                    assert part.pictures <= max(STRETCH * batch, count if whole else 1)
                    got += [(c, part.seed + i) for c in part.captions for i in range(part.count)]
                    first += part.pictures
                assert got == [(c, 100 + i) for c in names for i in range(count)]


def test_stretches_fill_their_batches():
    """Where captions have several pictures, of as many as leave the least of a batch empty."""
    for count, pictures in ((1, 128), (3, 96), (11, 110), (33, 99), (128, 128), (200, 128)):
        knobs = {"count": count, "seed": 0, "batch": 16}
        assert next_stretch(["a"] * 500, knobs, first=0, whole=False).pictures == pictures
    assert next_stretch(["a"] * 500, knobs, first=0, whole=True).pictures == 200


def test_an_unwritable_place_is_one_line(run, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr(mas.sample_folder.Path, "mkdir", refuse)
    status, _, err = run(CAPTION, "--output", "out")
    assert status == 1 and err == f"mas: error: {tmp_path / 'out'}: Permission denied\n"

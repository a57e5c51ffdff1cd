"""An evaluation that was stopped goes on from what it had sampled."""

import errno
import json
import os

import pytest
import torch
from park_shards import write_shard

import mas.examiner
import mas.kept_tokens
from mas.cases import read_cases
from mas.evaluate import evaluate
from mas.examiner import Examiner
from mas.generate import generate
from mas.kept_tokens import KeptTokens, keeping
from mas.sequence import Streams


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("shards") / "park")


@pytest.fixture
def sampled(monkeypatch):
    """The seeds of what is sampled, in order."""
    seeds = []

    def note(*arguments, **how):
        seeds.extend(how["seeds"])
        return generate(*arguments, **how)

    monkeypatch.setattr(mas.examiner, "generate", note)
    return seeds


def stop_evaluation(monkeypatch, options, *, batches=3):
    """Begins an evaluation, as if somebody pressed Ctrl-C after some batches."""
    note, done = mas.examiner.generate, []

    def stop(*arguments, **how):
        if len(done) == batches:
            raise KeyboardInterrupt
        done.append(how)
        return note(*arguments, **how)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mas.examiner, "generate", stop)
        evaluate(**options)


def write_options(shard, tiny_folder, output):
    options = {"input": shard, "model": str(tiny_folder), "count": 6, "seeds": 2, "batch": 4}
    return {**options, "output": output}


@pytest.mark.parametrize("batch", [4, 3])
def test_a_stopped_evaluation_goes_on(
    shard, tiny_folder, tmp_path, sampled, monkeypatch, caplog, batch
):
    """What was sampled is not sampled again, the figures are those of one go, nothing is left."""
    options = write_options(shard, tiny_folder, tmp_path / "stopped/report.json")
    evaluate(**{**options, "output": tmp_path / "whole.json", "batch": batch})
    pictures = len(sampled)
    stop_evaluation(monkeypatch, options)
    assert "10 pictures are kept; the same command goes on" in caplog.text
    folder = tmp_path / "stopped/.report.tokens"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    cut, *others = sorted(folder.iterdir())
    assert len(others) == 9
    cut.write_bytes(cut.read_bytes()[:50])  # as a file system leaves it that lost its power
    sampled.clear()
    evaluate(**{**options, "batch": batch})
    assert len(sampled) == pictures - 9
    assert {path.name for path in folder.parent.iterdir()} == {
        "report.json", "report.md", "report.samples.png",
    }  # fmt: skip
    files = (options["output"], tmp_path / "whole.json")
    figures, whole = (json.loads(path.read_text()) for path in files)
    assert figures.pop("pictures_of_earlier_runs") == 9
    assert whole.pop("seconds") and figures.pop("seconds")
    assert figures == whole


def test_another_precision_samples_anew_and_leaves_what_it_cannot_use(
    shard, tiny_folder, tmp_path, sampled, monkeypatch
):
    options = write_options(shard, tiny_folder, tmp_path / "report.json")
    stop_evaluation(monkeypatch, {**options, "precision": "float32"})
    folder = tmp_path / ".report.tokens"
    kept = sorted(folder.iterdir())
    evaluate(**{**options, "precision": "bfloat16"})
    assert "pictures_of_earlier_runs" not in json.loads(options["output"].read_text())
    assert sorted(folder.iterdir()) == kept
    evaluate(**{**options, "precision": "float32"})
    assert json.loads(options["output"].read_text())["pictures_of_earlier_runs"] == len(kept)
    assert not folder.exists()


def test_kept_tokens_are_those_of_the_same_question(shard, tiny_model, tmp_path, monkeypatch):
    """Captions, given scenes, guidance and seeds: each question has tokens of its own."""
    cases = read_cases(shard, 6).cases
    questions = [
        {"guidance": None},
        {"guidance": None, "follow": cases},
        {"guidance": None, "follow": [*cases[3:], *cases[:3]]},
        {"guidance": 1.0},
        {"guidance": None, "seeds": range(7, 13)},
    ]
    plain = Examiner(tiny_model, None, seed=0, batch=4)
    asked = Examiner(tiny_model, None, seed=0, batch=4, kept=KeptTokens(tmp_path, {}))
    right = [plain.paint(cases, **question).tokens for question in questions]
    assert len({str(tokens) for tokens in right}) == len(questions)
    for _ in range(2):  # sampled, then kept
        for question, tokens in zip(questions, right, strict=True):
            for found, wanted in zip(asked.paint(cases, **question).tokens, tokens, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        monkeypatch.setattr(mas.examiner, "generate", None)  # is not called again
    monkeypatch.setattr(tiny_model, "scene_candidates", 2)
    with pytest.raises((TypeError, AttributeError)):  # it would be
        asked.paint(cases, None)


def test_other_models_find_no_tokens(tmp_path):
    tokens = Streams(*(torch.arange(3) + i for i in range(3)))
    what = {"text": tokens.text, "seed": 0}
    kept = KeptTokens(tmp_path, {"model": "a"})
    assert kept.find(what) is None
    kept.keep(what, tokens)
    for found, stored in zip(kept.find(what), tokens, strict=True):
        assert found.dtype == torch.long and torch.equal(found, stored)
    assert KeptTokens(tmp_path, {"model": "b"}).find(what) is None


def test_the_same_evaluation_twice_takes_nothing_from_under_the_other(tmp_path):
    tokens = Streams(*(torch.arange(3) + i for i in range(3)))
    with keeping(tmp_path / "kept", {}) as slow:
        with keeping(tmp_path / "kept", {}) as fast:
            fast.keep({"seed": 0}, tokens)
        assert not (tmp_path / "kept").exists()
        slow.keep({"seed": 1}, tokens)
        assert slow.find({"seed": 1})
    assert not (tmp_path / "kept").exists()


def test_what_failed_before_anything_was_kept_says_nothing_of_it(tmp_path, caplog):
    with pytest.raises(ValueError), keeping(tmp_path / "kept", {}):
        raise ValueError
    assert not caplog.text and not (tmp_path / "kept").exists()


def test_a_folder_that_takes_no_files_is_named_first(tmp_path, monkeypatch):
    def refuse(**options):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), "a name that nobody knows")

    monkeypatch.setattr(mas.kept_tokens.tempfile, "TemporaryFile", refuse)
    with (
        pytest.raises(OSError, match=r"Permission denied: '.*kept'"),
        keeping(tmp_path / "kept", {}),
    ):
        raise AssertionError

"""An evaluation that was stopped goes on from what it had sampled."""

import json

import pytest
import torch
from park_shards import write_shard

import mas.examiner
from mas.evaluate import evaluate
from mas.generate import generate
from mas.kept_tokens import KeptTokens, keeping
from mas.sequence import Streams


def test_a_stopped_evaluation_goes_on(tiny_folder, tmp_path, monkeypatch, caplog):
    """What was sampled is not sampled again, the figures are those of one go, nothing is left."""
    shard = write_shard(tmp_path / "shards")
    options = {"input": shard, "model": str(tiny_folder), "count": 6, "seeds": 2, "batch": 4}
    sampled = []

    def note(*arguments, **how):
        sampled.append(how["seeds"])
        return generate(*arguments, **how)

    def stop(*arguments, **how):
        if len(sampled) == 3:
            raise KeyboardInterrupt
        return note(*arguments, **how)

    monkeypatch.setattr(mas.examiner, "generate", note)
    evaluate(**options, output=tmp_path / "whole.json")
    batches = len(sampled)
    sampled.clear()
    output = tmp_path / "stopped" / "report.json"
    monkeypatch.setattr(mas.examiner, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(**options, output=output)
    assert "what was sampled is kept; the same command goes on" in caplog.text
    assert [path.name for path in output.parent.iterdir()] == [".report.tokens"]
    cut, *others = sorted((output.parent / ".report.tokens").iterdir())
    assert len(others) == 2
    cut.write_bytes(cut.read_bytes()[:50])  # as a file system leaves it that lost its power
    sampled.clear()
    monkeypatch.setattr(mas.examiner, "generate", note)
    evaluate(**options, output=output)
    assert len(sampled) == batches - 2
    assert {path.name for path in output.parent.iterdir()} == {
        "report.json", "report.md", "report.samples.png",
    }  # fmt: skip
    figures, whole = (json.loads(p.read_text()) for p in (output, tmp_path / "whole.json"))
    del whole["seconds"], figures["seconds"]
    assert figures == whole


def test_other_settings_find_no_tokens(tmp_path):
    tokens = Streams(*(torch.arange(6).view(2, 3) + i for i in range(3)))
    what = {"text": tokens.text, "seeds": [0, 1], "candidates": 6}
    kept = KeptTokens(tmp_path / "kept", {"model": "a"})
    assert kept.find(what) is None
    kept.keep(what, tokens)
    for found, stored in zip(kept.find(what), tokens, strict=True):
        assert found.dtype == torch.long and torch.equal(found, stored)
    for other in ({"seeds": [0, 2]}, {"text": tokens.text + 1}, {"candidates": 1}):
        assert kept.find(what | other) is None
    assert KeptTokens(tmp_path / "kept", {"model": "b"}).find(what) is None


def test_what_failed_before_anything_was_kept_says_nothing_of_it(tmp_path, caplog):
    with pytest.raises(ValueError), keeping(tmp_path / "kept", {}):
        raise ValueError
    assert not caplog.text and not (tmp_path / "kept").exists()

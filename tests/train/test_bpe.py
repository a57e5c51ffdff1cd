"""`mas fit-bpe`: which captions count, and what the fitted file does with them."""

import json
import logging

import pytest

from mas.__main__ import main
from mas.shards import Sample, ShardWriter
from mas.text import Tokenizer
from train import bpe
from train.bpe import fit_bpe

CAPTIONS = ["A Giraffe in the park", "two giraffes", "слон в парке", "象在公园"]


@pytest.fixture
def shards(tmp_path):
    for shard, captions in enumerate((CAPTIONS[:2], CAPTIONS[2:])):
        with ShardWriter(str(tmp_path / f"{shard:05}.tar")) as writer:
            for number in range(3):
                files = {
                    "jpg": b"",
                    "txt": captions[0].encode(),
                    "json": json.dumps({"captions": captions}).encode(),
                }
                writer.write(Sample(f"{shard}{number}", files))
    return tmp_path


def test_all_captions_of_all_shards_are_fitted_one_at_a_time(shards, monkeypatch):
    seen, alive = [], []

    def fit(captions, **settings):
        for caption in captions:
            seen.append(caption)
            alive.append(captions.gi_frame is not None)  # a generator still at work
        return original(iter(seen), **settings)

    original = Tokenizer.fit
    monkeypatch.setattr(bpe.Tokenizer, "fit", fit)
    output = shards / "tokenizer.json"
    fit_bpe(input=str(shards), output=str(output), vocab_size=300, length=8)
    assert seen == [*CAPTIONS[:2] * 3, *CAPTIONS[2:] * 3] and all(alive)
    tokenizer = Tokenizer.from_file(output)
    assert (tokenizer.vocab_size, tokenizer.length) == (300, 8)


@pytest.mark.parametrize(("options", "kept"), [([], False), (["--lowercase", "false"], True)])
def test_case_follows_the_option(options, kept, shards, capsys):
    output = shards / "sub/tokenizer.json"
    words = ["fit-bpe", "--input", str(shards), "--output", str(output), "--vocab-size", "300"]
    assert main([*words, *options]) == 0
    assert "300 entries, 64 tokens a caption" in capsys.readouterr().out
    tokenizer = Tokenizer.from_file(output)
    expected = CAPTIONS if kept else [caption.lower() for caption in CAPTIONS]
    assert tokenizer.decode(tokenizer.encode(CAPTIONS)) == expected


@pytest.mark.parametrize(("asked", "told"), [(300, False), (5000, True)])
def test_a_vocabulary_that_the_captions_do_not_fill_is_told(asked, told, shards, capsys):
    output = shards / "tokenizer.json"
    words = ["fit-bpe", "--input", str(shards), "--output", str(output)]
    assert main([*words, "--vocab-size", str(asked)]) == 0
    found = Tokenizer.from_file(output).vocab_size
    assert (found < asked) == told
    said = f"the captions give no more than {found}: train the GPT with "
    said += f"--model.network.text_vocabulary {found}"
    assert (said in capsys.readouterr().out) == told


def test_the_same_shards_give_the_same_file(shards):
    for name in ("a.json", "b.json"):
        fit_bpe(input=str(shards), output=str(shards / name), vocab_size=300)
    assert (shards / "a.json").read_bytes() == (shards / "b.json").read_bytes()


@pytest.mark.parametrize(
    "files",
    [{"txt": b"\xff\xfe\xff"}, {"json": rb'{"captions": ["a dog", "half a smile \ud83d"]}'}],
)
def test_captions_that_cannot_be_read_are_counted(files, shards, caplog):
    caplog.set_level(logging.WARNING)
    with ShardWriter(str(shards / "00002.tar")) as writer:
        writer.write(Sample("broken", {"jpg": b"", **files}))
    fit_bpe(input=str(shards), output=str(shards / "tokenizer.json"), vocab_size=300)
    assert "1 samples have captions that cannot be read" in caplog.text


def test_a_place_that_cannot_be_written_is_refused_before_captions_are_read(shards, monkeypatch):
    monkeypatch.setattr(bpe.Tokenizer, "fit", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match="is a folder; name a file, such as"):
        fit_bpe(input=str(shards), output=str(shards))
    with pytest.raises(FileExistsError):
        fit_bpe(input=str(shards), output=str(shards / "00000.tar" / "tokenizer.json"))


@pytest.mark.parametrize(
    ("changed", "read"),
    [({"length": 9}, False), ({"vocab_size": 290}, False), ({"lowercase": False}, True)],
)
def test_another_tokenizer_is_not_replaced(changed, read, shards, monkeypatch):
    output = shards / "tokenizer.json"
    settings = {"input": str(shards), "output": str(output), "vocab_size": 300, "length": 8}
    fit_bpe(**settings)
    written, number = output.read_bytes(), output.stat().st_ino
    fit_bpe(**settings)  # the same command again
    assert output.stat().st_ino == number
    if not read:
        monkeypatch.setattr(bpe.Tokenizer, "fit", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"tokenizer.json: holds another tokenizer.*remove that"):
        fit_bpe(**settings | changed)
    assert output.read_bytes() == written


def test_a_file_that_is_no_tokenizer_is_not_replaced(shards):
    output = shards / "notes.json"
    output.write_text("{}")
    with pytest.raises(ValueError, match=r"notes\.json: not a tokenizer\.json"):
        fit_bpe(input=str(shards), output=str(output))
    assert output.read_text() == "{}"

"""What is asked of a model, and what is wrong with pictures of which nothing can be asked."""

import pytest
from park_shards import to_sample

from mas.cases import choose_caption, read_cases
from mas.shards import Sample, ShardError, ShardWriter
from preprocess.park_truth import picture


def test_an_unseen_combination_is_asked_for_by_a_caption_that_says_it():
    def facts(colour, time=None):
        claim = {"class": "dog", "count": 1} | ({"colour": colour} if colour else {})
        return {"things": [claim], "relations": [], "place": None, "time": time}

    captions = [facts(None), facts("red"), facts("blue"), facts(None, "night")]
    assert choose_caption(captions, [{"class": "dog", "colour": "blue"}], 0) == 2
    assert choose_caption(captions, [{"class": "dog", "time": "night"}], 0) == 3
    assert choose_caption(captions, [{"class": "cat", "colour": "blue"}], 1) == 1


def test_pictures_without_a_caption_are_refused(tmp_path):
    files = picture(3, 0, size=32)
    sample = to_sample(files, "00000", park=False)
    sample.files.update(txt=b" ", json=b"{}")
    with ShardWriter(str(tmp_path / "00000.tar")) as writer:
        writer.write(sample)
    with pytest.raises(ShardError, match="00000: has no caption"):
        read_cases(str(tmp_path), 2)


@pytest.fixture
def broken(tmp_path):
    """Writes one picture of which some files are others."""

    def write(**files):
        sample = to_sample(picture(3, 0, size=32), "00000")
        named = {name.replace("_", "."): content for name, content in files.items()}
        with ShardWriter(str(tmp_path / "00000.tar")) as writer:
            writer.write(Sample(sample.key, sample.files | named))
        return str(tmp_path)

    return write


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", r"00000\.json: not a JSON object"),
        (b"{", "00000: caption or JSON cannot be read"),
        (b"[" * 10**5, "00000: caption or JSON cannot be read"),
        (b'{"park": {"format": 1, "facts": []}}', r"00000\.json: its park entry has no held_out"),
    ],
)
def test_what_is_wrong_with_the_json_of_a_picture_is_said(content, message, broken):
    with pytest.raises(ShardError, match=message):
        read_cases(broken(json=content), 2)


def test_files_of_a_picture_that_cannot_be_read_are_named(broken):
    (case,) = read_cases(broken(jpg=b"no picture", scene_png=b"no scene"), 2).cases
    for look, name in (
        (lambda: case.side, r"00000\.scene\.png"),
        (lambda: case.scene(32), r"00000\.scene\.png"),
        (lambda: case.pixels(32), r"00000\.jpg"),
    ):
        with pytest.raises(ShardError, match=f"{name}: cannot be read"):
            look()

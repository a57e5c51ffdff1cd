import json
import math
import shutil
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from mas.model_folder import ModelError
from mas.rerank import CLIP, Clip, find_clip, pictures_a_caption, rerank

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def clip(clip_folder):
    return Clip.from_pretrained(clip_folder, device="cpu")


def picture(seed, size=(40, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels)


class Ruler:
    """Judges by a list of scores, in the order of the pictures."""

    def __init__(self, values):
        self.values = values

    def scores(self, captions, images):
        assert len(captions) == len(images) == len(self.values)
        return self.values


def test_scores_are_the_cosines_of_clips_own_forward_pass(clip, clip_folder):
    captions = ["a dog", "two cats on a mat", "a dog"]
    images = [picture(0), picture(1, size=(64, 40)), picture(2)]
    network = CLIPModel.from_pretrained(clip_folder).eval().requires_grad_(False)
    expected = []
    for caption, image in zip(captions, images, strict=True):
        # Bicubic to 32 on the shorter side, centre crop, CLIP's own mean and deviation.
        scale = 32 / min(image.size)
        size = tuple(math.floor(side * scale) for side in image.size)
        left = (size[0] - 32) // 2
        cut = image.resize(size, Image.Resampling.BICUBIC).crop((left, 0, left + 32, 32))
        pixels_CHW = torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 255
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        tokens = clip.tokenizer([caption], truncation=True, max_length=16, return_tensors="pt")
        out = network(**tokens, pixel_values=((pixels_CHW - mean) / deviation)[None])
        expected.append(float(out.logits_per_image / network.logit_scale.exp()))
    scores = clip.scores(captions, images)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert all(-1 <= score <= 1 for score in scores) and len(set(scores)) == 3


def test_the_folder_says_how_pictures_are_prepared(clip, clip_folder, tmp_path):
    copy = shutil.copytree(clip_folder, tmp_path / "clip")
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.9, 0.1, 0.5]}))
    other = Clip.from_pretrained(copy, device="cpu")
    assert other.scores(["a dog"], [picture(0)]) != clip.scores(["a dog"], [picture(0)])


def test_a_score_depends_on_its_own_picture_and_caption_alone(clip):
    captions = [f"dog {i % 3}" for i in range(20)]  # more than are scored at a time
    images = [picture(i) for i in range(20)]
    together = clip.scores(captions, images)
    alone = [clip.scores([c], [i])[0] for c, i in zip(captions, images, strict=True)]
    assert together == pytest.approx(alone, abs=1e-6)


def test_a_long_caption_is_cut(clip):
    assert len(clip.scores(["a dog and " * 50], [picture(0)])) == 1


def test_the_best_come_first_and_the_rest_is_handed_out_too(tiny_model):
    out = tiny_model.generate(["a dog", "two cats"], count=3, seed=5)
    best, rest = rerank(out, Ruler([0.1, 0.3, 0.2, 0.5, 0.5, 0.9]), keep=2)
    assert best.captions == ["a dog"] * 2 + ["two cats"] * 2
    assert best.seeds == [6, 7, 7, 5] and best.scores == [0.3, 0.2, 0.9, 0.5]
    assert rest.seeds == [5, 6] and rest.scores == [0.1, 0.5]
    for chosen, original in ((0, 1), (1, 2), (2, 5), (3, 3)):
        assert best.images[chosen] is out.images[original]
        assert best.scenes[chosen] is out.scenes[original]
        assert torch.equal(best.tokens.image[chosen], out.tokens.image[original])
    everything, nothing = rerank(out, Ruler([0.1, 0.3, 0.2, 0.5, 0.5, 0.9]))
    assert everything.seeds == [6, 7, 5, 7, 5, 6] and nothing.images == []
    assert out.scores is None and out.seeds == [5, 6, 7] * 2


def test_a_clip_ranks_a_generation(tiny_model, clip):
    out = tiny_model.generate("a dog", count=4)
    best, _ = rerank(out, clip)
    scores = dict(zip(out.seeds, clip.scores(out.captions, out.images), strict=True))
    assert best.scores == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-6)
    assert best.seeds == sorted(scores, key=lambda seed: -scores[seed])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_number_of_candidates_is_read_from_the_seeds(count):
    assert pictures_a_caption(list(range(7, 7 + count)) * 3) == count


@pytest.mark.parametrize(
    ("keep", "message"), [(0, "keep is 0, use 1 to 2"), (3, "keep is 3, use 1 to 2")]
)
def test_an_impossible_choice_is_refused(tiny_model, keep, message):
    out = tiny_model.generate("a dog", count=2)
    with pytest.raises(ModelError, match=message):
        rerank(out, Ruler([0.0, 1.0]), keep=keep)


def test_pictures_without_a_caption_cannot_be_compared(tiny_model):
    out = tiny_model.generate("", image=picture(0), image_free=np.ones((40, 40), np.bool_), count=2)
    with pytest.raises(ModelError, match="compares pictures with their caption"):
        rerank(out, Ruler([0.0, 1.0]))


def test_a_hub_id_is_only_looked_up_in_the_cache(clip_folder, monkeypatch):
    asked = []

    def look_up(name, *, local_files_only):
        asked.append((name, local_files_only))
        if name == CLIP:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        return str(clip_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", look_up)
    assert find_clip("me/clip") == clip_folder
    with pytest.raises(ModelError, match=rf"{CLIP} is not on this machine.*hf download {CLIP}"):
        Clip.from_pretrained()
    assert asked == [("me/clip", True), (CLIP, True)]


def test_an_empty_cache_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="is not on this machine") as refusal:
        find_clip(CLIP)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ModelError, match=r"no/such/folder: no such folder"):
        find_clip("no/such/folder")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "incomplete, config.json is missing"),
        ("model.safetensors", "incomplete, model.safetensors or pytorch_model.bin is missing"),
        ("tokenizer.json", "incomplete, tokenizer.json or vocab.json is missing"),
        ("preprocessor_config.json", "not a CLIP that transformers can read"),
    ],
)
def test_a_missing_part_is_named(clip_folder, tmp_path, name, message):
    copy = shutil.copytree(clip_folder, tmp_path / "clip")
    (copy / name).unlink()
    with pytest.raises(ModelError, match=message) as refusal:
        Clip.from_pretrained(copy, device="cpu")
    assert "\n" not in str(refusal.value)


def test_weights_that_are_not_a_clips_are_refused_and_not_made_up(clip_folder, tmp_path):
    copy = shutil.copytree(clip_folder, tmp_path / "clip")
    tensors = load_file(copy / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not those of a CLIP, visual_projection\.weight"):
        Clip.from_pretrained(copy, device="cpu")
    (copy / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="not a CLIP that transformers can read"):
        Clip.from_pretrained(copy, device="cpu")


def test_a_missing_package_names_the_extra(clip_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(OSError, match=r"transformers.*pip install 'mini-make-a-scene\[eval\]'"):
        Clip.from_pretrained(clip_folder)

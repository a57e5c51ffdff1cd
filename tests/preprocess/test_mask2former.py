"""Mask2Former, tiny and random: colour order, aspect, padding, instances, labels."""

import errno
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mas.scene import PANOPTIC_CLASSES, VOID
from mas.shards import Sample
from preprocess.batching import fitted_size
from preprocess.mask2former import Mask2FormerPanoptic, from_mask2former, load_mask2former
from preprocess.segment import Photo
from preprocess.weights import WeightsError

transformers = pytest.importorskip("transformers")

RED = np.full((96, 128, 3), (255, 0, 0), np.uint8)


def photos(*images):
    return [Photo(str(i), image, Sample(str(i), {})) for i, image in enumerate(images)]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder as `mas fetch-weights` leaves it, holding a tiny random network."""
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        embed_dim=12,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=10,
        num_labels=len(PANOPTIC_CLASSES),
    )
    folder = tmp_path_factory.mktemp("mask2former")
    network = transformers.Mask2FormerForUniversalSegmentation(config)
    network.save_pretrained(folder)
    return folder


def tiny_segmenter(folder, **options):
    """Thresholds at zero, so that random weights say something."""
    options = {"score": 0.0, "mask": 0.0, "overlap": 0.0, "short_side": 96, **options}
    return Mask2FormerPanoptic(weights=str(folder), device="cpu", **options)


def test_mask2former_receives_one_normalised_rgb_batch(tiny):
    segmenter = tiny_segmenter(tiny)
    seen = []
    segmenter.network.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(inputs["pixel_values"]), with_kwargs=True
    )
    segmenter(photos(RED, noise(96, 128)))
    (pixels_BCHW,) = seen
    assert pixels_BCHW.shape == (2, 3, 96, 128)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    torch.testing.assert_close(
        pixels_BCHW[0, :, 40, 60], torch.tensor(expected), rtol=1e-4, atol=1e-4
    )


def test_mask2former_covers_each_photo_at_its_own_aspect(tiny):
    images = [noise(96, 128), noise(200, 100), noise(300, 310)]
    for image, found in zip(images, tiny_segmenter(tiny)(photos(*images)), strict=True):
        assert found.labels.shape == fitted_size(*image.shape[:2], short_side=96, max_side=1024)
        assert found.labels.dtype == np.uint8 and found.instances.dtype == np.int32
        assert np.isin(found.labels, [*range(len(PANOPTIC_CLASSES)), VOID]).all()
        assert (found.labels != VOID).any()


def test_padding_a_batch_does_not_shift_a_photos_masks(tiny):
    """The stretched-over-the-target mask grid must end where the photo ends, not its padding.

    The network is replaced by one whose masks follow the picture: query 0 where red is high.
    """
    segmenter = tiny_segmenter(tiny, overlap=0.5, mask=0.5)

    class FollowsRed(torch.nn.Module):
        def forward(self, pixel_values, pixel_mask):
            red = torch.nn.functional.avg_pool2d(pixel_values[:, :1], 4) * 20
            logits = torch.full((len(red), 2, 134), -9.0)
            logits[:, 0, 0] = logits[:, 1, 119] = 9.0
            masks = torch.cat([red, -red], dim=1)
            return SimpleNamespace(class_queries_logits=logits, masks_queries_logits=masks)

    segmenter.network = FollowsRed()
    wide, square = np.zeros((96, 160, 3), np.uint8), np.zeros((96, 128, 3), np.uint8)
    wide[:, :80, 0] = square[:, :64, 0] = 255
    for found in segmenter(photos(wide, square)):
        half = found.labels.shape[1] // 2
        assert (found.labels[:, : half - 2] == 0).all()
        assert (found.labels[:, half + 2 :] == 119).all()


def test_a_thing_after_stuff_that_was_found_twice_keeps_its_own_id(tiny):
    """Sky, person, sky again, dog in four stripes, in this order of the queries."""
    segmenter = tiny_segmenter(tiny, overlap=0.5, mask=0.5)

    def stripes(pixel_values, pixel_mask):
        logits = torch.full((1, 4, 134), -9.0)
        masks = torch.full((1, 4, 24, 32), -9.0)
        for query, label in enumerate((119, 0, 119, 16)):
            logits[0, query, label] = 9.0
            masks[0, query, :, query * 8 : query * 8 + 8] = 9.0
        return SimpleNamespace(class_queries_logits=logits, masks_queries_logits=masks)

    segmenter.network = stripes
    ((labels, instances),) = segmenter(photos(RED))
    middles = (labels[48, 16::32].tolist(), instances[48, 16::32].tolist())
    assert middles == ([119, 0, 119, 16], [1, 2, 1, 4])


def test_segments_of_mask2former_keep_instances_and_void():
    result = {
        "segmentation": torch.tensor([[1, 1, 2], [3, 0, 0]], dtype=torch.int32),
        "segments_info": [
            {"id": 1, "label_id": 0},
            {"id": 2, "label_id": 0},
            {"id": 3, "label_id": 132},
        ],
    }
    labels, instances = from_mask2former(result)
    assert labels.tolist() == [[0, 0, 0], [132, VOID, VOID]]
    assert instances.tolist() == [[1, 1, 2], [3, 0, 0]]


def test_a_photo_in_which_mask2former_finds_nothing_is_void(tiny):
    (found,) = tiny_segmenter(tiny, score=1.1)(photos(RED))
    assert (found.labels == VOID).all() and not found.instances.any()


def test_checkpoints_with_other_labels_are_refused(tiny, tmp_path):
    config = transformers.Mask2FormerConfig.from_pretrained(tiny)
    config.num_labels = 150
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="has 150 labels"):
        load_mask2former(str(tmp_path))


def test_missing_mask2former_weights_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MAS_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match="--name mask2former-swin-base-coco-panoptic"):
        Mask2FormerPanoptic(weights="mask2former-swin-base-coco-panoptic")


def cut(folder):
    os.truncate(folder / "model.safetensors", 5000)


def exchange(folder):
    (folder / "config.json").write_text('{"model_type": "bert"}')


def remove(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [cut, exchange, remove])
def test_damaged_mask2former_weights_are_named_in_one_line(tiny, tmp_path, damage):
    """As a download leaves them that was cut."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    damage(folder)
    with pytest.raises(WeightsError, match=f"^{folder}: not a readable Mask2Former .* again$") as e:
        load_mask2former(str(folder))
    assert "\n" not in str(e.value)


def test_a_mount_that_is_gone_is_no_damage_of_mask2former_weights(tiny, monkeypatch):
    stale = OSError(errno.ESTALE, "Stale file handle")

    def fail(*_, **__):
        raise stale

    monkeypatch.setattr("transformers.Mask2FormerForUniversalSegmentation.from_pretrained", fail)
    with pytest.raises(OSError, match="Stale file handle") as caught:
        load_mask2former(str(tiny))
    assert caught.value is stale


def test_what_is_missing_in_mask2former_weights_is_not_made_up(tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["class_predictor.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks 1 of .* such as class_predictor\.bias; remove"):
        load_mask2former(str(folder))

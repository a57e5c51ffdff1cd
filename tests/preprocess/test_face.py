"""Face landmarks: colour order, all faces, photo pixels, offline, small faces skipped."""

import errno
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from mas.scene import PERSON, VOID, Segments
from mas.shards import Sample
from preprocess import face
from preprocess.face import FaceLandmarks
from preprocess.segment import Photo
from preprocess.weights import WeightsError

RED = np.full((96, 128, 3), (255, 0, 0), np.uint8)
GRASS = 125


def photos(*images):
    return [Photo(str(i), image, Sample(str(i), {})) for i, image in enumerate(images)]


def segments(*images, label=PERSON):
    """All of each photo is one segment."""
    return [
        Segments(np.full(i.shape[:2], label, np.uint8), np.ones(i.shape[:2], np.int32))
        for i in images
    ]


class Alignment:
    """Stands for the library: records what it gets; a face's points are its box's corner."""

    def __init__(self, boxes):
        self.boxes, self.batches, self.images = boxes, [], []
        self.face_detector = self

    def detect_from_batch(self, batch_BCHW):
        self.batches.append(batch_BCHW)
        return [self.boxes for _ in batch_BCHW]

    def get_landmarks_from_image(self, image, detected_faces):
        self.images.append(image)
        return [np.tile(np.float32(box[:2]), (68, 1)) for box in detected_faces]


def finder(monkeypatch, *boxes, **options):
    boxes = [np.array([*box, 0.9]) for box in boxes]
    monkeypatch.setattr(face, "load_face_alignment", lambda config: Alignment(boxes))
    return FaceLandmarks(device="cpu", **options)


def test_both_networks_receive_red_green_blue(monkeypatch):
    found = finder(monkeypatch, (10, 10, 60, 70))
    found(photos(RED), segments(RED))
    alignment = found.alignment
    assert alignment.batches[0].dtype == torch.uint8
    assert alignment.batches[0][0, :, 50, 50].tolist() == [255, 0, 0]
    assert alignment.images[0][50, 50].tolist() == [255, 0, 0]


def test_all_photos_of_a_batch_are_detected_in_one_call_padded_with_black(monkeypatch):
    found = finder(monkeypatch)
    narrow = RED[:, :100]
    assert found(photos(RED, narrow), segments(RED, narrow)) == [[], []]
    (batch_BCHW,) = found.alignment.batches
    assert batch_BCHW.shape == (2, 3, 96, 128)
    widths = [int((picture[0, 0] > 0).sum()) for picture in batch_BCHW]
    assert sorted(widths) == [100, 128]


def test_every_face_comes_back_in_pixels_of_the_photo(monkeypatch):
    large = RED.repeat(4, axis=0).repeat(4, axis=1)  # 384 x 512, shrunk to 96 for detection
    found = finder(monkeypatch, (10, 20, 60, 70), (64, 8, 100, 48), short_side=96)
    ((first, second),) = found(photos(large), segments(large))
    assert first.shape == (68, 2) and first.dtype == np.float64
    assert first[0].tolist() == [40, 80] and second[0].tolist() == [256, 32]


def test_small_photos_are_not_enlarged(monkeypatch):
    found = finder(monkeypatch, short_side=512)
    found(photos(RED), segments(RED))
    assert found.alignment.batches[0].shape[-2:] == (96, 128)


def test_faces_smaller_than_the_limit_are_skipped(monkeypatch):
    boxes = [(10, 10, 40, 40), (50, 10, 55, 15)]  # 30 and 5 pixels of 96
    assert len(finder(monkeypatch, *boxes, min_side=0.1)(photos(RED), segments(RED))[0]) == 1
    assert len(finder(monkeypatch, *boxes, min_side=0.0)(photos(RED), segments(RED))[0]) == 2


def test_faces_off_people_and_off_the_photo_are_skipped(monkeypatch):
    labels = np.full((96, 128), GRASS, np.uint8)
    labels[:, 40:60] = PERSON
    labels[:, 100:] = VOID
    scene = [Segments(labels, np.ones(labels.shape, np.int32))]
    boxes = [(5, 10, 35, 40), (30, 10, 60, 40), (90, 10, 120, 40), (130, 10, 160, 40)]
    boxes += [(-40, 10, -10, 40), (40, -40, 60, -10)]
    (faces,) = finder(monkeypatch, *boxes)(photos(RED), scene)
    assert [points[0, 0] for points in faces] == [30, 90]


def test_results_follow_the_photos_whatever_their_shapes(monkeypatch):
    images = [np.full((h, w, 3), 9, np.uint8) for h, w in ((96, 200), (200, 96), (96, 96))]
    found = finder(monkeypatch, (0, 0, 50, 50), batch=2)
    shapes = [len(faces) for faces in found(photos(*images), segments(*images))]
    assert shapes == [1, 1, 1] and len(found.alignment.batches) == 3


def test_without_the_package_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    with pytest.raises(WeightsError, match=r"mini-make-a-scene\[preprocess\]") as caught:
        FaceLandmarks()
    assert "\n" not in str(caught.value)


def test_unknown_detectors_and_options_are_refused():
    with pytest.raises(ValueError, match="use one of sfd, yunet"):
        FaceLandmarks(detector="dlib")
    with pytest.raises(TypeError, match="detectors"):
        FaceLandmarks(detectors="sfd")


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """The two default files, randomly initialised, as torch's cache holds them."""
    pytest.importorskip("face_alignment")
    from face_alignment.detection.sfd.net_s3fd import s3fd
    from face_alignment.models import FAN

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "checkpoints"
    folder.mkdir()
    torch.save(FAN(4).state_dict(), folder / "2DFAN4-11f355bf06.pth.tar")
    torch.save(s3fd().state_dict(), folder / "s3fd-619a316812.pth")
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """Empty weights folder, empty torch cache, and a network that is not there."""
    monkeypatch.setenv("MAS_WEIGHTS", str(tmp_path / "weights"))
    before = torch.hub._hub_dir
    torch.hub.set_dir(str(tmp_path / "hub"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("downloads"))
    yield tmp_path
    torch.hub._hub_dir = before


def test_the_real_networks_run_from_the_weights_folder_in_their_colours(random_weights, no_cache):
    (no_cache / "weights").mkdir()
    (no_cache / "weights/face").symlink_to(random_weights.parent)
    hub = torch.hub.get_dir()
    found = FaceLandmarks(device="cpu", min_side=0.0)
    assert torch.hub.get_dir() == hub
    seen = {}
    detector = found.alignment.face_detector
    detector.filter_threshold = 1.0  # random weights see faces everywhere
    detector.face_detector.register_forward_pre_hook(lambda _, x: seen.update(detector=x[0]))
    found.alignment.face_alignment_net.register_forward_pre_hook(
        lambda _, x: seen.update(landmarks=x[0])
    )
    assert found(photos(RED), segments(RED)) == [[]]
    # S3FD was trained on BGR minus these means, which the library sees to; FAN on RGB / 255.
    torch.testing.assert_close(
        seen["detector"][0, :, 50, 50], torch.tensor([0.0 - 104, 0 - 117, 255 - 123])
    )
    detector.detect_from_batch = lambda batch: [[[20, 10, 60, 70, 0.9], [60, 10, 90, 60, 0.9]]]
    ((first, second),) = found(photos(RED), segments(RED))
    assert first.shape == second.shape == (68, 2) and np.isfinite(first).all()
    assert len(seen["landmarks"]) == 2  # both faces in one batch
    assert seen["landmarks"][0, :, 128, 128].tolist() == [1, 0, 0]


def test_retinaface_gets_blue_green_red_although_the_library_does_not_swap(
    random_weights, no_cache
):
    pytest.importorskip("torchvision")
    from face_alignment.detection.retinaface.net_retinaface import RetinaFace, cfg_mnet

    folder = no_cache / "hub/checkpoints"
    folder.mkdir(parents=True)
    torch.save(RetinaFace(cfg=cfg_mnet).state_dict(), folder / "retinaface_mobilenet0.25.pth")
    (folder / "2DFAN4-11f355bf06.pth.tar").symlink_to(random_weights / "2DFAN4-11f355bf06.pth.tar")
    found = FaceLandmarks(device="cpu", detector="retinaface")
    found.alignment.face_detector.confidence_threshold = 1.0
    seen = []
    found.alignment.face_detector.face_detector.register_forward_pre_hook(
        lambda _, x: seen.append(x[0])
    )
    assert found(photos(RED), segments(RED)) == [[]]
    torch.testing.assert_close(seen[0][0, :, 9, 9], torch.tensor([0.0 - 104, 0 - 117, 255 - 123]))


def test_torchs_own_cache_is_used_when_it_holds_the_files(random_weights, no_cache):
    torch.hub.set_dir(str(random_weights.parent))
    FaceLandmarks(device="cpu")
    assert torch.hub.get_dir() == str(random_weights.parent)


def test_missing_weights_are_named_and_not_downloaded(no_cache):
    pytest.importorskip("face_alignment")
    with pytest.raises(WeightsError, match="mas fetch-weights face") as caught:
        FaceLandmarks(device="cpu")
    assert "2DFAN4-11f355bf06.pth.tar" in str(caught.value)
    assert not list(no_cache.rglob("*.pth*"))


def test_damaged_weights_are_named_in_one_line(random_weights, no_cache):
    folder = no_cache / "weights/face/checkpoints"
    shutil.copytree(random_weights, folder)
    os.truncate(folder / "s3fd-619a316812.pth", 3000)
    with pytest.raises(
        WeightsError, match="weights/face: 2dfan4 or s3fd cannot be loaded"
    ) as caught:
        FaceLandmarks(device="cpu")
    assert "fetch it again" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), OSError(errno.ESTALE, "Stale handle")]
)
def test_a_gpu_or_a_mount_is_not_taken_for_a_damaged_file(error, monkeypatch):
    """A worker is made again for these; what is fetched again is as good as before."""
    library = pytest.importorskip("face_alignment")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(library, "FaceAlignment", fail)
    monkeypatch.setattr(face, "_in_cache_of_torch", lambda names: True)
    with pytest.raises(type(error)) as caught:
        face.load_face_alignment(face.FaceLandmarksConfig())
    assert caught.value is error


def test_every_detector_says_which_weights_it_needs(no_cache):
    pytest.importorskip("face_alignment")
    for detector in face.DETECTOR_WEIGHTS:
        with pytest.raises(WeightsError, match="mas fetch-weights face"):
            FaceLandmarks(device="cpu", detector=detector)

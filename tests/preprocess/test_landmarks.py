import numpy as np
import pytest

from preprocess.landmarks import draw_faces


def face(centre=(64.3, 64.3), scale=1.0):
    """A frontal face of 68 landmarks, about 80 pixels high at scale 1."""
    points = np.zeros((68, 2))
    turn = np.linspace(0, np.pi, 17)
    points[:17] = np.stack([-36 * np.cos(turn), 44 * np.sin(turn)], -1)  # jaw
    points[17:22] = np.stack([np.linspace(-30, -10, 5), [-28, -32, -33, -32, -29]], -1)
    points[22:27] = points[21:16:-1] * (-1, 1)
    points[27:31] = np.stack([np.zeros(4), np.linspace(-16, 6, 4)], -1)
    points[31:36] = np.stack([np.linspace(-8, 8, 5), [9, 11, 12, 11, 9]], -1)
    eye = [(-26, -15), (-22, -19), (-16, -19), (-12, -15), (-16, -12), (-22, -12)]
    points[36:42] = eye
    points[42:48] = np.array(eye) * (-1, 1)
    around = np.linspace(-np.pi, np.pi, 13)[:12]
    points[48:60] = np.stack([16 * np.cos(around), 25 + 8 * np.sin(around)], -1)
    points[60:68] = np.stack([10 * np.cos(around[:8] * 1.5), 25 + 3 * np.sin(around[:8] * 1.5)], -1)
    return points * scale + centre


def test_the_five_parts_lie_where_their_landmarks_are():
    parts = draw_faces([face()], 128)
    assert parts.dtype == np.uint8 and parts.shape == (128, 128)
    assert set(np.unique(parts)) == {0, 1, 2, 3, 4, 5}
    expected = {1: (33, 64), 2: (48, 64), 3: (65, 64), 4: (89, 64), 5: (89, 64)}
    for part, (row, column) in expected.items():
        rows, columns = np.nonzero(parts == part)
        assert abs(rows.mean() - row) < 4 and abs(columns.mean() - column) < 2, part
    assert not parts[100:].any()  # the jaw is not drawn


def test_a_face_and_its_mirror_image_give_mirrored_maps():
    mirrored = face() * (-1, 1) + (128, 0)
    straight, mirror = draw_faces([face()], 128), draw_faces([mirrored], 128)
    assert (straight != mirror[:, ::-1]).mean() < 0.002


def test_parts_are_not_shifted_against_their_landmarks():
    random = np.random.default_rng(0)
    offsets = []
    for centre in random.uniform(40, 80, (50, 2)):
        points = face(centre=tuple(centre), scale=0.6)
        rows, columns = np.nonzero(draw_faces([points], 128) == 2)
        found = np.array([columns.mean(), rows.mean()]) + 0.5  # centre of a pixel
        offsets.append(found - (points[36:48].min(0) + points[36:48].max(0)) / 2)
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.15


def test_small_faces_and_faces_outside_are_left_out():
    assert not draw_faces([face(scale=0.1)], 128, min_height=10).any()
    assert draw_faces([face(scale=0.1)], 128, min_height=5).any()
    assert not draw_faces([face(centre=(-300.0, 64.0))], 128).any()
    assert not draw_faces([], 128).any()


def test_the_larger_face_lies_on_top():
    small, large = face(scale=0.3), face()
    assert np.array_equal(draw_faces([small, large], 128), draw_faces([large, small], 128))


@pytest.mark.parametrize("scale", [0.1, 1.0, 2.5])
def test_drawing_never_fails_at_the_border(scale):
    assert draw_faces([face(centre=(2.0, 126.0), scale=scale)], 128).max() <= 5

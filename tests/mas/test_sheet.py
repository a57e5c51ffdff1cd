"""Contact sheets show every cell, at the size and place they promise."""

import numpy as np
import pytest
from PIL import Image

from mas.scene import PALETTE, SceneMap
from mas.sheet import BACKGROUND, GAP, contact_sheet, overlay


def test_pictures_land_in_their_cells_with_their_aspect_kept():
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (8, 4), "blue")
    sheet = contact_sheet([[red, blue]], cell=40)
    assert sheet.size == (GAP + 2 * (40 + GAP), GAP + 40 + GAP)
    assert sheet.getpixel((GAP, GAP)) == (255, 0, 0)
    assert sheet.getpixel((GAP + 40 + GAP + 20, GAP + 20)) == (0, 0, 255)
    assert sheet.getpixel((GAP + 40 + GAP + 20, GAP + 2)) == BACKGROUND  # wide picture, centred


def test_enlarging_keeps_pixels_crisp():
    colours = np.array([[[255, 0, 0], [0, 0, 255]]] * 2, np.uint8)
    sheet = np.asarray(contact_sheet([[Image.fromarray(colours)]], cell=40))
    seen = {tuple(int(v) for v in c) for c in sheet[GAP : GAP + 40, GAP : GAP + 40].reshape(-1, 3)}
    assert seen == {(255, 0, 0), (0, 0, 255)}


def test_long_texts_stay_inside_their_cell():
    text = "a very long caption " * 50
    sheet = np.asarray(contact_sheet([[text, ""]], cell=96)).astype(int)
    outside = sheet[:, GAP + 96 + GAP :]
    assert (outside == BACKGROUND).all()
    assert (np.abs(sheet - BACKGROUND).sum(-1) > 100).any()


def test_a_header_names_the_columns():
    plain = contact_sheet([["x"]], cell=40)
    titled = contact_sheet([["x"]], cell=40, header=["photo"])
    assert titled.height > plain.height


def test_an_empty_sheet_is_refused():
    with pytest.raises(ValueError, match="at least one cell"):
        contact_sheet([])


def test_overlay_mixes_colours_and_draws_edges():
    labels = np.zeros((4, 4), np.uint8)
    labels[:, 2:] = 1
    scene = SceneMap.from_labels(labels)
    mixed = np.asarray(overlay(Image.new("RGB", (8, 8)), scene, opacity=0.5))
    assert mixed.shape == (4, 4, 3)
    assert (mixed[:, 1] == 255).all()
    assert np.abs(mixed[0, 0].astype(int) - PALETTE[0] / 2).max() <= 1

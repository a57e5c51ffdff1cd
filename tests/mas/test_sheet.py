"""Contact sheets show every cell, at the size and place they promise."""

import numpy as np
import pytest
from PIL import Image, ImageFont

import mas.sheet
from mas.scene import PALETTE, SceneMap
from mas.sheet import BACKGROUND, GAP, contact_sheet, find_font, overlay, spell


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


@pytest.mark.parametrize("text", ["слон и жираф " * 50, "砂浜の上の二匹の犬" * 50])
def test_texts_of_any_script_stay_inside_their_cell(text):
    sheet = np.asarray(contact_sheet([[text, ""], ["", ""]], cell=96)).astype(int)
    outside = np.ones(sheet.shape[:2], np.bool_)
    outside[: GAP + 96 + GAP, : GAP + 96 + GAP] = False
    assert (sheet[outside] == BACKGROUND).all()


FOREIGN = "Müllers Elephant, Слон, 象"


def test_letters_that_no_font_has_are_spelled_without_boxes(monkeypatch):
    monkeypatch.setattr(mas.sheet, "FONTS", ("",))
    font = find_font(FOREIGN, 13)
    assert spell(FOREIGN, font) == "Mullers Elephant, ????, ?"
    assert spell("e\u0301\n", font) == "e\n"
    foreign, plain = (contact_sheet([[text]]) for text in (FOREIGN, spell(FOREIGN, font)))
    assert np.array_equal(np.asarray(foreign), np.asarray(plain))
    monkeypatch.setattr(mas.sheet, "FONTS", ("", "no such font.ttf"))
    assert find_font(FOREIGN, 13) is font


@pytest.mark.parametrize("end", ["\n", "\n\n", "\r\n", "\x1c", "\x85", "\u2028", "\u2029"])
def test_what_ends_a_line_is_given_to_no_font(end, monkeypatch):
    """Pillow 13 draws none of it with the fonts of a machine: raqm_layout() fails."""

    def refuse(original):
        def draw(self, text, *args, **options):
            assert text.splitlines() in ([text], []), text
            return original(self, text, *args, **options)

        return draw

    for name in ("getmask2", "getlength", "getbbox"):
        original = getattr(ImageFont.FreeTypeFont, name)
        monkeypatch.setattr(ImageFont.FreeTypeFont, name, refuse(original))
    mas.sheet._has.cache_clear()
    two = contact_sheet([[f"two dogs{end}seed 4"]])
    one = contact_sheet([["two dogs seed 4"]])
    assert two.size == one.size and two.tobytes() != one.tobytes()


def test_a_font_of_the_machine_is_taken_only_for_letters_that_pillow_lacks():
    name = next((name for name in mas.sheet.FONTS[1:] if mas.sheet._load(name, 13)), None)
    if name is None:
        pytest.skip("the machine has none of the fonts")
    assert find_font("two dogs", 13) is mas.sheet._load("", 13)
    font = find_font("Müllers Слон", 13)
    assert spell("Müllers Слон", font) == "Müllers Слон"
    assert font is not mas.sheet._load("", 13)


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

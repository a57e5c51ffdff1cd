import numpy as np
from PIL import Image

from mas.scene import SceneMap

CAPTION = "a giraffe in the park"


def test_progress_shows_the_scene_first_then_the_picture_row_by_row(tiny_model):
    seen = []

    def watch(progress):
        scenes, images = progress.scenes(), progress.images()
        seen.append((progress.first, progress.done, scenes is not None, images is not None))
        if images is not None and progress.done % 32 == 24:  # two of four rows
            bottom = np.asarray(images[0])[16:]
            assert (bottom == 128).all() and not (np.asarray(images[0])[:16] == 128).all()

    out = tiny_model.generate(CAPTION, count=3, batch=1, on_progress=watch)
    assert [done for _, done, _, _ in seen] == list(range(1, 3 * 32 + 1))
    assert [first for first, *_ in seen] == [0] * 32 + [1] * 32 + [2] * 32
    assert [scene for _, _, scene, _ in seen] == ([False] * 15 + [True] * 17) * 3
    assert [image for *_, image in seen] == ([False] * 19 + [True] * 13) * 3
    last = []
    tiny_model.generate(CAPTION, on_progress=lambda p: p.done == p.total and last.append(p))
    assert last[0].scenes() == out.scenes[:1]
    assert np.array_equal(np.asarray(last[0].images()[0]), np.asarray(out.images[0]))


def test_progress_says_when_there_is_something_new_to_show(tiny_model):
    news = []

    def watch(progress):
        assert (progress.scenes() is None) == (progress.done <= 15)
        news.append((progress.done, progress.new_scene, progress.new_rows, progress.rows))

    tiny_model.generate(CAPTION, on_progress=watch)
    assert [done for done, new_scene, _, _ in news if new_scene] == [16]
    assert [(done, rows) for done, _, new, rows in news if new] == [
        (20, 1),
        (24, 2),
        (28, 3),
        (32, 4),
    ]
    assert {new for _, _, new, _ in news} == {0, 1}


def test_progress_shows_at_once_what_was_given(tiny_model):
    free = np.zeros((32, 32), np.bool_)
    free[16:] = True
    image = Image.new("RGB", (32, 32), "red")
    news = []
    tiny_model.generate(
        CAPTION,
        scene=SceneMap.from_labels(np.full((32, 32), 125, np.uint8)),
        image=image,
        image_free=free,
        on_progress=lambda p: news.append((p.new_scene, p.new_rows)),
    )
    row = [(False, 0)] * 3 + [(False, 1)]
    assert news == [(True, 2), *row[1:], *row]

"""Wishes become pictures, can be stopped, and get in nobody's way."""

import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mas.drawing import free_cells, widen
from mas.fill import fill_void
from mas.painter import MOST_EACH, MOST_WAITING, Crowded, Painter, Wish
from mas.scene import CLASS_NAMES, VOID, SceneMap

SIZE, GRID = 32, 4
CELL = SIZE // GRID
DOG, GRASS = (CLASS_NAMES.index(name) for name in ("dog", "grass-merged"))
SETTINGS = {"guidance": 2.0, "temperature": 1.0, "top_p": 1.0}


@pytest.fixture(scope="module")
def painter(tiny_model):
    return Painter(tiny_model)


def wish(**changed):
    settings = {
        "caption": "a giraffe in the park",
        "scene": None,
        "keep_void": False,
        "count": 2,
        "seed": 3,
        "scene_sampling": SETTINGS,
        "image_sampling": SETTINGS,
        "candidates": 1,
        "refine": True,
    }
    return Wish(**settings | changed)


def pixels(images):
    return [np.asarray(image).tobytes() for image in images]


def test_scenes_come_before_pictures_and_both_are_those_of_the_model(painter):
    seen = list(painter.paint(wish()))
    shares = [shown.share for shown in seen]
    assert shares == sorted(shares) and shares[-1] == 1
    first = next(i for i, shown in enumerate(seen) if shown.scenes)
    assert all(shown.images is None for shown in seen[: first + 1])
    expected = painter.model.generate(
        wish().caption, count=2, seed=3, scene_sampling=SETTINGS, image_sampling=SETTINGS
    )
    assert seen[first].scenes == seen[-1].scenes == expected.scenes
    assert pixels(seen[-1].images) == pixels(expected.images)
    assert all(shown.result is None for shown in seen[:-1])
    assert seen[-1].result.seeds == [3, 4]


def test_what_shall_not_be_painted_reaches_the_model(painter):
    apart = list(painter.paint(wish(negative_prompt="two cats")))[-1].result
    expected = painter.model.generate(
        wish().caption,
        count=2,
        seed=3,
        scene_sampling=SETTINGS,
        image_sampling=SETTINGS,
        negative_prompt="two cats",
    )
    assert apart.scenes == expected.scenes and apart.negative_prompt == "two cats"
    assert pixels(apart.images) == pixels(expected.images)


def test_what_is_drawn_stays_and_the_rest_is_invented(painter, two_dogs):
    labels = two_dogs.labels.copy()
    labels[2 * CELL :] = VOID
    half = SceneMap.from_labels(labels)
    filled = fill_void(free_cells(half, GRID), np.arange(GRID)[:, None].repeat(GRID, 1) >= 2)
    kept = painter.model.vqseg.encode(*batch(filled)).reshape(GRID, GRID)
    results = [list(painter.paint(wish(scene=half, seed=s, count=1)))[-1].result for s in range(4)]
    tokens = [r.tokens.scene.reshape(GRID, GRID) for r in results]
    assert all(np.array_equal(t[:2], kept[:2]) for t in tokens)
    assert len({t[2:].numpy().tobytes() for t in tokens}) > 1
    whole = list(painter.paint(wish(scene=half, keep_void=True)))
    told = [shown.scenes for shown in whole if shown.scenes]
    assert len(told) > 1 and all(scenes == [half, half] for scenes in told)


def test_a_picture_is_kept_where_nothing_is_drawn_on_its_scene(painter):
    first = list(painter.paint(wish(count=1)))[-1].result
    drawn = np.zeros((SIZE, SIZE), np.bool_)
    drawn[1:3, 1:3] = True  # in the first cell
    labels = np.where(drawn, DOG, first.scenes[0].labels).astype(np.uint8)
    again = wish(
        scene=SceneMap.from_labels(labels),
        picture=first.images[0],
        drawn=drawn,
        count=4,
        seed=10,
    )
    seen = list(painter.paint(again))
    anew = widen(drawn, GRID, SIZE)
    assert 0 < anew.sum() < anew.size / 2
    before = np.asarray(first.images[0])
    for images in (shown.images for shown in seen if shown.images):
        assert all(np.array_equal(np.asarray(x)[~anew], before[~anew]) for x in images)
    assert len({np.asarray(x)[anew].tobytes() for x in seen[-1].images}) > 1


def batch(scene):
    return torch.from_numpy(scene.labels)[None], torch.from_numpy(scene.edges)[None]


def test_a_wish_that_cannot_be_is_said_and_the_next_one_is_served(painter):
    with pytest.raises(ValueError, match="the caption is empty"):
        list(painter.paint(wish(caption="")))
    with pytest.raises(ValueError, match="top_p"):
        list(painter.paint(wish(scene_sampling={**SETTINGS, "top_p": 0.0})))
    assert list(painter.paint(wish()))[-1].result is not None


def test_the_drawing_comes_with_the_result_as_sample_takes_it(painter, two_dogs):
    labels = two_dogs.labels.copy()
    labels[2 * CELL - 3 :] = VOID  # into the second row of cells
    shown = list(painter.paint(wish(scene=SceneMap.from_labels(labels), count=1)))[-1]
    again = painter.model.generate(
        wish().caption,
        scene=shown.held,
        scene_free=shown.held.labels == VOID,  # --fill-void
        seed=3,
        scene_sampling=SETTINGS,
        image_sampling=SETTINGS,
    )
    assert torch.equal(again.tokens.scene, shown.result.tokens.scene)
    assert pixels(again.images) == pixels(shown.images)
    assert list(painter.paint(wish(count=1)))[-1].held is None


def test_strokes_that_hold_no_cell_are_said(painter):
    thin = np.full((SIZE, SIZE), VOID, np.uint8)
    thin[5] = DOG
    with pytest.raises(ValueError, match="too thin to hold a cell"):
        list(painter.paint(wish(scene=SceneMap.from_labels(thin))))


class Slow:
    """Stands for a model whose generations last until they are stopped."""

    def __init__(self):
        self.begun = threading.Event()
        self.count = 0

    def pictures_that_fit(self):
        return 1

    def generate(self, caption, *, on_progress, **_):
        self.count += 1
        self.begun.set()
        for done in itertools.count():
            on_progress(SimpleNamespace(done=done, total=10**9, rows=0, new_scene=0, new_rows=0))
            time.sleep(0.001)


@pytest.fixture
def slow():
    painter = Painter(Slow())
    yield painter
    painter.close()


def test_a_stopped_wish_ends_without_a_result_and_stops_nobody_else(slow):
    slow.stop("nobody")  # has not asked for anything
    running = slow.paint(wish(), "me")
    next(running)
    slow.stop("somebody else")
    assert next(running).result is None
    slow.stop("me")
    assert all(shown.result is None for shown in running)


def test_who_waits_is_told_and_may_stop_too(slow):
    first, second = slow.paint(wish(), "first"), slow.paint(wish(), "second")
    next(first)
    assert next(second).ahead == 1
    slow.stop("second")
    assert all(shown.ahead == 1 for shown in second)
    assert slow.model.count == 1
    third = slow.paint(wish(), "third")
    assert next(third).ahead == 1
    slow.stop("first")
    assert next(shown for shown in third if not shown.ahead).share == 0
    assert slow.model.count == 2


def test_a_second_wish_of_a_visitor_stops_the_first_and_can_be_stopped(slow):
    first = slow.paint(wish(), "me")
    next(first)
    second = slow.paint(wish(), "me")
    seen = itertools.islice(second, 10)  # without end if the first were never stopped
    assert next(shown for shown in seen if not shown.ahead).share == 0
    assert all(shown.result is None for shown in first)
    slow.stop("me")
    assert all(shown.result is None for shown in second)


def test_who_leaves_holds_nobody_up(slow):
    running = slow.paint(wish(), "left")
    next(running)
    running.close()
    other = slow.paint(wish(), "stays")
    assert next(shown for shown in other if not shown.ahead).share == 0


def test_only_so_many_wishes_wait_and_each_visitor_has_one(slow):
    line = [slow.paint(wish(), str(i)) for i in range(MOST_WAITING + 1)]  # one is served
    for generator in line:
        next(generator)
    with pytest.raises(Crowded, match=rf"^{MOST_WAITING} wishes wait already: try again later\.$"):
        next(slow.paint(wish(), "one more"))
    assert slow.model.count == 1 and len(slow._line) == len(line)
    again = slow.paint(wish(), "3")  # instead of the one that waits
    next(again)
    assert not [shown for shown in line[3] if not shown.ahead]
    with pytest.raises(Crowded):
        slow.check_room("one more")
    slow.stop("5")
    slow.check_room("one more")
    slow.close()


def test_one_address_leaves_room_in_the_line_for_others(slow):
    tabs = [slow.paint(wish(), f"tab {i}", "192.0.2.1") for i in range(MOST_EACH + 1)]
    for generator in tabs:  # one is served
        next(generator)
    wanted = rf"^{MOST_EACH} wishes from your address wait already: try again later\.$"
    with pytest.raises(Crowded, match=wanted):
        next(slow.paint(wish(), "one more tab", "192.0.2.1"))
    again = slow.paint(wish(), "tab 3", "192.0.2.1")  # instead of the one that waits
    next(again)  # kept, or it would leave the line
    other = slow.paint(wish(), "somebody", "192.0.2.2")
    assert next(shown for shown in other if shown.ahead <= len(tabs)).ahead == len(tabs)
    slow.stop("tab 5")
    slow.check_room("one more tab", "192.0.2.1")
    slow.close()


def test_who_stops_waiting_leaves_the_line_at_once(slow, monkeypatch):
    monkeypatch.setattr("mas.painter.TELL_EVERY", 60)
    first, second = slow.paint(wish(), "first"), slow.paint(wish(), "second")
    for generator in (first, second):
        next(generator)
    start = time.monotonic()
    slow.stop("second")
    assert all(shown.ahead for shown in second) and time.monotonic() - start < 30
    slow.close()


def test_closing_ends_all_that_runs_and_all_that_waits(slow):
    running = [slow.paint(wish(), str(i)) for i in range(3)]
    for generator in running:
        next(generator)
    slow.close()
    assert all(shown.result is None for generator in running for shown in generator)
    assert slow.model.count == 1


def test_what_a_model_warns_of_is_told_with_the_result(painter):
    long = list(painter.paint(wish(caption="a giraffe in the park " * 20)))[-1]
    assert len(long.warnings) == 1 and "longer than 12 tokens" in long.warnings[0]
    assert not list(painter.paint(wish(count=1)))[-1].warnings


def test_the_page_is_told_of_void_by_the_names_on_the_page(painter, two_dogs):
    labels = two_dogs.labels.copy()
    labels[16:] = VOID
    kept = wish(scene=SceneMap.from_labels(labels), keep_void=True, count=1)
    warning, lost = list(painter.paint(kept))[-1].warnings
    assert "are lost on the way" in lost  # its VQ-SEG is untrained
    assert warning.startswith("50 % of the scene is void")
    assert warning.endswith("what is not drawn is for the model to invent")
    assert "--fill-void" not in warning


def test_a_wish_may_end_while_it_is_stopped(tiny_model):
    class Slow(dict):
        """Between two looks at it the wish has time to end."""

        def __contains__(self, visitor):
            there = super().__contains__(visitor)
            end.start()
            end.join(0.5)
            return there

    painter = Painter(tiny_model)
    going = painter.paint(wish(), "somebody")
    next(going)
    painter._stops = Slow(painter._stops)
    end = threading.Thread(target=going.close)
    painter.stop("somebody")
    end.join()
    painter.close()
    assert not len(painter._stops)

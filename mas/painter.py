"""What happens behind the studio's page: wishes become pictures, one after the other.

In: a caption, a scene and settings. Out: scenes and pictures while they are sampled. Nothing here
knows of the page.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from mas.drawing import free_cells, widen
from mas.model import MakeAScene
from mas.model_folder import ModelError
from mas.progress import Progress
from mas.request import Generation
from mas.scene import VOID, SceneMap

ROWS_A_PREVIEW = 4  # rows of image tokens between two looks at unfinished pictures
MOST_PICTURES = 16
MOST_WAITING = 16  # wishes, besides the one that is served
MOST_EACH = 8  # of these from one address: whoever opens many tabs leaves room for others
TELL_EVERY = 0.5  # seconds between two reports of the share alone


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What one press of the button asks for."""

    caption: str
    scene: SceneMap | None  # as drawn, void where nothing is; None: nothing is drawn at all
    keep_void: bool  # what is not drawn stays void; else the model invents it
    picture: Image.Image | None = None  # that shall stay as it is but for what is drawn
    drawn: np.ndarray | None = None  # bool H W like `scene`: where, with `picture`
    count: int
    seed: int
    scene_sampling: Mapping[str, float]
    image_sampling: Mapping[str, float]
    candidates: int
    refine: bool
    negative_prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What there is to see by now."""

    ahead: int = 0  # others who are served before
    share: float = 0.0  # of the tokens that are sampled, 0-1
    scenes: list[SceneMap] | None = None  # as soon as they are complete
    images: list[Image.Image] | None = None
    result: Generation | None = None  # at the end
    held: SceneMap | None = None  # at the end: what the model was given, void where it was free
    warnings: tuple[str, ...] = ()  # at the end


class Stopped(Exception):
    """Somebody pressed the button that stops."""


class Crowded(Exception):
    """Too many wishes wait already."""


class Place(threading.Event):
    """A wish's place in the line; set when its visitor wants no more of it."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address


class Warnings(logging.Handler):
    """What mas warns of in this thread meanwhile, for those who do not see the terminal."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.thread = threading.get_ident()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread:
            self.said.append(getattr(record, "on_page", None) or record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("mas").addHandler(self)
        return self.said

    def __exit__(self, *_: object) -> None:
        logging.getLogger("mas").removeHandler(self)


News = queue.SimpleQueue[Shown | BaseException | None]


class Painter:
    """A model that many visitors share: one is served at a time, and each may stop their own."""

    def __init__(self, model: MakeAScene) -> None:
        self.model = model
        self._line: list[Place] = []  # who is served, and who waits
        self._moved = threading.Condition()  # guards the line and the stops
        self._stops: dict[str, Place] = {}  # by visitor
        self._workers: set[threading.Thread] = set()

    def paint(self, wish: Wish, visitor: str = "", address: str = "") -> Iterator[Shown]:
        """Yields what there is to see, the finished pictures last; nothing more when stopped.

        A visitor has one wish at a time: a new one stops the one before. Visitors of one address
        share its room in the line; of an unknown one, which is empty, they do not.

        Raises:
            ValueError: as `MakeAScene.generate`; or a drawing too thin to hold a single cell.
            Crowded: as `check_room`.
        """
        with self._moved:
            self.check_room(visitor, address)
            self.stop(visitor)
            stop = self._stops[visitor] = Place(address)
            self._line.append(stop)
        news: News = queue.SimpleQueue()
        worker = threading.Thread(target=self._work, args=(wish, stop, news), daemon=True)
        self._workers.add(worker)
        worker.start()
        try:
            while (item := news.get()) is not None:
                if isinstance(item, Stopped):
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()  # also when the visitor has left; the worker ends by itself
            with self._moved:
                if self._stops.get(visitor) is stop:
                    del self._stops[visitor]

    def check_room(self, visitor: str = "", address: str = "") -> None:
        """Asks whether one more wish may wait; one of the same visitor would make room.

        Raises:
            Crowded: says how many wait.
        """
        with self._moved:
            mine = self._stops.get(visitor)
            waiting = [x for x in self._line[1:] if x is not mine and not x.is_set()]
        if len(waiting) >= MOST_WAITING:
            raise Crowded(f"{len(waiting)} wishes wait already: try again later.")
        beside = sum(x.address == address for x in waiting)
        if address and beside >= MOST_EACH:
            raise Crowded(f"{beside} wishes from your address wait already: try again later.")

    def stop(self, visitor: str = "") -> None:
        """Ends what this visitor is waiting for, after the step at hand."""
        with self._moved:
            if visitor in self._stops:
                self._stops[visitor].set()
                self._moved.notify_all()  # who only waits leaves the line at once

    def close(self) -> None:
        """Stops everything and waits until it has ended."""
        with self._moved:
            for stop in self._line:
                stop.set()
        for worker in list(self._workers):
            worker.join()

    def _work(self, wish: Wish, stop: Place, news: News) -> None:
        try:
            with self._turn(stop, news), Warnings() as said:
                shown = self._generate(wish, stop, news)
                news.put(replace(shown, warnings=tuple(said)))
        except BaseException as error:  # whatever it is, the page must not wait for ever
            news.put(error)
        news.put(None)
        self._workers.discard(threading.current_thread())

    @contextmanager
    def _turn(self, stop: Place, news: News) -> Iterator[None]:
        """Waits until those who came before are served, and lets the next one in afterwards."""
        try:
            with self._moved:
                while (ahead := self._line.index(stop)) and not stop.is_set():
                    news.put(Shown(ahead=ahead))
                    self._moved.wait(TELL_EVERY)
            if stop.is_set():
                raise Stopped
            yield
        finally:
            with self._moved:
                self._line.remove(stop)
                self._moved.notify_all()

    def _generate(self, wish: Wish, stop: threading.Event, news: News) -> Shown:
        held, free_HW = wish.scene, None
        if held is not None and not wish.keep_void:
            held = free_cells(held, self.model.vqseg.config.grid)
            void_HW = held.labels == VOID
            free_HW = void_HW if void_HW.any() else None
            if void_HW.all():
                raise ModelError(
                    "the strokes are too thin to hold a cell of the scene: draw broader ones"
                )
        paste, anew_HW = self._keep(wish)
        result = self.model.generate(
            wish.caption,
            scene=held,
            scene_free=free_HW,
            image=wish.picture,
            image_free=anew_HW,
            count=wish.count,
            seed=wish.seed,
            scene_sampling=wish.scene_sampling,
            image_sampling=wish.image_sampling,
            scene_candidates=wish.candidates,
            refine=wish.refine,
            negative_prompt=wish.negative_prompt,
            batch=self._batch(),
            on_progress=Reports(stop, news, paste, held if free_HW is None else None),
        )
        result = replace(result, images=paste(result.images))
        return Shown(
            share=1.0, scenes=result.scenes, images=result.images, result=result, held=held
        )

    def _batch(self) -> int:
        """Pictures at a time: all, or as many as the memory holds."""
        return max(1, min(MOST_PICTURES, self.model.pictures_that_fit()))

    def _keep(
        self, wish: Wish
    ) -> tuple[Callable[[list[Image.Image]], list[Image.Image]], np.ndarray | None]:
        """Puts the picture of a wish back, pixel by pixel, where it is not painted anew.

        Returns:
            What does so with pictures, and where they are painted anew: bool H W like the picture,
            whole cells; None: everywhere.
        """
        picture = wish.picture
        if picture is None:
            return lambda images: images, None
        assert wish.drawn is not None
        anew_HW = widen(wish.drawn, self.model.vqgan.config.grid, picture.width)
        mask = Image.fromarray(anew_HW)
        return lambda images: [Image.composite(x, picture, mask) for x in images], anew_HW


class Reports:
    """Tells what `MakeAScene.generate` has done, now and then; ends it where it shall stop."""

    def __init__(
        self,
        stop: threading.Event,
        news: News,
        paste: Callable[[list[Image.Image]], list[Image.Image]],
        followed: SceneMap | None,
    ) -> None:
        """`followed` is a scene that is given whole: what its tokens say of it is coarser."""
        self.stop, self.news, self.paste, self.followed = stop, news, paste, followed
        self.told = 0.0

    def __call__(self, progress: Progress) -> None:
        if self.stop.is_set():
            raise Stopped
        share = progress.done / progress.total
        rows = progress.rows
        if progress.new_scene:
            scenes = progress.scenes()
            if scenes and self.followed is not None:
                scenes = [self.followed] * len(scenes)
            self.news.put(Shown(share=share, scenes=scenes))
        elif progress.new_rows and rows % ROWS_A_PREVIEW == 0 and rows < progress.grid:
            images = progress.images()
            self.news.put(Shown(share=share, images=images and self.paste(images)))
        elif time.monotonic() - self.told > TELL_EVERY:
            self.news.put(Shown(share=share))
        else:
            return
        self.told = time.monotonic()

"""The studio's page: what stands where, and what happens when something is pressed.

In: a caption, strokes in palette colours, a scene file; each may be missing, what is not drawn the
model invents. Out: scenes and pictures, shown while they are sampled, and the files that
`mas sample` writes.
"""

from __future__ import annotations

import html
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mas.drawing import draw_scene, read_drawing
from mas.filter import Sampling
from mas.painter import MOST_PICTURES, Crowded, Painter, Shown, Wish
from mas.request import Generation
from mas.sample import describe_model
from mas.sample_folder import write_result
from mas.scene import CLASS_NAMES, SceneMap
from mas.studio_canvas import build_canvas, colour_of
from mas.studio_guard import is_local

SHOWN = 256  # pixels a side that pictures are shown with at least
READY = "Write a caption, or draw a scene, or both. Then paint."
KEPT = (300, 3600)  # seconds: how often shown files are looked over, how old they get
SEEDS = 2**53  # that a browser, which counts in float64, tells apart: smaller ones
LONGEST_CAPTION = 2000
TOLD = 200  # characters of it that are told again with the result
FOLDERS = 20  # of finished pictures that stay on the disk
# A reload of the page keeps the caption, as the canvas keeps the drawing.
REMEMBER = "caption => { sessionStorage.setItem('mas-studio-caption', caption); }"
RECALL = "() => sessionStorage.getItem('mas-studio-caption') ?? ''"
# gradio makes the lowest number of what a slider's field cannot be: it gets back what it held.
KEEP_NUMBERS = """() => {
  let held = "";
  const isField = (x) => x.matches?.("input[type=number]") && x.max !== "";
  document.addEventListener("focus", ({ target }) => {
    if (isField(target)) held = target.value;
  }, true);
  document.addEventListener("blur", ({ target }) => {
    if (!isField(target)) return;
    const number = target.valueAsNumber;
    if (number >= Number(target.min) && number <= Number(target.max)) return;
    target.value = held;
    target.dispatchEvent(new Event("input", { bubbles: true }));
  }, true);
}"""
EXAMPLES = {  # captions, by the name of the model
    "park": (
        "the elephant is walking around in the park",
        "two brown dogs and a woman with a red umbrella on the beach at sunset",
        "a yellow bus on the street at night",
        "three sheep in the mountains",
    )
}
Finished = list[tuple[SceneMap, Image.Image | None]]  # scenes, and their pictures if there are


class Page:
    """The page: what stands where, and what happens when something is pressed."""

    def __init__(self, painter: Painter, name: str, folder: Path) -> None:
        """`name` is that of the model, `folder` is for files that are shown."""
        self.painter, self.model = painter, painter.model
        self.name, self.folder = name, folder
        self.size = self.model.vqseg.config.size
        self.written: deque[Path] = deque()  # folders of finished pictures

    def build(self) -> gr.Blocks:
        """Puts the page together."""
        with gr.Blocks(
            title="mini Make-A-Scene", analytics_enabled=False, fill_width=True, delete_cache=KEPT
        ) as page:
            # Of each visitor: the scenes and pictures painted last; which of them; the seed that
            # the next ones replace, and theirs.
            self.finished, self.chosen, self.renewed = gr.State(), gr.State(0), gr.State()
            gr.Markdown(f"## mini Make-A-Scene\n`{self.name}` on {self.model.device}")
            with gr.Row():
                with gr.Column(scale=5):
                    self._put_drawing()
                with gr.Column(scale=6):
                    self._put_results()
                    self._put_settings()
            self._connect()
            page.load(None, None, self.caption, js=RECALL, api_visibility="private")
            page.load(None, js=KEEP_NUMBERS, api_visibility="private")
        return page

    def _put_drawing(self) -> None:
        self.caption = gr.Textbox(
            label="Caption",
            placeholder="What is to be seen?",
            max_length=LONGEST_CAPTION,
            max_lines=6,
            autofocus=True,
        )
        if self.name in EXAMPLES:
            gr.Examples(
                [[text] for text in EXAMPLES[self.name]], self.caption, label="For instance"
            )
        self.canvas = build_canvas(
            self.size, self.model.vqseg.config.grid, sorted(self.model.classes or CLASS_NAMES)
        )
        self.keep_picture = gr.Checkbox(
            True, label="Drawn on a painted scene: keep the picture where nothing is drawn"
        )
        self.keep_void = gr.Radio(
            [("is for the model to invent", False), ("stays empty", True)],
            value=False,
            label="What is not drawn",
        )

    def _put_results(self) -> None:
        with gr.Row():
            self.start = gr.Button("Paint", variant="primary", scale=3)
            self.stop = gr.Button("Stop", scale=1)
        self.status = gr.HTML(tell(READY))
        self.pictures, self.scenes = (
            gr.Gallery(
                label=label,
                columns=columns,
                object_fit="contain",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_classes="shown",
            )
            for label, columns in (("Pictures", 2), ("Scenes", 4))
        )
        self.colours = gr.HTML()
        with gr.Row():
            self.edited = gr.Button("Draw on the chosen scene", size="sm")
            self.files = gr.DownloadButton("Download all", size="sm", interactive=False)

    def _put_settings(self) -> None:
        with gr.Row():
            self.count = gr.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures")
            self.seed = gr.Number(0, label="Seed of the first")
            self.advance = gr.Checkbox(True, label="Take new seeds next time")
        with gr.Accordion("More settings", open=False):
            self.negative = gr.Textbox(
                label="Not in the picture",
                placeholder="at night",
                max_length=LONGEST_CAPTION,
            )
            self.sampling = {
                "scene": _put_sampling("scene", self.model.sampling.scene),
                "image": _put_sampling("picture", self.model.sampling.image),
            }
            with gr.Row():
                self.candidates = gr.Slider(
                    1,
                    max(8, self.model.scene_candidates),
                    self.model.scene_candidates,
                    step=1,
                    label="Scenes drawn for a picture; the judge takes one",
                    visible=self.model.judge is not None,
                )
                self.refine = gr.Checkbox(
                    True,
                    label="Correct pictures by their scenes",
                    visible=self.model.refiner is not None,
                )

    def _connect(self) -> None:
        # Nothing of this is for programs: they have `mas sample` and MakeAScene.generate.
        private: Any = {"api_visibility": "private"}
        # One after the other, so that what is chosen last is what is drawn on.
        in_order = private | {"concurrency_id": "choosing", "concurrency_limit": 1}
        asked = {
            *(self.caption, self.canvas, self.keep_picture, self.keep_void),
            *(self.count, self.seed, self.advance, self.candidates, self.refine, self.negative),
            *(part for parts in self.sampling.values() for part in parts.values()),
        }
        told = [self.pictures, self.scenes, self.colours, self.status, self.files]
        told += [self.finished, self.chosen, self.renewed]
        painted = gr.on(
            [self.start.click, self.caption.submit],
            self.paint,
            asked,
            told,
            show_progress="hidden",
            concurrency_limit=None,  # the painter serves one after the other
            **private,
        )
        seeds = [self.seed, self.renewed]  # as they are by then: somebody may have typed meanwhile
        painted.then(renew, seeds, seeds, show_progress="hidden", queue=False, **private)
        self.stop.click(self.end, queue=False, **private)
        self.caption.change(None, self.caption, None, js=REMEMBER, **private)
        for gallery in (self.pictures, self.scenes):
            gallery.select(choose, None, self.chosen, **in_order)
        self.edited.click(edit, [self.finished, self.chosen], self.canvas, **in_order)

    def paint(self, asked: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Shows scenes and pictures as they come.

        Args:
            asked: by component, what it holds.
            request: tells visitors apart.
        """
        shown, visitor = None, (request.session_hash or "", address_of(request))
        try:
            wish = self._read_wish(asked)
            self.painter.check_room(*visitor)  # before what was painted last is taken away
            yield {
                **{part: None for part in (self.pictures, self.scenes, self.finished)},
                self.colours: "",
                self.chosen: 0,
                self.status: tell("Painting …", share=0),
                self.files: gr.DownloadButton(interactive=False),
            }
            for shown in self.painter.paint(wish, *visitor):
                yield self._show(shown, wish)
        except Crowded as error:
            yield {self.status: tell(str(error))}
            return
        except ValueError as error:
            yield {self.status: tell(f"This cannot be painted: {error}")}
            return
        except Exception:
            yield {self.status: tell("Something went wrong; the terminal says what.")}
            raise
        if shown is None or shown.result is None:
            yield {self.status: tell("Stopped.")}
        elif asked[self.advance]:
            yield {self.renewed: (wish.seed, wish.seed + wish.count)}

    def end(self, request: gr.Request) -> None:
        """Ends what this visitor waits for."""
        self.painter.stop(request.session_hash or "")

    def _read_wish(self, asked: dict[Any, Any]) -> Wish:
        numbers = [self.count, self.seed, self.candidates]
        numbers += [part for parts in self.sampling.values() for part in parts.values()]
        for part in numbers:
            if asked[part] is None:
                raise ValueError(f"fill in a number: {part.label}")
        if asked[self.seed] != int(asked[self.seed]):
            raise ValueError(f"fill in a whole number: {self.seed.label}")
        count, seed = int(asked[self.count]), int(asked[self.seed])
        if seed + count > SEEDS:
            raise ValueError(
                f"a browser would round the seed: use {SEEDS - count} or less, or mas sample"
            )
        sampling = {
            stream: {name: asked[part] for name, part in parts.items()}
            for stream, parts in self.sampling.items()
        }
        drawing = read_drawing(asked[self.canvas], self.size)
        picture = drawing.picture if asked[self.keep_picture] and drawing.drawn.any() else None
        if picture is not None and picture.width != self.model.vqgan.config.size:
            raise ValueError("the picture of the scene is not of this model: empty the canvas")
        caption, negative = (
            " ".join((asked[part] or "").split()) for part in (self.caption, self.negative)
        )
        if max(len(caption), len(negative)) > LONGEST_CAPTION:
            raise ValueError(f"the caption has more than {LONGEST_CAPTION} characters: shorten it")
        return Wish(
            caption=caption,
            scene=drawing.scene,
            picture=picture,
            drawn=drawing.drawn,
            keep_void=asked[self.keep_void],
            count=count,
            seed=seed,
            scene_sampling=sampling["scene"],
            image_sampling=sampling["image"],
            candidates=int(asked[self.candidates]),
            refine=asked[self.refine],
            negative_prompt=negative,
        )

    def _show(self, shown: Shown, wish: Wish) -> dict[Any, Any]:
        """What changes on the page."""
        if shown.result is not None:
            return self._show_result(shown.result, shown.held, shown.warnings)
        if shown.ahead:
            return {self.status: tell(f"Waiting for {shown.ahead} before you …")}
        news: dict[Any, Any] = {self.status: tell("Painting …", share=shown.share)}
        if shown.images is not None:
            news[self.pictures] = [enlarge(image) for image in shown.images]
        if shown.scenes is not None:
            news |= self._show_scenes(shown.scenes, wish.seed)
        return news

    def _show_scenes(self, scenes: Sequence[SceneMap], seed: int) -> dict[Any, Any]:
        shown = [
            (enlarge(scene.to_rgb(edges=True), smooth=False), f"seed {seed + i}")
            for i, scene in enumerate(scenes)
        ]
        return {
            self.scenes: shown,
            self.colours: legend(scenes),
            self.finished: [(scene, None) for scene in scenes],
        }

    def _show_result(
        self, result: Generation, held: SceneMap | None, warnings: Sequence[str]
    ) -> dict[Any, Any]:
        """The finished pictures, and all files that `mas sample` would have written.

        With them goes drawing.png: what was given of the scene, for `--scene` and `--fill-void`.
        """
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self.written.append(folder)
        if len(self.written) > FOLDERS:  # gradio has copied what it shows
            shutil.rmtree(self.written.popleft())
        samples = folder / "samples"
        samples.mkdir()
        write_result(samples, result, about=describe_model(self.model, self.name))
        if held is not None:
            held.to_png(samples / "drawing.png")
        packed = shutil.make_archive(str(samples), "zip", samples)
        pictures = [
            (str(samples / f"{i:04}.png"), f"seed {seed}") for i, seed in enumerate(result.seeds)
        ]
        seeds = " to ".join(
            str(seed) for seed in dict.fromkeys((result.seeds[0], result.seeds[-1]))
        )
        caption = result.captions[0] or "the scene alone"
        if len(caption) > TOLD:
            caption = caption[:TOLD] + " …"
        speed = f"{result.seconds:.1f} s, {result.tokens_per_second:.0f} tokens/s"
        return self._show_scenes(result.scenes, result.seeds[0]) | {
            self.pictures: pictures,
            self.status: tell(f"{caption}, seed {seeds}: {speed}", *warnings),
            self.files: gr.DownloadButton(value=packed, interactive=True),
            self.finished: list(zip(result.scenes, result.images, strict=True)),
        }


def _put_sampling(name: str, sampling: Sampling) -> dict[str, gr.Slider]:
    """Sliders for one stream, by the names of the settings."""
    ranges = {  # lowest, highest, value, step
        "guidance": (0, max(10, sampling.guidance), sampling.guidance, 0.5),
        "temperature": (0, max(2, sampling.temperature), sampling.temperature, 0.05),
        "top_p": (0.05, 1, sampling.top_p or 1.0, 0.05),
    }
    with gr.Row():
        return {
            key: gr.Slider(
                low,
                high,
                value,
                step=step,
                label=f"{key.capitalize().replace('_', '-')}, {name}",
                min_width=120,
            )
            for key, (low, high, value, step) in ranges.items()
        }


def tell(*lines: str, share: float | None = None) -> str:
    """HTML of what the page says, and of how much is done; screen readers read the lines aloud."""
    said = "<br>".join(html.escape(line) for line in lines)
    bar = ""
    if share is not None:
        bar = f"<progress value={share:.3f} aria-label=Painted></progress> {share:.0%}"
    return f"<div role=status>{said}</div><div class=telling>{bar}</div>"


def address_of(request: gr.Request) -> str:
    """Where a visitor asks from; empty where it may be many, behind a proxy of this machine."""
    host = request.client.host if request.client else ""
    return "" if is_local(host) else host


def renew(seed: float | None, renewed: tuple[int, int] | None) -> tuple[Any, None]:
    """The seed of the next pictures: another one only where that of the last still stands.

    Else the field is left alone: somebody may be typing in it.
    """
    if renewed is not None and seed == renewed[0]:
        return renewed[1], None
    return gr.skip(), None


def choose(event: gr.SelectData) -> int:
    """Which of the pictures or scenes was clicked."""
    return int(event.index)


def edit(finished: Finished | None, chosen: int) -> str:
    """Puts the scene of a picture on the canvas."""
    if not finished:
        raise gr.Error("There is no scene yet: paint first.", print_exception=False)
    return draw_scene(*finished[min(chosen, len(finished) - 1)])


def legend(scenes: Sequence[SceneMap]) -> str:
    """HTML: which colour is what, of the classes in these scenes, the largest first."""
    pixels: Counter[str] = Counter()
    for scene in scenes:
        pixels.update(scene.histogram())
    entries = (
        f"<span><i style='background:{colour_of(name)}'></i>{html.escape(name)}</span>"
        for name, _ in pixels.most_common()
    )
    return f"<div class='legend'>{''.join(entries)}</div>"


def enlarge(picture: Image.Image, *, smooth: bool = True) -> Image.Image:
    """A small picture a whole number of times larger, for looking at."""
    times = max(1, -(-SHOWN // picture.width))
    filter_ = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return picture.resize((picture.width * times, picture.height * times), filter_)

"""The exact truth of a park picture and its annotations, as the members of a shard.

In: a scene and its painting. Out: `KEY.*` files; the structure is described in docs/park.md.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from mas.scene import COCO_CATEGORY_IDS, PANOPTIC_CLASSES
from preprocess.park_compose import compose, find_held_out
from preprocess.park_paint import TINTS, Painting, paint
from preprocess.park_scene import Scene, Thing, relate
from preprocess.park_words import write_captions
from preprocess.park_world import HELD_OUT_MODES

FORMAT = 1  # of the "park" entry of KEY.json
QUALITY = 95  # of the JPEG, colours in full resolution: the pictures are small


def picture(
    seed: int, index: int, *, size: int = 128, held_out: str = "exclude"
) -> dict[str, bytes]:
    """Files of one annotated picture by extension, a function of the arguments alone.

    Args:
        seed: of the world.
        index: of the picture.
        size: side in pixels.
        held_out: see `preprocess.park_compose.compose`.
    """
    if held_out not in HELD_OUT_MODES:
        raise ValueError(f"held_out is one of {', '.join(HELD_OUT_MODES)}, got {held_out!r}")
    scene = compose(seed, index, held_out=held_out)
    painting = paint(scene, size)
    truth = tell(scene, painting)
    captions = write_captions(scene, truth["things"], Random(f"words/{seed}/{index}"))
    truth = {"format": FORMAT, "seed": seed, "index": index, **truth}
    truth["facts"] = [caption.facts() for caption in captions]
    texts = [caption.text for caption in captions]
    landmarks = [m.round(2).tolist() for m in painting.landmarks if m is not None]
    return {
        "jpg": _jpeg(painting.image),
        "txt": texts[0].encode(),
        "json": _json({"captions": texts, "width": size, "height": size, "park": truth}),
        "panoptic.png": _png(Image.fromarray(_id_colours(painting.segments))),
        "segments.json": _json({"segments_info": _segments_info(scene, painting)}),
        "human.png": _png(Image.fromarray(painting.human)),
        "landmarks.json": _json(landmarks),
    }


def tell(scene: Scene, painting: Painting) -> dict[str, Any]:
    """What is in the picture: things far to near, counts, relations, place, time."""
    things = []
    for thing, segment in zip(scene.things, painting.things, strict=True):
        things.append(_tell_thing(scene, thing, segment, painting))
    relations = []
    for first, a in zip(scene.things, things, strict=True):
        for second, b in zip(scene.things, things, strict=True):
            if first is not second and first.holder is None and second.holder is None:
                relations += [[a["id"], r, b["id"]] for r in sorted(relate(first, second))]
        if first.holder is not None:
            relations.append([things[first.holder]["id"], "holds", a["id"]])
    held_out = [c.describe() for c in find_held_out(scene)]
    return {
        "place": scene.place,
        "time": scene.time,
        "light": list(TINTS[scene.time][1]),
        "horizon": round(scene.horizon, 4),
        "things": things,
        "counts": dict(sorted(Counter(t["class"] for t in things).items())),
        "relations": relations,
        "faces": sum(m is not None for m in painting.landmarks),
        "held_out": held_out,
    }


def _tell_thing(scene: Scene, thing: Thing, segment: int, painting: Painting) -> dict[str, Any]:
    mask = painting.segments == segment
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
    middle = thing.box.middle
    return {
        "id": segment,
        "class": thing.name,
        "colour": thing.colour,
        "kind": thing.kind,
        "size": thing.size,
        "depth": thing.depth,
        "side": "left" if middle < 0.36 else "right" if middle > 0.64 else "middle",
        "pose": thing.pose,
        "wears": thing.wears,
        "box": box,
        "pixels": int(mask.sum()),
        "foot": round(thing.foot, 4),
    }


def _segments_info(scene: Scene, painting: Painting) -> list[dict[str, int]]:
    present = set(np.flatnonzero(np.bincount(painting.segments.ravel())).tolist())
    names = list(painting.stuff.items())
    names += [(t.name, i) for t, i in zip(scene.things, painting.things, strict=True)]
    return [
        {"id": i, "category_id": COCO_CATEGORY_IDS[PANOPTIC_CLASSES.index(name)]}
        for name, i in names
        if i in present
    ]


def _id_colours(segments: np.ndarray) -> np.ndarray:
    """COCO's RGB coding of the ids, all of which are below 256."""
    rgb = np.zeros((*segments.shape, 3), np.uint8)
    rgb[..., 0] = segments
    return rgb


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()

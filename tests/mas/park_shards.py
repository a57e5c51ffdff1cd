"""Scene shards of a few tiny pictures of the park world."""

import io
import json

import numpy as np
from PIL import Image

from mas.scene import from_coco, merge
from mas.shards import Sample, ShardWriter
from preprocess.park_truth import picture


def to_sample(files, key, *, park=True):
    """A scene shard's sample of a park picture."""
    ids = np.array(Image.open(io.BytesIO(files["panoptic.png"])))
    segments = from_coco(ids, json.loads(files["segments.json"])["segments_info"])
    scene = merge(panoptic=segments, human=np.array(Image.open(io.BytesIO(files["human.png"]))))
    buffer = io.BytesIO()
    scene.to_png(buffer)
    content = json.loads(files["json"])
    if not park:
        del content["park"]
    return Sample(
        key,
        {
            "jpg": files["jpg"],
            "scene.png": buffer.getvalue(),
            "txt": files["txt"],
            "json": json.dumps(content).encode(),
        },
    )


def write_shard(folder, *, count=6, size=32, **options):
    folder.mkdir()
    held_out = options.pop("held_out", "exclude")
    with ShardWriter(str(folder / "00000.tar")) as writer:
        for i in range(count):
            files = picture(3, i, size=size, held_out=held_out)
            writer.write(to_sample(files, f"{i:05}", **options))
    return str(folder)

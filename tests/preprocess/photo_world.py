"""A small world of photos whose colours tell their labels, for the tests of the preprocessor."""

import io
import json

import numpy as np
from PIL import Image

from mas.scene import COCO_CATEGORY_IDS
from mas.shards import Sample, ShardWriter
from preprocess.photo import PhotoConfig
from preprocess.run import PreprocessConfig, preprocess
from preprocess.segment import FaceConfig, HumanConfig

PERSON, DOG, SKY, GRASS = 0, 16, 119, 125  # panoptic ids


def encode(image, format="JPEG", **options):
    buffer = io.BytesIO()
    options = {"quality": 97, "subsampling": 0, **options} if format == "JPEG" else options
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decode(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def colour_of(ids):
    """A colour a segment id, far apart from each other."""
    ids = np.asarray(ids)
    return np.stack([ids * 90 % 256, ids * 40 % 256, 255 - ids * 60 % 256], -1).astype(np.uint8)


def blocks(width, height, labels=(PERSON, DOG, DOG, GRASS), seed=0):
    """Segment ids 1… (H W) of overlapping boxes on sky, and the COCO category of each."""
    random = np.random.default_rng(seed)
    ids = np.ones((height, width), np.uint32)
    categories = {1: COCO_CATEGORY_IDS[SKY]}
    for number, label in enumerate(labels, start=2):
        x, y = random.integers(0, width * 2 // 3), random.integers(0, height * 2 // 3)
        ids[y : y + height // 3 + 1, x : x + width // 3 + 1] = number
        categories[number] = COCO_CATEGORY_IDS[label]
    return ids, categories


def panoptic_files(ids, categories):
    """`panoptic.png` and `segments.json` of segment ids; 0 is void."""
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    info = [{"id": int(i), "category_id": c} for i, c in categories.items() if (ids == i).any()]
    return {
        "panoptic.png": encode(Image.fromarray(rgb), "PNG"),
        "segments.json": json.dumps({"segments_info": info}).encode(),
    }


def photo_sample(key, *, width=96, height=64, seed=0, labels=(PERSON, DOG, DOG, GRASS), **files):
    """A photo in the colours of its segments, with panoptic annotation, caption and JSON."""
    ids, categories = blocks(width, height, labels, seed)
    photo = Image.fromarray(colour_of(ids))
    content = {
        "jpg": encode(photo),
        "txt": f"picture {key}".encode(),
        "json": json.dumps({"url": f"http://example.org/{key}", "width": width}).encode(),
        **panoptic_files(ids, categories),
    }
    content.update(files)
    return Sample(key, {name: value for name, value in content.items() if value is not None})


def write_photos(path, samples):
    with ShardWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return str(path)


def make_shards(folder, *, shards=3, photos=4, **options):
    """Shards 00000.tar … of photos; returns the folder."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        samples = [
            photo_sample(f"{shard:05d}{i:04d}", seed=10 * shard + i, **options)
            for i in range(photos)
        ]
        write_photos(folder / f"{shard:05d}.tar", samples)
    return folder


def tar_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def preprocess_scenes(photos, output, **options):
    """The panoptic maps that lie beside small photos, in this process."""
    return preprocess(
        PreprocessConfig(
            input=str(photos),
            output=str(output),
            photo=PhotoConfig(size=48, min_side=16),
            human=HumanConfig(source="none"),
            face=FaceConfig(source="none"),
            executor="serial",
            **options,
        )
    )

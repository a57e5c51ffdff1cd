"""Park pictures read back from their files, for the tests."""

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class Record:
    image: Image.Image
    pixels: np.ndarray  # uint8 H W 3
    ids_rgb: np.ndarray  # uint8 H W 3
    ids: np.ndarray  # int H W: segment ids
    segments_info: list[dict[str, int]]
    human: np.ndarray  # uint8 H W
    landmarks: np.ndarray  # float F 68 2
    captions: list[str]
    truth: dict[str, Any]


def decode(files: dict[str, bytes]) -> Record:
    def image(extension):
        return Image.open(io.BytesIO(files[extension]))

    ids_rgb = np.asarray(image("panoptic.png"))
    record = json.loads(files["json"])
    photo = image("jpg")
    return Record(
        image=photo,
        pixels=np.asarray(photo),
        ids_rgb=ids_rgb,
        ids=ids_rgb.astype(int) @ np.array([1, 256, 65536]),
        segments_info=json.loads(files["segments.json"])["segments_info"],
        human=np.asarray(image("human.png")),
        landmarks=np.array(json.loads(files["landmarks.json"])).reshape(-1, 68, 2),
        captions=record["captions"],
        truth=record["park"],
    )

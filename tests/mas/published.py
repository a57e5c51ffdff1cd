"""Checkpoints in the published layouts, with weights that follow from the tensors' names."""

import math
import zlib

import numpy as np
import torch

from mas.pretrained import _OWN_BUFFERS, _published_name
from mas.vqgan import VQGAN

TINY = dict(
    size=64, codes=512, code_width=64, features=64, width=32, restart=0.0
)  # of vqgan-f16-tiny


def rule_tensor(name, shape, scale=None):
    """The value that the golden vectors give the tensor `name`."""
    bits = np.random.PCG64(zlib.crc32(name.encode()))
    normal = np.random.Generator(bits).standard_normal(tuple(shape), dtype=np.float32)
    if len(shape) >= 2:
        return normal * np.float32(scale or 1 / math.sqrt(math.prod(shape[1:])))
    offset = 0 if name.endswith("bias") else 1
    return np.float32(offset) + np.float32(0.1) * normal


def rule_state(shapes, scales):
    """All tensors of `shapes` {name: shape}; LlamaGen's usage statistics are zeros."""
    return {
        name: torch.zeros(tuple(shape))
        if name == "quantize.codebook_used"
        else torch.from_numpy(rule_tensor(name, shape, scales.get(name)))
        for name, shape in shapes.items()
    }


def published_shapes(config, format):
    """{published name: shape} of the network that `config` describes."""
    with torch.device("meta"):
        state = VQGAN(config).state_dict()
    levels = len(config.multipliers)
    return {
        _published_name(name, format, levels): tuple(tensor.shape)
        for name, tensor in state.items()
        if name not in _OWN_BUFFERS
    }


def as_input(images_NHWC):
    """Bytes to the [-1, 1] pictures the vectors were computed from."""
    scaled = (images_NHWC.astype(np.float64) / 127.5 - 1).astype(np.float32)
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy())


def worst(reference, name, tensor):
    """Largest absolute deviation from the stored values of `name`."""
    found = tensor.contiguous().numpy().reshape(-1)[reference[f"{name}_idx"]]
    return np.abs(found - reference[name]).max()

"""What a program around the library may have set up, or may do with models and their results."""

import dataclasses

import pytest
import torch

from mas import MakeAScene
from mas.gpt import GPT

CAPTION = "a giraffe in the park"


@pytest.fixture
def rotary_parts(parts):
    """Parts with a GPT that has all that a newer one has."""
    options = {"rotary": True, "qk_norm": True, "gated": True}
    torch.manual_seed(1)
    return {**parts, "gpt": GPT(dataclasses.replace(parts["gpt"].config, **options))}


def digest(generation):
    tokens = [stream.tolist() for stream in generation.tokens]
    return tokens, [image.tobytes() for image in generation.images]


@pytest.fixture
def default_dtype():
    """Sets the number format that torch takes where none is named."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_another_default_number_format_changes_nothing(
    rotary_parts, precision, dtype, default_dtype
):
    model = MakeAScene(**rotary_parts, precision=precision)
    expected = digest(model.generate(CAPTION, count=2, seed=3))
    default_dtype(dtype)
    again = MakeAScene(**rotary_parts, precision=precision)
    assert digest(model.generate(CAPTION, count=2, seed=3)) == expected
    assert digest(again.generate(CAPTION, count=2, seed=3)) == expected

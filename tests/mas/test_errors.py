"""What libraries raise may have pages of text, or none at all; both become one line."""

import pickle

import huggingface_hub
import pytest
import torch

from mas.errors import first_line
from mas.model_folder import ModelError, find_folder
from mas.precision import choose_device


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (ValueError("one line"), "one line"),
        (ValueError("\n\n  the first \nand more\n"), "the first"),
        (ValueError(), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        (pickle.UnpicklingError(""), "UnpicklingError"),
    ],
)
def test_the_first_line_with_a_word_in_it_or_else_the_kind(error, wanted):
    assert first_line(error) == wanted


def refuse(*_, **__):
    raise RuntimeError


def test_a_hub_that_gives_no_reason_gets_no_traceback(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"nor found on the hub \(RuntimeError\)"):
        find_folder("someone/something")


def test_a_device_that_gives_no_reason_gets_no_traceback(monkeypatch):
    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(ValueError, match=r"cannot be used here \(RuntimeError\)"):
        choose_device("cpu")

"""Packed files are smaller, and every number comes back."""

import dataclasses
import tracemalloc
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from mas.gpt import GPT
from mas.packing import SHAPE, pack, unpack
from mas.precision import StoredGPT
from mas.rounding import SCALE, narrow
from mas.storage import StorageError, StoredTensors, save_network


def bell(*shape):
    numbers = 30 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return numbers.round().clamp(-127, 127).to(torch.int8)


def test_packing_and_unpacking_changes_nothing():
    tensors = {
        "matrix": bell(64, 256),
        "kernels": bell(16, 8, 3, 3)[:, :, :, :2],  # not contiguous
        "constant": torch.full((400,), -127, dtype=torch.int8),
        "one": bell(1),
        "none": bell(0, 3),
        "floats": torch.randn(64, 64),
        "counts": torch.arange(3),
    }
    packed = pack(tensors)
    assert {name.removesuffix(SHAPE) for name in packed.keys() - tensors.keys()} == {
        "matrix", "kernels", "constant"
    }  # fmt: skip
    for name, tensor in unpack(packed).items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name])
    assert unpack(packed).keys() == unpack(tensors).keys() == tensors.keys()


def test_bell_shaped_numbers_take_hardly_more_bits_than_they_say():
    matrix = bell(512, 512)
    shares = torch.bincount(matrix.flatten().int() + 128) / matrix.numel()
    entropy = -(shares * shares.clamp(min=1e-9).log2()).sum()
    bits = 8 * pack({"a": matrix})["a"].nbytes / matrix.numel()
    assert entropy < bits < 1.01 * entropy < 7.1


def test_a_packed_network_is_the_same_read_whole_or_one_by_one(parts, tmp_path):
    gpt = parts["gpt"]
    for name, packed in (("plain", False), ("packed", True)):
        save_network(gpt, tmp_path / name, weights="int8", packed=packed)
    stored = load_file(tmp_path / "packed/model.safetensors")
    assert any(name.endswith(SHAPE) for name in stored)
    assert unpack(stored).keys() == narrow(gpt.state_dict(), "int8").keys()
    plain, whole = (GPT.from_pretrained(tmp_path / name) for name in ("plain", "packed"))
    one_by_one = StoredGPT(tmp_path / "packed", torch.device("cpu")).tensors
    assert one_by_one.numbers == sum(p.numel() for p in gpt.parameters())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(whole.state_dict()[name], tensor)
        assert torch.equal(one_by_one[name], tensor)


def test_damaged_tensors_are_named(parts, tmp_path):
    save_network(parts["gpt"], tmp_path, weights="int8", packed=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name.removesuffix(SHAPE) for name in tensors if name.endswith(SHAPE))
    short = {name: tensors[name][:20]}
    other = {name + SHAPE: tensors[name + SHAPE] + 1}
    for change, message in ((short, "cannot be unpacked"), (other, "and its shape")):
        save_file(tensors | change, path)
        with pytest.raises(StorageError, match=f"{name} {message}"):
            GPT.from_pretrained(tmp_path)
    lost = {k: v for k, v in tensors.items() if k not in (name + SHAPE, name + SCALE)}
    save_file(lost, path)
    with pytest.raises(StorageError, match=f"wrong shape: {name}"):
        GPT.from_pretrained(tmp_path)


def test_a_small_file_does_not_unpack_into_all_memory(parts, tmp_path):
    save_network(parts["gpt"], tmp_path, weights="int8", packed=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name.removesuffix(SHAPE) for name in tensors if name.endswith(SHAPE))
    coder = zlib.compressobj(9)  # which writes repetitions, as `pack` does not
    bomb = b"".join(coder.compress(bytes(2**20)) for _ in range(64)) + coder.flush()
    packed = {name: torch.frombuffer(bytearray(bomb), dtype=torch.uint8)}
    for shape in ([2**26], [2**40, 2], [-1], [2.5]):
        save_file(tensors | packed | {name + SHAPE: torch.tensor(shape)}, path)
        tracemalloc.start()
        with pytest.raises(StorageError, match=f"{name} (cannot be unpacked|and its shape)"):
            GPT.from_pretrained(tmp_path)
        with pytest.raises(StorageError, match=f"{name}"):
            StoredTensors(tmp_path, GPT, parts["gpt"].config)
        assert tracemalloc.get_traced_memory()[1] < 2**22
        tracemalloc.stop()


def test_a_shape_of_more_numbers_than_its_bytes_hold_lets_no_config_take_memory(parts, tmp_path):
    """What the weights are said to hold is what a network may take."""
    save_network(parts["gpt"], tmp_path, weights="int8", packed=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name.removesuffix(SHAPE) for name in tensors if name.endswith(SHAPE))
    save_file(tensors | {name + SHAPE: torch.tensor([2**40, 2])}, path)
    wide = dataclasses.replace(parts["gpt"].config, text_vocabulary=2**26)
    with pytest.raises(StorageError, match=f"{name} cannot be unpacked .*too short for its shape"):
        StoredTensors(tmp_path, GPT, wide)


def test_packed_numbers_that_are_no_bytes_are_named(parts, tmp_path):
    save_network(parts["gpt"], tmp_path, weights="int8", packed=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name.removesuffix(SHAPE) for name in tensors if name.endswith(SHAPE))
    save_file(tensors | {name: tensors[name].bfloat16()}, path)
    with pytest.raises(StorageError, match=f"{name} and its shape do not fit together"):
        GPT.from_pretrained(tmp_path)

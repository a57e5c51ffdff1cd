import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mas.gpt import GPT
from mas.rounding import SCALE, from_int8, is_rounded, narrow, to_int8, widen
from mas.storage import StorageError, load_network, save_network
from mas.vqgan import VQGAN


def matrix(rows=7, columns=33):
    weight_VK = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return weight_VK * torch.logspace(-3, 2, rows)[:, None]


def test_float32_changes_nothing(parts):
    state = parts["gpt"].state_dict()
    for name, tensor in narrow(state, "float32").items():
        assert tensor is state[name]


@pytest.mark.parametrize("weights", ["float16", "int8"])
@pytest.mark.parametrize("part", ["gpt", "vqseg", "vqgan"])
def test_a_loaded_network_has_the_rounded_weights(parts, tmp_path, part, weights):
    network = parts[part]
    save_network(network, tmp_path, weights=weights)
    loaded = load_network(type(network), type(network.config), tmp_path)
    rounded = widen(narrow(network.state_dict(), weights))
    assert loaded.state_dict().keys() == network.state_dict().keys() == rounded.keys()
    for name, tensor in loaded.state_dict().items():
        original = network.state_dict()[name]
        assert torch.equal(tensor, rounded[name]) and tensor.dtype == torch.float32
        if original.ndim < 2:
            assert torch.equal(tensor, original)
        elif weights == "int8":
            before_VK, after_VK = original.flatten(1), tensor.flatten(1)
            step_V1 = before_VK.abs().amax(1, keepdim=True) / 127
            assert ((after_VK - before_VK).abs() <= 0.51 * step_V1 + 1e-12).all()
        else:
            assert torch.equal(tensor, original.half().float())


@pytest.mark.parametrize(("weights", "bytes_each"), [("float16", 2), ("int8", 1)])
@pytest.mark.parametrize("part", ["gpt", "vqseg", "vqgan"])
def test_files_become_as_small_as_they_say(parts, tmp_path, part, weights, bytes_each):
    save_network(parts[part], tmp_path, weights=weights)
    tensors = load_file(tmp_path / "model.safetensors")
    rounded = {k for k, v in parts[part].state_dict().items() if v.ndim > 1}
    assert {tensors[name].element_size() for name in rounded} == {bytes_each}
    numbers = sum(tensor.numel() for tensor in parts[part].state_dict().values())
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    assert stored < (bytes_each + (0.15 if part == "gpt" else 0.5)) * numbers


def test_rounding_twice_is_rounding_once():
    once = to_int8(matrix())
    twice = to_int8(from_int8(once))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    assert (once.integers_VK.abs().amax(1) == 127).all()


def test_a_kernel_is_rounded_like_its_flattened_matrix():
    weight_VK = matrix(rows=6, columns=3 * 2 * 2)
    flat, kernels = to_int8(weight_VK), to_int8(weight_VK.view(6, 3, 2, 2))
    assert kernels.integers_VK.shape == (6, 3, 2, 2) and kernels.scale_V.shape == (6,)
    assert torch.equal(kernels.integers_VK.flatten(1), flat.integers_VK)
    assert torch.equal(kernels.scale_V, flat.scale_V)
    assert torch.equal(from_int8(kernels).flatten(1), from_int8(flat))
    twice = to_int8(from_int8(kernels))
    assert all(torch.equal(a, b) for a, b in zip(kernels, twice, strict=True))


@pytest.mark.parametrize("weights", ["float16", "int8"])
@pytest.mark.parametrize("part", ["gpt", "vqseg", "vqgan"])
def test_a_network_is_known_as_rounded_until_one_number_changes(parts, part, weights):
    state = parts[part].state_dict()
    assert is_rounded(state, "float32") and not is_rounded(state, weights)
    rounded = widen(narrow(state, weights))
    assert is_rounded(rounded, weights)
    name = max(rounded, key=lambda name: rounded[name].ndim)
    rounded[name].view(-1)[0] += 1e-3 * rounded[name].abs().max()
    assert not is_rounded(rounded, weights)


def test_a_row_of_zeros_stays_zero():
    weight_VK = matrix()
    weight_VK[3] = 0
    assert torch.equal(from_int8(to_int8(weight_VK))[3], torch.zeros(33))


def test_int8_sampling_sees_the_same_matrices_after_storing_in_int8(parts, tmp_path):
    save_network(parts["gpt"], tmp_path, weights="int8")
    stored = GPT.from_pretrained(tmp_path).state_dict()
    matrices = {k: v for k, v in parts["gpt"].state_dict().items() if v.ndim == 2}
    assert len(matrices) == 4 * 2 + 3 + 3 + 5  # blocks, heads, embeddings, positions
    for name, original in matrices.items():
        before, after = to_int8(original), to_int8(stored[name])
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), name


def test_what_float16_cannot_hold_is_named(parts, tmp_path):
    with torch.no_grad():
        parts["gpt"].embeddings["scene"].weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"embeddings\.scene\.weight holds .* use float32"):
        save_network(parts["gpt"], tmp_path, weights="float16")
    with pytest.raises(ValueError, match="weights are 'int4', use one of float32, float16, int8"):
        save_network(parts["gpt"], tmp_path, weights="int4")
    assert not (tmp_path / "model.safetensors").exists()


def test_scales_that_do_not_fit_are_named(parts, tmp_path):
    save_network(parts["gpt"], tmp_path, weights="int8")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "blocks.0.attention.to_out.weight"
    save_file(tensors | {name + SCALE: torch.ones(5)}, path)
    with pytest.raises(StorageError, match=rf"{name} and its scales"):
        GPT.from_pretrained(tmp_path)
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    with pytest.raises(StorageError, match=f"1 missing tensors: {name}"):
        GPT.from_pretrained(tmp_path)


def test_loading_draws_no_random_numbers(tiny_folder):
    state = torch.get_rng_state()
    GPT.from_pretrained(tiny_folder / "gpt")
    VQGAN.from_pretrained(tiny_folder / "vqgan")
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_and_sampling_import_no_compiler(tiny_folder):
    code = (
        "import sys; from mas import MakeAScene; "
        "model = MakeAScene.from_pretrained(sys.argv[1], device='cpu'); "
        "model.generate('a dog'); "
        "print([m for m in ('torch._dynamo', 'sympy', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tiny_folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

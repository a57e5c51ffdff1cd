"""Steps on a GPU; what they share with a CPU is in test_cuda_decoder.py."""

import copy

import pytest
import torch

from mas.cuda_decoder import CUDADecoder
from mas.filter import Sampling
from mas.generate import Choice, generate
from mas.precision import make_decoder
from mas.sequence import FREE
from tests.mas.test_cuda_decoder import GIVEN, LAYOUT, OPTIONS, build, draw, same

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("few_keys_a_bucket"),
]


def read_both(decoder, gpt, sequence_BT):
    """States of a decoder and of a GPT behind each token after the caption, one by one."""
    count = len(sequence_BT)
    cache, plain = decoder.new_cache(count), gpt.new_cache(count)
    for network, its in ((decoder, cache), (gpt, plain)):
        network.extend(sequence_BT[:, :6], cache=its, start=0)
    for position in range(6, LAYOUT.length):
        state = decoder.read(
            sequence_BT[:, position],
            torch.tensor([position], device="cuda"),
            LAYOUT.stream_at(position),
            cache=cache,
            keys=LAYOUT.length,
        )
        piece_BT = sequence_BT[:, position : position + 1]
        yield state, gpt.extend(piece_BT, cache=plain, start=position)


@pytest.mark.parametrize("vocabulary", [20, 1000, 16384])
@pytest.mark.parametrize("branches", [("conditional",), ("conditional", "unconditional")])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_the_kernel_that_draws_takes_the_tokens_of_the_plain_choice(
    temperature, guidance, branches, vocabulary
):
    cuda_kernels = pytest.importorskip("mas.cuda_kernels")
    generator = torch.Generator().manual_seed(vocabulary)
    logits_RV = 3 * torch.randn(4 * len(branches), vocabulary, generator=generator).cuda()
    uniforms_BT = torch.rand(4, 7, dtype=torch.double, generator=generator).cuda()
    tokens_BT = torch.full((4, 7), FREE, device="cuda")
    tokens_BT[2, 3] = 5
    choice = Choice(
        stream=LAYOUT.scene,
        sampling=Sampling(guidance=guidance, temperature=temperature),
        branches=branches,
    )
    expected = choice.tokens(logits_RV, uniform_B=uniforms_BT[:, 3], given_B=tokens_BT[:, 3])
    drawn = cuda_kernels.choose(
        logits_RV,
        uniforms_BT,
        tokens_BT,
        torch.tensor([3], device="cuda"),
        taken=choice.taken,
        guidance=guidance,
        temperature=temperature,
    )
    assert torch.equal(drawn, expected.repeat(len(branches)))
    assert torch.equal(tokens_BT[:, 3], expected)


@pytest.mark.parametrize("kernels", ["torch", "triton", "persistent"])
@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["default", "all"])
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_recorded_steps_give_the_tokens_of_the_same_steps_run_one_by_one(given, options, kernels):
    gpt = build(**options).cuda()
    recorded = CUDADecoder(gpt, kernels=kernels)
    eager = CUDADecoder(gpt, kernels=kernels, graphs=False)
    for count, guidance in ((1, 3.0), (3, 1.0), (3, 3.0), (3, 3.0)):
        text_BT, scene_BT, image_BT = draw(count, seed=count)
        settings = {
            "seeds": range(count),
            "scene": Sampling(guidance=guidance, top_p=0.9),
            "image": Sampling(guidance=guidance, temperature=0.9, top_k=0.5),
            **given(scene_BT, image_BT),
        }
        expected = generate(eager, text_BT, **settings)
        assert same(generate(recorded, text_BT, **settings), expected)
        assert same(generate(recorded, text_BT, **settings), expected)
    really = "triton" if kernels == "persistent" else kernels  # one kernel knows bfloat16 only
    assert recorded.mode == f"{really} graph" and eager.mode == really
    assert recorded.idle.graphs


@pytest.mark.parametrize("kernels", ["torch", "compiled", "triton", "persistent"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("count", [2, 6])
@torch.inference_mode()
def test_steps_on_a_gpu_stay_near_the_plain_gpt(count, options, kernels):
    gpt = build(**options).cuda()
    decoder, sequence = CUDADecoder(gpt, kernels=kernels), LAYOUT.pack(*draw(count)).cuda()
    for state, expected in read_both(decoder, gpt, sequence):
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-4)


WIDE = {"width": 64, "heads": 2}  # what mas/step.cu can compute


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("count", [1, 2, 6])
@torch.inference_mode()
def test_a_step_in_one_kernel_stays_near_the_exact_gpt(count, options):
    rounded = build(**options, **WIDE).bfloat16()
    exact = copy.deepcopy(rounded).float().cuda()
    decoder, sequence = CUDADecoder(rounded.cuda(), kernels="persistent"), LAYOUT.pack(*draw(count))
    for state, expected in read_both(decoder, exact, sequence.cuda()):
        assert (state.float() - expected).norm() < 0.03 * expected.norm()
        assert decoder.mode == "persistent graph"


@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["default", "all"])
def test_recorded_steps_in_one_kernel_give_the_tokens_of_steps_run_one_by_one(options):
    gpt = build(**options, **WIDE).bfloat16().cuda()
    recorded = CUDADecoder(gpt, kernels="persistent")
    eager = CUDADecoder(gpt, kernels="persistent", graphs=False)
    for count, guidance in ((1, 3.0), (3, 1.0), (3, 3.0), (3, 3.0)):
        text_BT = draw(count, seed=count)[0]
        settings = {
            "seeds": range(count),
            "scene": Sampling(guidance=guidance),
            "image": Sampling(guidance=guidance, temperature=0.0),
        }
        expected = generate(eager, text_BT, **settings)
        assert same(generate(recorded, text_BT, **settings), expected)
    assert recorded.mode == "persistent graph" and recorded.idle.graphs


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_decoder_of_a_gpu_records_its_steps(precision):
    decoder = make_decoder(build().cuda(), precision)
    first = generate(decoder, draw(2)[0], seeds=[1, 2])
    assert same(first, generate(decoder, draw(2)[0], seeds=[1, 2]))
    assert decoder.mode.endswith("graph") and decoder.dtype == getattr(torch, precision)

import dataclasses

import pytest
import torch

from mas.filter import Sampling
from mas.generate import generate
from mas.gpt import GPT, GPTConfig
from mas.sequence import FREE, SequenceError
from mas.text import PAD

CONFIG = GPTConfig(
    layers=2,
    width=32,
    heads=4,
    text_vocabulary=40,
    scene_vocabulary=20,
    image_vocabulary=30,
    text_length=6,
    scene_grid=3,
    image_grid=4,
)
LAYOUT = CONFIG.layout
SEEDS = [11, 12, 13]


def build(**options):
    """A random network with strong opinions, so that captions and guidance matter."""
    torch.manual_seed(0)
    gpt = GPT(dataclasses.replace(CONFIG, **options)).eval().requires_grad_(False)
    for head in gpt.heads.values():
        head.weight *= 4
    return gpt


@pytest.fixture(scope="module")
def gpt():
    return build()


def captions(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text_BT = torch.randint(1, 40, (count, LAYOUT.text.length), generator=generator)
    text_BT[:, 4:] = PAD
    return text_BT


def tokens_of(stream, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(stream.vocabulary, (count, stream.length), generator=generator)


def both(**settings):
    return {"scene": Sampling(**settings), "image": Sampling(**settings)}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_free_token_is_filled_from_its_own_vocabulary(gpt):
    text_BT = captions(3)
    result = generate(gpt, text_BT, seeds=SEEDS, **both(temperature=100.0))
    assert torch.equal(result.text, text_BT)
    for stream, tokens_BT in zip(LAYOUT.streams[1:], result[1:], strict=True):
        assert tokens_BT.shape == (3, stream.length)
        assert (tokens_BT >= 0).all() and (tokens_BT < stream.vocabulary).all()
    for seed in range(30):
        result = generate(gpt, captions(1), seeds=[seed], **both(temperature=1e6))
        assert result.scene.max() < 20 and result.image.max() < 30


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(gpt):
    first = generate(gpt, captions(3), seeds=SEEDS)
    assert same(first, generate(gpt, captions(3), seeds=SEEDS))
    assert not same(first, generate(gpt, captions(3), seeds=[1, 2, 3]))


def test_a_picture_of_a_batch_of_eight_is_the_same_alone(gpt):
    text_BT = captions(8)
    text_BT[4] = text_BT[1]
    seeds = list(range(8))
    batch = generate(gpt, text_BT, seeds=seeds)
    for i in range(8):
        alone = generate(gpt, text_BT[i : i + 1], seeds=seeds[i : i + 1])
        assert all(torch.equal(b[i : i + 1], a) for b, a in zip(batch, alone, strict=True)), i


def reference(gpt, text_T, seed, sampling):
    """Sampling written down plainly: no cache, no batch, both streams computed in full."""
    from mas.filter import draw, probabilities, uniforms

    uniform_T = uniforms(seed, LAYOUT.length)
    scene, image = tokens_of(LAYOUT.scene, 1) * 0, tokens_of(LAYOUT.image, 1) * 0
    sequence = LAYOUT.pack(text_T[None], scene, image)
    for position in range(LAYOUT.scene.start, LAYOUT.length):
        stream = LAYOUT.stream_at(position)
        logits = []
        for tokens in (sequence, LAYOUT.unconditional(sequence)):
            predicted = gpt(*LAYOUT.unpack(tokens))
            logits.append(getattr(predicted, stream.name)[:, position - stream.start])
        guided = logits[1] + sampling.guidance * (logits[0] - logits[1])
        token = draw(probabilities(guided, sampling), uniform_T[position : position + 1])
        sequence[0, position] = token
    return LAYOUT.unpack(sequence)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("options", [{}, {"rotary": True, "gated": True, "qk_norm": True}])
def test_cached_batched_guided_sampling_is_the_plain_algorithm(guidance, options):
    gpt = build(**options).double()
    text_BT = captions(2)
    sampling = Sampling(guidance=guidance, top_p=0.9, temperature=1.2)
    result = generate(gpt, text_BT, seeds=SEEDS[:2], scene=sampling, image=sampling)
    for i in range(2):
        expected = reference(gpt, text_BT[i], SEEDS[i], sampling)
        assert all(torch.equal(r[i], e[0]) for r, e in zip(result, expected, strict=True))


class Counting:
    """Passes everything on and remembers how many rows each step read and which heads ran."""

    def __init__(self, gpt):
        self.gpt, self.layout, self.device = gpt, gpt.layout, gpt.device
        self.reads, self.heads = [], []

    def new_cache(self, rows, **length):
        return self.gpt.new_cache(rows, **length)

    def extend(self, tokens_BT, *, cache, start):
        self.reads.append((start, *tokens_BT.shape))
        return self.gpt.extend(tokens_BT, cache=cache, start=start)

    def head(self, x_BD, stream):
        self.heads.append(stream.name)
        return self.gpt.head(x_BD, stream)


def test_memory_of_the_prefix_is_given_back_before_the_cache_takes_its_room(gpt, monkeypatch):
    told = []

    class Telling(Counting):
        def new_cache(self, rows, **length):
            told.append(rows)
            return super().new_cache(rows, **length)

        def extend(self, *read, **options):
            told.append("read")
            return super().extend(*read, **options)

    monkeypatch.setattr("mas.generate.trim_heap", lambda: told.append("trim"))
    generate(Telling(gpt), captions(1).expand(2, -1), seeds=SEEDS[:2], **both(guidance=1.0))
    assert told[:4] == [1, "read", "trim", 2]


def test_guidance_of_one_needs_one_stream_and_equals_the_conditional_one(gpt):
    counting = Counting(gpt)
    plain = generate(counting, captions(3), seeds=SEEDS, **both(guidance=1.0))
    assert {rows for _, rows, _ in counting.reads} == {3}
    # With a guided image the scene of guidance 1 runs beside the second stream: same tokens.
    mixed = generate(
        gpt, captions(3), seeds=SEEDS, scene=Sampling(guidance=1.0), image=Sampling(guidance=3.0)
    )
    assert torch.equal(plain.scene, mixed.scene)
    assert not torch.equal(plain.image, mixed.image)


def test_guidance_of_zero_ignores_the_caption(gpt):
    a = generate(gpt, captions(2), seeds=[5, 6], **both(guidance=0.0))
    b = generate(gpt, captions(2, seed=9), seeds=[5, 6], **both(guidance=0.0))
    empty = generate(gpt, captions(2) * 0, seeds=[5, 6], **both(guidance=3.0))
    assert same(a[1:], b[1:]) and same(a[1:], empty[1:])


def test_a_negative_prompt_of_nothing_is_none(gpt):
    plain = generate(gpt, captions(3), seeds=SEEDS)
    empty = generate(gpt, captions(3), seeds=SEEDS, negative_1T=captions(1) * 0)
    assert same(plain, empty)


def test_guidance_moves_away_from_a_negative_prompt(gpt):
    """At 0 it is what is painted, at 1 it is not read, the caption itself moves nothing."""
    text_BT, negative_1T = captions(3), captions(1, seed=9)
    alone = generate(gpt, negative_1T.repeat(3, 1), seeds=SEEDS, **both(guidance=1.0))
    zero = generate(gpt, text_BT, seeds=SEEDS, negative_1T=negative_1T, **both(guidance=0.0))
    assert same(zero[1:], alone[1:])
    plain = generate(gpt, text_BT, seeds=SEEDS, **both(guidance=1.0))
    one = generate(gpt, text_BT, seeds=SEEDS, negative_1T=negative_1T, **both(guidance=1.0))
    assert same(one, plain)
    own = generate(gpt, text_BT[:1], seeds=[5], negative_1T=text_BT[:1], **both(guidance=4.0))
    first = generate(gpt, text_BT[:1], seeds=[5], **both(guidance=1.0))
    assert same(own, first)
    # The first token, drawn by hand.
    guided = {"scene": Sampling(guidance=3.0, temperature=0.0)}
    drawn = generate(gpt, text_BT, seeds=SEEDS, negative_1T=negative_1T, **guided).scene[:, 0]
    rows = torch.cat([text_BT, negative_1T])
    state_RD = gpt.extend(rows, cache=gpt.new_cache(4), start=0)
    logits_RV = gpt.head(state_RD, LAYOUT.scene)
    by_hand = (logits_RV[3] + 3 * (logits_RV[:3] - logits_RV[3])).argmax(1)
    assert torch.equal(drawn, by_hand)


def test_a_negative_prompt_needs_no_caption_and_is_read_once(gpt):
    negative_1T = captions(1, seed=9)
    counting = Counting(gpt)
    nothing = captions(3) * 0
    apart = generate(counting, nothing, seeds=SEEDS, negative_1T=negative_1T)
    assert counting.reads[0] == (0, 2, LAYOUT.text.length)
    assert not same(apart[1:], generate(gpt, nothing, seeds=SEEDS)[1:])
    scene_BT = tokens_of(LAYOUT.scene, 3)
    given = generate(gpt, captions(3), seeds=SEEDS, scene_BT=scene_BT, negative_1T=negative_1T)
    assert torch.equal(given.scene, scene_BT)
    other = generate(gpt, captions(3), seeds=SEEDS, scene_BT=scene_BT)
    assert not torch.equal(given.image, other.image)


@pytest.mark.parametrize("negative_1T", [torch.zeros(1, 5).long(), torch.full((1, 6), 40)])
def test_a_negative_prompt_that_is_none_is_refused(gpt, negative_1T):
    with pytest.raises(SequenceError, match="text token"):
        generate(gpt, captions(3), seeds=SEEDS, negative_1T=negative_1T)


def test_guidance_changes_the_result(gpt):
    a = generate(gpt, captions(2), seeds=[5, 6], **both(guidance=1.0))
    b = generate(gpt, captions(2), seeds=[5, 6], **both(guidance=4.0))
    assert not same(a, b)


def test_a_shared_prefix_is_read_once_and_changes_nothing(gpt):
    same_caption = captions(1).repeat(4, 1)
    counting = Counting(gpt)
    shared = generate(counting, same_caption, seeds=[1, 2, 3, 4])
    # One caption and one unconditional prefix; then both streams of four pictures.
    assert counting.reads[0] == (0, 2, LAYOUT.text.length)
    assert {rows for _, rows, _ in counting.reads[1:]} == {8}
    for i in range(4):
        alone = generate(gpt, same_caption[:1], seeds=[i + 1])
        assert all(torch.equal(s[i : i + 1], a) for s, a in zip(shared, alone, strict=True))


def test_only_the_head_of_the_current_stream_is_computed(gpt):
    counting = Counting(gpt)
    generate(counting, captions(1), seeds=[0])
    assert counting.heads == ["scene"] * LAYOUT.scene.length + ["image"] * LAYOUT.image.length


def test_a_given_scene_is_kept_read_at_once_and_steers_the_image(gpt):
    scene_BT = tokens_of(LAYOUT.scene, 2)
    counting = Counting(gpt)
    result = generate(counting, captions(2), seeds=[1, 2], scene_BT=scene_BT)
    assert torch.equal(result.scene, scene_BT)
    assert counting.reads[0] == (0, 4, LAYOUT.image.start)
    assert len(counting.reads) == LAYOUT.image.length
    other = generate(gpt, captions(2), seeds=[1, 2], scene_BT=(scene_BT + 1) % 20)
    assert not torch.equal(result.image, other.image)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_forced_tokens_are_never_changed_wherever_they_stand(gpt, share):
    text_BT = captions(3)
    generator = torch.Generator().manual_seed(1)
    given = []
    for stream in LAYOUT.streams[1:]:
        tokens_BT = tokens_of(stream, 3)
        tokens_BT[torch.rand(tokens_BT.shape, generator=generator) > share] = FREE
        given.append(tokens_BT)
    batch = generate(gpt, text_BT, seeds=SEEDS, scene_BT=given[0], image_BT=given[1])
    for tokens_BT, result_BT in zip(given, batch[1:], strict=True):
        assert torch.equal(result_BT[tokens_BT != FREE], tokens_BT[tokens_BT != FREE])
        assert (result_BT != FREE).all()
    # Rows with different patterns do not disturb each other.
    for i in range(3):
        one = slice(i, i + 1)
        alone = generate(
            gpt, text_BT[one], seeds=SEEDS[one], scene_BT=given[0][one], image_BT=given[1][one]
        )
        assert all(torch.equal(b[one], a) for b, a in zip(batch, alone, strict=True))


def test_forcing_what_would_have_been_drawn_changes_nothing(gpt):
    free = generate(gpt, captions(2), seeds=[1, 2])
    scene_BT = free.scene.clone()
    scene_BT[:, 2:5] = FREE
    forced = generate(gpt, captions(2), seeds=[1, 2], scene_BT=scene_BT)
    assert same(free, forced)


def test_everything_before_the_first_free_token_is_independent_of_the_seed(gpt):
    scene_BT = tokens_of(LAYOUT.scene, 1)
    scene_BT[:, 4:] = FREE
    results = [generate(gpt, captions(1), seeds=[s], scene_BT=scene_BT).scene for s in range(6)]
    assert all(torch.equal(r[:, :4], scene_BT[:, :4]) for r in results)
    assert len({tuple(r[0, 4:].tolist()) for r in results}) > 1


def test_a_complete_sequence_comes_back_without_the_network(gpt):
    given = [tokens_of(stream, 2) for stream in LAYOUT.streams[1:]]
    counting = Counting(gpt)
    result = generate(counting, captions(2), seeds=[1, 2], scene_BT=given[0], image_BT=given[1])
    assert same(result[1:], given) and not counting.reads


def test_progress_is_reported_up_to_the_end(gpt):
    free = []

    def report(given_BT, tokens_BT):
        assert torch.equal(tokens_BT[given_BT != FREE], given_BT[given_BT != FREE])
        free.append(int((tokens_BT == FREE).sum()))

    scene_BT = tokens_of(LAYOUT.scene, 2)
    scene_BT[:, 5] = FREE
    generate(gpt, captions(2), seeds=[1, 2], scene_BT=scene_BT, on_progress=report)
    assert free == [2 * n for n in range(LAYOUT.image.length, -1, -1)]


def test_bad_input_is_named(gpt):
    with pytest.raises(ValueError, match="2 captions and 1 seeds"):
        generate(gpt, captions(2), seeds=[1])
    with pytest.raises(SequenceError, match="scene tokens must be 2 x 9"):
        generate(gpt, captions(2), seeds=[1, 2], scene_BT=tokens_of(LAYOUT.image, 2))
    broken = build()
    broken.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="computes NaN"):
        generate(broken, captions(1), seeds=[1])

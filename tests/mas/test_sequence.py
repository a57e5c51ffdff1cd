import pytest
import torch

from mas.sequence import FREE, Layout, SequenceError
from mas.text import PAD

LAYOUT = Layout(
    text_vocabulary=300,
    scene_vocabulary=20,
    image_vocabulary=30,
    text_length=8,
    scene_grid=3,
    image_grid=4,
)


def draw(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(s.vocabulary, (count, s.length), generator=generator) for s in LAYOUT.streams
    ]


def test_the_streams_cover_the_sequence_without_gap_or_overlap():
    positions = [p for stream in LAYOUT.streams for p in range(stream.start, stream.stop)]
    assert positions == list(range(LAYOUT.length)) == list(range(8 + 9 + 16))
    for stream in LAYOUT.streams:
        assert LAYOUT.stream_at(stream.start) is stream
        assert LAYOUT.stream_at(stream.stop - 1) is stream


def test_unpacking_undoes_packing():
    tokens = draw(3)
    sequence = LAYOUT.pack(*tokens)
    assert sequence.shape == (3, LAYOUT.length)
    for unpacked, original in zip(LAYOUT.unpack(sequence), tokens, strict=True):
        assert torch.equal(unpacked, original)


def test_free_tokens_survive_packing_but_text_is_never_free():
    text, scene, image = draw(2)
    scene[:, 3:] = FREE
    sequence = LAYOUT.pack(text, scene, LAYOUT.free(LAYOUT.image, 2))
    assert (sequence == FREE).sum() == 2 * (6 + 16)
    text[0, 2] = FREE
    with pytest.raises(SequenceError, match="text token -1"):
        LAYOUT.pack(text, scene, image)


def test_the_unconditional_sequence_differs_in_nothing_but_the_caption():
    sequence = LAYOUT.pack(*draw(2))
    text, scene, image = LAYOUT.unpack(LAYOUT.unconditional(sequence))
    assert (text == PAD).all()
    assert torch.equal(scene, draw(2)[1]) and torch.equal(image, draw(2)[2])


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_token_out_of_its_vocabulary_and_a_wrong_length_are_named(stream):
    name = LAYOUT.streams[stream].name
    tokens = draw(2)
    tokens[stream][1, 1] = LAYOUT.streams[stream].vocabulary
    with pytest.raises(SequenceError, match=f"{name} token"):
        LAYOUT.pack(*tokens)
    tokens = draw(2)
    tokens[stream] = tokens[stream][:, 1:]
    with pytest.raises(SequenceError, match=f"{name} tokens must be 2 x"):
        LAYOUT.pack(*tokens)

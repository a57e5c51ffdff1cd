import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

import mas.gpt
from mas.gpt import GPT, GPTConfig, rotation_table
from mas.storage import StorageError
from mas.text import PAD

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = GPTConfig(
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
OPTIONS = {
    "default": {},
    "qk_norm": {"qk_norm": True},
    "gated": {"gated": True},
    "rotary": {"rotary": True},
    "all": {"qk_norm": True, "gated": True, "rotary": True},
}


def build(seed=0, **options):
    torch.manual_seed(seed)
    return GPT(dataclasses.replace(TINY, **options)).double().eval()


def draw(layout, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, stream.vocabulary, (count, stream.length), generator=generator)
        for stream in layout.streams
    ]


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def test_the_default_config_is_the_270m_model():
    assert 265e6 < parameters(GPTConfig()) < 280e6


@pytest.mark.parametrize(
    ("name", "millions"), [("small", 25), ("base", 271), ("1b", 1046), ("4b", 3949)]
)
def test_every_shipped_size_builds_on_the_meta_device_and_has_the_size_it_claims(name, millions):
    content = yaml.safe_load((CONFIGS / name / "gpt.yaml").read_text("utf-8"))
    config = GPTConfig(**content["model"]["network"])
    assert abs(parameters(config) / 1e6 - millions) < 1
    vocabularies = {"text_vocabulary": 16384, "scene_vocabulary": 1024, "image_vocabulary": 16384}
    assert vars(config).items() >= vocabularies.items()  # all train on the same token shards
    if name == "4b":
        assert (config.layers, config.width, config.heads) == (48, 2560, 40)


def test_options_keep_the_size_within_one_percent():
    plain = parameters(GPTConfig())
    for options in OPTIONS.values():
        assert abs(parameters(GPTConfig(**options)) / plain - 1) < 0.01


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_future_tokens_cannot_change_past_logits(options):
    gpt = build(**options)
    layout = gpt.layout
    tokens = draw(layout, 1)
    before = [logits[0] for logits in gpt(*tokens)]
    changed_position = {"text": 1, "scene": layout.scene.start, "image": layout.image.start}
    positions = sorted(
        {*changed_position.values(), *(p + 1 for p in changed_position.values()), 3, 12, 30}
    )
    for position in positions:
        sequence = layout.pack(*tokens)
        stream = layout.stream_at(position)
        sequence[0, position] = (sequence[0, position] + 1) % stream.vocabulary
        after = [logits[0] for logits in gpt(*layout.unpack(sequence))]
        # Logits at index i of the sequence predict token i + 1; text begins with its second token.
        offset = 1
        for a, b in zip(before, after, strict=True):
            for index in range(len(a)):
                if offset + index <= position:
                    assert torch.equal(a[index], b[index]), (position, offset + index)
            offset += len(a)
        if position + 1 < layout.length:
            assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("prefix", [1, 6, 10, 15, 20])
def test_cached_and_uncached_logits_agree_at_every_position(options, prefix):
    gpt = build(**options)
    layout = gpt.layout
    tokens = draw(layout, 2)
    whole = gpt(*tokens)
    expected = [
        (stream, whole[index][:, position - stream.start - (stream is layout.text)])
        for index, stream in enumerate(layout.streams)
        for position in range(max(stream.start, 1), stream.stop)
    ]
    sequence = layout.pack(*tokens)
    cache = gpt.new_cache(2)
    state = gpt.extend(sequence[:, :prefix], cache=cache, start=0)
    for position in range(prefix, layout.length):
        stream, logits = expected[position - 1]
        assert stream is layout.stream_at(position)
        torch.testing.assert_close(gpt.head(state, stream), logits, rtol=0, atol=1e-10)
        state = gpt.extend(sequence[:, position : position + 1], cache=cache, start=position)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_several_tokens_after_a_prefix_give_the_state_of_single_steps(options):
    gpt = build(**options)
    sequence = gpt.layout.pack(*draw(gpt.layout, 2))
    at_once, single = gpt.new_cache(2), gpt.new_cache(2)
    for cache in (at_once, single):
        gpt.extend(sequence[:, :4], cache=cache, start=0)
    a = gpt.extend(sequence[:, 4:18], cache=at_once, start=4)
    for position in range(4, 18):
        b = gpt.extend(sequence[:, position : position + 1], cache=single, start=position)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_losses_are_the_cross_entropy_of_the_logits_without_padding():
    gpt = build()
    text, scene, image = draw(gpt.layout, 3)
    text[0, 3:] = PAD
    losses = gpt.losses(text, scene, image)
    logits = gpt(text, scene, image)
    for name, targets, ignored in (
        ("text", text[:, 1:], PAD),
        ("scene", scene, -100),
        ("image", image, -100),
    ):
        predicted = getattr(logits, name).flatten(0, 1).float()
        expected = F.cross_entropy(predicted, targets.flatten(), ignore_index=ignored)
        torch.testing.assert_close(getattr(losses, name), expected, rtol=1e-6, atol=0)
        counted = targets != ignored
        hits = (getattr(logits, name).argmax(-1) == targets)[counted].float().mean()
        torch.testing.assert_close(getattr(losses, f"{name}_accuracy"), hits)


def test_without_its_text_head_a_gpt_says_the_same_of_scene_and_image(tmp_path):
    whole = GPT(TINY).eval()
    without = whole.without_text_head()
    assert without.state_dict().keys() == whole.state_dict().keys() - {"heads.text.weight"}
    without.save_pretrained(tmp_path)
    tokens = draw(whole.layout, 3)
    expected, losses = whole(*tokens), whole.losses(*tokens)
    for gpt in (without, GPT.from_pretrained(tmp_path)):
        assert not gpt.config.text_head
        found, again = gpt(*tokens), gpt.losses(*tokens)
        assert found.text.shape[-1] == again.text == again.text_accuracy == 0
        assert torch.equal(found.scene, expected.scene) and torch.equal(found.image, expected.image)
        assert again.scene == losses.scene and again.image == losses.image


def test_a_batch_of_padding_only_has_no_text_loss():
    gpt = build()
    text, scene, image = draw(gpt.layout, 2)
    losses = gpt.losses(torch.full_like(text, PAD), scene, image)
    assert losses.text == 0 and losses.scene > 0


def test_the_loss_in_pieces_has_the_values_and_gradients_of_the_whole(monkeypatch):
    results = []
    for at_once in (2**26, 70):
        monkeypatch.setattr(mas.gpt, "LOGITS_AT_ONCE", at_once)
        gpt = build()
        losses = gpt.losses(*draw(gpt.layout, 3))
        (losses.text + losses.scene + losses.image).backward()
        gradients = torch.cat([p.grad.flatten() for p in gpt.parameters()])
        results.append((losses, gradients))
    for whole, piecewise in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(whole, piecewise, rtol=1e-6, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_checkpointed_blocks_give_the_same_gradients_and_keep_less(options):
    results = []
    for checkpointed in (False, True):
        gpt = build(dropout=0.3, **options).train()
        gpt.checkpoint_blocks = checkpointed
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = gpt.losses(*draw(gpt.layout, 3))
        sum(losses[:3]).backward()
        results.append((torch.cat([p.grad.flatten() for p in gpt.parameters()]), sum(kept)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-12)
    assert results[1][1] < 0.5 * results[0][1]


def test_a_fresh_network_predicts_nearly_uniformly_and_keeps_its_scale_with_depth():
    for layers in (2, 12):
        torch.manual_seed(0)
        gpt = GPT(dataclasses.replace(TINY, layers=layers, width=128)).eval()
        losses = gpt.losses(*draw(gpt.layout, 8))
        for loss, stream in zip(losses[:3], gpt.layout.streams, strict=True):
            assert abs(loss.item() - torch.tensor(float(stream.vocabulary)).log().item()) < 0.6


def test_a_tiny_gpt_overfits_one_batch():
    torch.manual_seed(0)
    gpt = GPT(TINY)
    tokens = draw(gpt.layout, 4)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=5e-3)
    for _ in range(150):
        losses = gpt.losses(*tokens)
        optimizer.zero_grad()
        (losses.text + losses.scene + losses.image).backward()
        optimizer.step()
    assert losses.scene < 0.1 and losses.image < 0.1
    assert losses.scene_accuracy == 1 and losses.image_accuracy == 1


def test_rotation_puts_scene_and_image_cells_of_one_place_together():
    gpt = GPT(dataclasses.replace(TINY, rotary=True, scene_grid=2, image_grid=4))
    layout = gpt.layout
    angles = rotation_table(gpt.config, torch.zeros(1)).cosine
    scene = angles[layout.scene.start :][: layout.scene.length].unflatten(0, (2, 2))
    image = angles[layout.image.start :][: layout.image.length].unflatten(0, (4, 4))
    # The centre of a scene cell is the middle of the four image cells it covers: nearer to each of
    # them than the centre of any other scene cell.
    for row in range(4):
        for column in range(4):
            away = (scene - image[row, column]).square().sum(-1).flatten()
            assert int(away.argmin()) == row // 2 * 2 + column // 2


def test_saved_and_loaded_networks_agree_and_unknown_keys_are_refused(tmp_path):
    torch.manual_seed(0)
    gpt = GPT(dataclasses.replace(TINY, rotary=True)).eval()
    gpt.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == gpt.config
    tokens = draw(gpt.layout, 1)
    for a, b in zip(gpt(*tokens), loaded(*tokens), strict=True):
        assert torch.equal(a, b)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"layers"', '"layerz": 1, "layers"'))
    with pytest.raises(StorageError, match="layerz"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"heads": 5}, "not a multiple"),
        ({"layers": 0}, "layers is 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"heads": 16, "rotary": True}, "rotary needs"),
    ],
)
def test_impossible_sizes_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **option)

"""VQ-SEG: its loss, its decisions, its interface, and that it learns."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mas.scene import CHANNELS, CLASSES, EDGE_CHANNEL, FACE_IDS, VOID, find_edges
from mas.storage import StorageError
from mas.vqseg import (
    VQSEG,
    VQSEGConfig,
    draw_pixels,
    find_changes,
    fold_patches,
    join_edges,
    one_hot,
)
from mas.vqseg_loss import choose_pixels, decide, positive_weights, scene_loss

TINY = dict(size=16, grid=4, codes=16, code_width=4, patch=2, width=16, groups=4)
PUBLISHED = dict(layout="published", patch=1, multipliers=(1, 1, 2), middle=True)


def network(**changes):
    torch.manual_seed(0)
    return VQSEG(VQSEGConfig(**{**TINY, **changes}))


def scenes(count=2, size=16, seed=0):
    """Random labels with void and every face part, random edges."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count, size, size), generator=generator)
    labels[:, 0] = VOID
    labels[:, 1, :5] = torch.tensor(list(FACE_IDS))
    edges = torch.rand(count, size, size, generator=generator) < 0.2
    return labels.to(torch.uint8), edges


def squares(count, size=16, seed=0):
    """Scenes that can be learnt: a square on a ground of another class, which is cut in two."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.full((count, size, size), 20, dtype=torch.uint8)
    edges = torch.zeros(count, size, size, dtype=torch.bool)
    for index in range(count):
        row, column = torch.randint(1, size // 2, (2,), generator=generator).tolist()
        side = size // 3
        edges[index, :, size - 3] = True
        labels[index, row : row + side, column : column + side] = 40 + index % 3
    return labels, edges


@pytest.mark.parametrize("pixels_at_once", [7, 4096])
def test_fused_loss_equals_the_dense_one_in_value_and_gradients(pixels_at_once):
    generator = torch.Generator().manual_seed(1)
    labels, edges = scenes(seed=4)
    features = torch.randn(labels.numel(), 6, generator=generator, dtype=torch.double) * 3
    weight = torch.randn(CHANNELS, 6, generator=generator, dtype=torch.double)
    bias = torch.randn(CHANNELS, generator=generator, dtype=torch.double)
    inputs = [x.requires_grad_() for x in (features, weight, bias)]

    target = torch.zeros(labels.numel(), CHANNELS, dtype=torch.double)
    for pixel, (label, edge) in enumerate(
        zip(labels.flatten().tolist(), edges.flatten(), strict=True)
    ):
        if label != VOID:
            target[pixel, label] = 1
        target[pixel, EDGE_CHANNEL] = edge
    weights = torch.ones(CHANNELS, dtype=torch.double)
    weights[152:157] = 20
    dense = F.binary_cross_entropy_with_logits(
        F.linear(features, weight, bias), target, pos_weight=weights, reduction="sum"
    )
    expected = torch.autograd.grad(2 * dense / labels.numel(), inputs)

    fused = scene_loss(
        features,
        weight,
        bias,
        labels_P=labels.flatten(),
        edges_P=edges.flatten(),
        face_weight=20.0,
        pixels_at_once=pixels_at_once,
    )
    torch.testing.assert_close(fused, dense / labels.numel(), rtol=1e-12, atol=0)
    for found, right in zip(torch.autograd.grad(2 * fused, inputs), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


def test_a_cpu_keeps_the_logits_in_its_cache_and_a_gpu_few_kernels_busy():
    pixels = {name: choose_pixels(torch.device(name)) for name in ("cpu", "cuda")}
    assert pixels["cpu"] * CHANNELS * 4 < 4e6
    assert 16 * 128 * 128 <= pixels["cuda"] and pixels["cuda"] * CHANNELS * 4 < 2e8


def test_fused_loss_stays_exact_for_extreme_logits():
    features = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight, bias = torch.zeros(CHANNELS, 1), torch.full((CHANNELS,), -1e4)
    weight[3], weight[155] = 2e4, 2e4
    found = scene_loss(
        features,
        weight,
        bias,
        labels_P=torch.tensor([3, 155], dtype=torch.uint8),
        edges_P=torch.zeros(2, dtype=torch.bool),
        face_weight=20.0,
    )
    assert found == 1e4  # each pixel has one wrong channel, at logit 1e4
    found.backward()
    assert features.grad.isfinite().all()


def test_fused_loss_without_gradient_equals_with():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    layer = nn.Linear(4, CHANNELS)
    labels, edges = scenes()
    arguments = dict(labels_P=labels.flatten()[:50], edges_P=edges.flatten()[:50], face_weight=20.0)
    with torch.no_grad():
        without = scene_loss(features, layer.weight, layer.bias, **arguments)
    assert not without.requires_grad
    assert without == scene_loss(features, layer.weight, layer.bias, **arguments)


def test_void_pixels_have_no_positive_target_but_all_negatives():
    bias = torch.zeros(CHANNELS, requires_grad=True)
    loss = scene_loss(
        torch.zeros(1, 2),
        torch.zeros(CHANNELS, 2),
        bias,
        labels_P=torch.tensor([VOID], dtype=torch.uint8),
        edges_P=torch.tensor([False]),
        face_weight=20.0,
    )
    loss.backward()
    torch.testing.assert_close(bias.grad, torch.full((CHANNELS,), 0.5))


def test_the_networks_loss_is_that_of_its_decoded_logits():
    labels, edges = scenes()
    for changes in ({}, PUBLISHED):
        vqseg = network(**changes).eval()
        with torch.no_grad():
            losses = vqseg.loss(labels, edges)
            dense = F.binary_cross_entropy_with_logits(
                vqseg.decode_logits(losses.tokens_BT),
                one_hot(labels, edges),
                pos_weight=positive_weights(20.0)[:, None, None],
                reduction="sum",
            )
        torch.testing.assert_close(losses.reconstruction, dense / labels.numel())
        torch.testing.assert_close(losses.total, losses.reconstruction + losses.codebook)


def test_one_hot_has_the_label_unless_void_and_the_edge():
    labels, edges = scenes()
    target = one_hot(labels, edges)
    assert target.shape == (2, CHANNELS, 16, 16)
    assert torch.equal(target[:, EDGE_CHANNEL].bool(), edges)
    assert torch.equal(target[:, :CLASSES].sum(1), (labels != VOID).float())
    assert torch.equal(target[:, :CLASSES].argmax(1)[labels != VOID], labels[labels != VOID].long())


def test_patches_are_folded_row_by_row():
    pixels = torch.arange(16).reshape(1, 4, 4)
    folded = fold_patches(pixels, 2)
    assert folded.shape == (1, 2, 2, 4)
    assert folded[0, 0, 1].tolist() == [2, 3, 6, 7]


def test_a_pixel_sees_its_own_label_at_its_own_place():
    """Stem and head agree on the order of a patch's pixels: gradients stay inside the patch."""
    vqseg = network()
    hidden = torch.randn(1, 16, 8, 8, requires_grad=True)
    features = vqseg.head(hidden)
    features[
        fold_patches(torch.arange(256).reshape(1, 16, 16), 2).flatten() == 16 * 5 + 9
    ].sum().backward()
    assert hidden.grad.abs().sum(1)[0].nonzero().tolist() == [[2, 4]]


def test_a_pixel_is_void_where_that_is_more_probable_than_all_classes_together():
    logits = torch.full((4, CHANNELS), -20.0)
    logits[0, 7] = 2.0  # certain enough
    logits[2, [3, 9]] = torch.logit(torch.tensor([0.30, 0.25]))  # divided, yet surely something
    logits[3, [3, 9]] = torch.logit(torch.tensor([0.25, 0.20]))  # most probably nothing
    logits[:2, EDGE_CHANNEL] = 30.0  # an edge is no label
    labels, edges = decide(logits)
    assert labels.tolist() == [7, VOID, 3, VOID]
    assert edges.tolist() == [True, True, False, False]


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_pixels_are_drawn_by_the_rarity_of_their_class(balance):
    torch.manual_seed(0)
    labels = torch.cat([torch.full((90_000,), 3), torch.full((10_000,), 7)]).to(torch.uint8)
    drawn = draw_pixels(labels, 0.1, balance=balance)
    assert len(drawn) == pytest.approx(10_000, rel=0.05)
    rare = (labels[drawn] == 7).sum().item() / len(drawn)
    ratio = 9 ** (balance - 1)  # of rare to frequent pixels drawn
    assert rare == pytest.approx(ratio / (1 + ratio), rel=0.1)


def test_only_training_steps_draw_pixels():
    labels, edges = scenes()

    def reconstruction(*, training, **changes):
        part = network(**changes).train(training)
        torch.manual_seed(1)
        return part.loss(labels, edges).reconstruction.item()

    few = dict(pixels=0.5, balance=0.5)
    assert reconstruction(training=False, **few) == reconstruction(training=False)
    assert reconstruction(training=True, **few) == reconstruction(training=True, **few)
    assert reconstruction(training=True, **few) != reconstruction(training=True)


@pytest.mark.parametrize("changes", [{}, {"quantizer": "nearest"}, PUBLISHED])
def test_tokens_and_scenes_have_the_promised_form(changes):
    vqseg = network(**changes).eval()
    labels, edges = scenes(5)
    tokens = vqseg.encode(labels, edges)
    assert tokens.shape == (5, 16) and tokens.dtype == torch.long
    back_labels, back_edges = vqseg.decode(tokens)
    assert back_labels.shape == labels.shape and back_labels.dtype == torch.uint8
    assert back_edges.shape == edges.shape and back_edges.dtype == torch.bool
    assert ((back_labels < CLASSES) | (back_labels == VOID)).all()
    logits = vqseg.decode_logits(tokens)
    assert logits.shape == (5, CHANNELS, 16, 16)
    flat_labels, flat_edges = decide(logits.permute(0, 2, 3, 1).reshape(-1, CHANNELS))
    assert torch.equal(flat_labels.reshape(labels.shape), back_labels)
    changes = torch.from_numpy(np.stack([find_edges(label) for label in back_labels.numpy()]))
    assert torch.equal(join_edges(flat_edges.reshape(edges.shape), changes), back_edges)


def test_an_edge_between_instances_is_kept_and_a_doubled_outline_is_not():
    labels = torch.full((1, 12, 20), 20, dtype=torch.uint8)
    labels[:, 3:9, 4:16] = 40  # two things side by side
    changes = find_changes(labels)
    between = torch.zeros_like(changes)
    between[:, 3:9, 9] = True  # from outline to outline
    doubled = torch.zeros_like(changes)
    doubled[:, 3, 5:15] = True  # a pixel below the upper outline, one to the left of the left one
    doubled[:, 3:9, 2] = True
    assert torch.equal(join_edges(between, changes), between | changes)
    assert torch.equal(join_edges(doubled, changes), changes)
    # Both at once: at the crossing a pixel or two of the doubled line stay.
    joined = join_edges(doubled | between, changes)
    assert (joined & between).sum() == between.sum()
    assert (joined & ~between & ~changes).sum() <= 4


def test_training_reaches_every_parameter():
    for changes in ({}, {"middle": True, "attention": (1,)}, PUBLISHED):
        vqseg = network(**changes)
        for _ in range(2):  # residual blocks start as the identity: their inside moves second
            vqseg.zero_grad()
            vqseg.loss(*scenes(4)).total.backward()
            with torch.no_grad():
                for parameter in vqseg.parameters():
                    if parameter.requires_grad:
                        parameter -= 0.01 * parameter.grad
        still = [
            name
            for name, x in vqseg.named_parameters()
            if x.grad is None or not x.grad.abs().sum() > 0
        ]
        # Codes are running means here; a constant added to all keys changes no softmax.
        assert {name for name in still if not name.endswith("key.bias")} == {"quantizer.codebook"}


def test_a_short_training_brings_labels_edges_and_void_back():
    labels, edges = squares(6)
    labels[:, 14:] = VOID
    vqseg = network(width=32, codes=64)
    optimizer = torch.optim.Adam(vqseg.parameters(), lr=5e-3)
    for _ in range(250):
        losses = vqseg.loss(labels, edges)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    vqseg.eval()
    back_labels, back_edges = vqseg.decode(vqseg.encode(labels, edges))
    assert (back_labels == labels).float().mean() > 0.98
    assert (back_labels == VOID)[labels == VOID].float().mean() > 0.98
    wanted = edges | find_changes(labels)
    assert (back_edges & wanted).sum() / (back_edges | wanted).sum() > 0.9
    inside = edges & ~find_changes(labels)  # only the edge channel can tell these
    assert inside.sum() > 50 and back_edges[inside].float().mean() > 0.9


def test_saved_and_loaded_networks_agree(tmp_path):
    vqseg = network()
    vqseg.loss(*scenes())
    vqseg.save_pretrained(tmp_path)
    again = VQSEG.from_pretrained(tmp_path)
    vqseg.eval()
    tokens = vqseg.encode(*scenes())
    assert again.config == vqseg.config and not again.training
    assert torch.equal(tokens, again.encode(*scenes()))
    for here, there in zip(vqseg.decode(tokens), again.decode(tokens), strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_weights_are_refused_by_name(value, tmp_path):
    broken = network()
    with torch.no_grad():
        broken.decoder.norm.bias[2] = value
    broken.save_pretrained(tmp_path)
    with pytest.raises(StorageError, match=r"NaN or infinity in 1 tensors.*decoder\.norm\.bias"):
        VQSEG.from_pretrained(tmp_path)


def test_unknown_config_keys_are_refused_by_name(tmp_path):
    network().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "pach": 4}))
    with pytest.raises(StorageError, match="pach"):
        VQSEG.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("size", "grid", "patch", "multipliers"),
    [(64, 8, 8, (1,)), (64, 8, 4, (1, 2)), (128, 16, 4, (1, 2)), (256, 16, 8, (1, 2))],
)
def test_usual_sizes_and_grids_are_possible(size, grid, patch, multipliers):
    with torch.device("meta"):
        VQSEG(VQSEGConfig(size=size, grid=grid, patch=patch, multipliers=multipliers))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 2**30}, "size is 1073741824, use 4096 pixels a side or fewer"),
        ({"size": 20}, "size 20 must be grid 4 x 4"),
        ({"grid": 8}, "size 16 must be grid 8 x 4"),
        ({"layout": "paper"}, "layout 'paper': use one of default, published"),
        ({"layout": "published"}, "set patch to 1, not 2"),
        ({"quantizer": "gumbel"}, "quantizer 'gumbel': use one of nearest, cosine"),
        ({"codes": 0}, "codes must be at least 1"),
        ({"hidden": -1}, "hidden is -1"),
        ({**PUBLISHED, "hidden": 8}, "0 in the published layout"),
        ({"pixels": 0.0}, "pixels must be above 0"),
        ({"balance": 0.5}, "balance needs pixels to draw from"),
        ({**PUBLISHED, "pixels": 0.5}, "set pixels to 1"),
    ],
)
def test_impossible_configs_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        network(**changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, e: (x[:, :8], e[:, :8]), "takes scene maps B x 16 x 16, got 2 x 8 x 16"),
        (lambda x, e: (x[0], e[0]), "got 16 x 16"),
        (lambda x, e: (x.long(), e), "labels must be uint8, got torch.int64"),
        (lambda x, e: (x, e.float()), "edges must be bool"),
        (lambda x, e: (x, e[:1]), "edges must be bool"),
        (lambda x, e: (x.fill_(157), e), r"unknown class ids \[157\]"),
    ],
)
def test_impossible_scenes_are_refused(change, words):
    for method in (network().encode, network().loss):
        with pytest.raises(ValueError, match=words):
            method(*change(*scenes()))

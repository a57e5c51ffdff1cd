import io
import json
import shutil

import numpy as np
import pytest
import torch
from photo_world import encode, make_shards, photo_sample, write_photos
from PIL import Image

from mas.scene import CLASS_NAMES, SceneMap
from mas.shards import Sample, ShardError, TokenShards, read_captions, read_shard
from mas.text import Tokenizer
from mas.vqgan import VQGAN, VQGANConfig
from mas.vqseg import VQSEG, VQSEGConfig
from preprocess.inspect import read_pair
from preprocess.photo import PhotoConfig
from preprocess.run import PreprocessConfig, preprocess
from preprocess.segment import FaceConfig, HumanConfig
from preprocess.tokens import TokenizeConfig, tokenize

SIZE = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scene shards of 48 pixels and tiny tokenizers of 32; one photo has three captions."""
    folder = tmp_path_factory.mktemp("tokens")
    photos = make_shards(folder / "photos", shards=2, photos=3)
    captions = json.dumps({"captions": ["one dog", "a dog", "grass and sky"]}).encode()
    samples = [photo_sample("a"), photo_sample("b", seed=4, json=captions), photo_sample("c")]
    write_photos(photos / "00001.tar", samples)
    preprocess(
        PreprocessConfig(
            input=str(photos),
            output=str(folder / "scenes"),
            photo=PhotoConfig(size=48, min_side=16),
            human=HumanConfig(source="none"),
            face=FaceConfig(source="none"),
            executor="serial",
        )
    )
    torch.manual_seed(0)
    VQSEG(VQSEGConfig(size=SIZE, grid=4, codes=16, width=32, groups=4, patch=4)).save_pretrained(
        folder / "vqseg"
    )
    VQGAN(
        VQGANConfig(
            size=SIZE,
            codes=300,
            code_width=8,
            features=32,
            width=32,
            multipliers=(1, 1, 1),
            blocks=1,
            attention=(),
            groups=4,
        )
    ).save_pretrained(folder / "vqgan")
    Tokenizer.fit(["a dog on grass", "picture one"], vocab_size=280, length=6).save(
        folder / "tokenizer.json"
    )
    return folder


def run(world, output, **options):
    paths = {name: str(world / name) for name in ("vqseg", "vqgan")}
    settings = {
        "input": str(world / "scenes"),
        "tokenizer": str(world / "tokenizer.json"),
        "executor": "serial",
        "device": "cpu",  # the bytes compared here are those of one device
        **paths,
        **options,
    }
    return tokenize(TokenizeConfig(output=str(output), **settings))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def test_tokens_are_those_of_the_networks_and_captions_those_of_the_shards(world, tmp_path):
    assert run(world, tmp_path / "out", batch_size=2) == 0
    shards = TokenShards(tmp_path / "out")
    vqseg, vqgan = VQSEG.from_pretrained(world / "vqseg"), VQGAN.from_pretrained(world / "vqgan")
    tokenizer = Tokenizer.from_file(world / "tokenizer.json")
    samples = [s for i in range(2) for s in read_shard(str(world / "scenes" / f"0000{i}.tar"))]
    assert len(shards) == len(samples) == 6
    for (text, scene_tokens, image_tokens), sample in zip(shards, samples, strict=True):
        photo, scene = read_pair(sample)
        scene = scene.resized(SIZE)
        pixels = np.array(photo.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        wanted = vqseg.encode(torch.tensor(scene.labels)[None], torch.tensor(scene.edges)[None])
        assert np.array_equal(scene_tokens, wanted[0])
        wanted = vqgan.encode(torch.tensor(pixels).permute(2, 0, 1)[None] / 255)
        assert np.array_equal(image_tokens, wanted[0])
        assert np.array_equal(text, tokenizer.encode(read_captions(sample)))
    assert [len(shards[i][0]) for i in range(6)] == [1, 1, 1, 1, 3, 1]


def test_batches_do_not_change_a_byte(world, tmp_path):
    run(world, tmp_path / "one", batch_size=1)
    run(world, tmp_path / "many", batch_size=16)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_the_histogram_beside_the_scene_shards_is_no_picture_that_was_forgotten(
    world, tmp_path, caplog
):
    assert (world / "scenes" / "classes.png").exists()
    assert run(world, tmp_path / "out") == 0
    assert not [message for message in caplog.messages if "passed over" in message]


def test_shards_without_samples_become_empty_arrays_that_training_passes_over(world, tmp_path):
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    write_photos(scenes / "00000.tar", [])
    shutil.copy(world / "scenes" / "00001.tar", scenes)
    write_photos(scenes / "00002.tar", [])
    assert run(world, tmp_path / "out", input=str(scenes), mirror=True) == 0
    shards = TokenShards(tmp_path / "out")
    assert [shard["pictures"] for shard in shards.manifest["shards"]] == [0, 3, 0]
    assert [len(text) for text, _, _ in shards] == [1, 3, 1] and len(shards.mirrored(2)[0]) == 1


def test_a_run_without_any_sample_fails_as_that_of_mas_preprocess_does(world, tmp_path, capsys):
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    write_photos(scenes / "00000.tar", [])
    for done in ("1 of 1 shards done", "0 of 1 shards done, 1 were done before"):
        with pytest.raises(ValueError, match="scenes: there is not one sample in it"):
            run(world, tmp_path / "out", input=str(scenes))
        assert done in capsys.readouterr().out


def test_the_manifest_tells_sizes_counts_and_hashes(world, tmp_path):
    run(world, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["text"].keys() == {"vocabulary", "length", "sha256"}
    assert (manifest["scene"]["vocabulary"], manifest["scene"]["grid"]) == (16, 4)
    assert (manifest["image"]["vocabulary"], manifest["image"]["grid"]) == (300, 8)
    for stream, network in (
        ("scene", VQSEG.from_pretrained(world / "vqseg")),
        ("image", VQGAN.from_pretrained(world / "vqgan")),
    ):
        assert manifest[stream]["tokens_sha256"] == network.token_hash()
    assert manifest["shards"] == [
        {"name": "00000", "pictures": 3, "captions": 3},
        {"name": "00001", "pictures": 3, "captions": 5},
    ]


def test_a_second_run_has_nothing_to_do_and_other_tokenizers_are_refused(world, tmp_path, capsys):
    run(world, tmp_path / "out")
    capsys.readouterr()
    assert run(world, tmp_path / "out") == 0
    assert "0 of 2 shards done, 2 were done before" in capsys.readouterr().out
    torch.manual_seed(1)
    VQSEG(VQSEGConfig(size=SIZE, grid=4, codes=16, width=32, groups=4, patch=4)).save_pretrained(
        tmp_path / "other"
    )
    said = r"other/model\.safetensors is not what the scene tokens in .*out were made with"
    with pytest.raises(ValueError, match=said):
        run(world, tmp_path / "out", vqseg=str(tmp_path / "other"))


def test_what_is_no_scene_shard_fails_without_a_manifest(world, tmp_path, capsys):
    shutil.copy(world / "scenes" / "00001.tar", tmp_path)
    write_photos(tmp_path / "00002.tar", [photo_sample("x")])
    assert run(world, tmp_path / "out", input=str(tmp_path)) == 1
    assert "no scene.png" in capsys.readouterr().out
    with pytest.raises(ShardError, match="manifest"):
        TokenShards(tmp_path / "out")


@pytest.mark.parametrize("kind", ["shards", "files"])
def test_photos_without_scenes_are_refused_before_anything_is_made(world, tmp_path, kind):
    photos = tmp_path / "photos"
    photos.mkdir()
    if kind == "files":
        for ending in ("jpg", "txt"):
            (photos / f"x.{ending}").write_bytes(photo_sample("x").files[ending])
    else:
        write_photos(photos / "0.tar", [])
        (photos / "1.tar").write_bytes(b"cut")
        write_photos(photos / "2.tar", [photo_sample("x")])
    said = r"photos: holds photos without scene maps \(x has no scene\.png\); run mas preprocess"
    with pytest.raises(ShardError, match=said):
        run(world, tmp_path / "out", input=str(photos))
    assert not (tmp_path / "out").exists()


def test_photos_smaller_than_the_networks_are_refused_with_the_mend(world, tmp_path, capsys):
    preprocess(
        PreprocessConfig(
            input=str(world / "photos"),
            output=str(tmp_path / "small"),
            photo=PhotoConfig(size=16, min_side=16),
            human=HumanConfig(source="none"),
            face=FaceConfig(source="none"),
            executor="serial",
        )
    )
    assert run(world, tmp_path / "out", input=str(tmp_path / "small")) == 1
    assert "preprocess with --photo.size 32" in capsys.readouterr().out


@pytest.mark.parametrize("executor", ["serial", "ray"])
def test_a_device_that_is_not_there_is_named_in_one_line(
    world, tmp_path, monkeypatch, executor, request
):
    if executor == "ray":
        request.getfixturevalue("local_ray")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises((ValueError, OSError), match=r"device 'cuda': .*GPU") as caught:
        run(world, tmp_path / "out", device="cuda", executor=executor)
    assert "\n" not in str(caught.value)


def test_a_gpu_is_used_where_there_is_one_unless_a_device_is_named(world, tmp_path, monkeypatch):
    asked = []

    def pick(name):
        asked.append(name)
        return torch.device("cpu")

    monkeypatch.setattr("preprocess.tokens.pick_device", pick)
    paths = {name: str(world / name) for name in ("vqseg", "vqgan")}
    tokenize(
        TokenizeConfig(
            input=str(world / "scenes"),
            output=str(tmp_path / "out"),
            tokenizer=str(world / "tokenizer.json"),
            executor="serial",
            **paths,
        )
    )
    run(world, tmp_path / "on a CPU", device="cpu")
    assert set(asked) == {"auto", "cpu"}


def test_a_missing_part_is_named(world, tmp_path):
    for part in ("vqseg", "vqgan", "tokenizer"):
        with pytest.raises(ValueError, match="nowhere"):
            run(world, tmp_path / "out", **{part: str(tmp_path / "nowhere")})
    nowhere = {part: str(tmp_path / part) for part in ("vqseg", "vqgan", "tokenizer")}
    said = r"no such file: .*tokenizer \(.*text tokens\), .*vqseg/model.*, .*vqgan/model.*"
    with pytest.raises(ValueError, match=said):
        run(world, tmp_path / "out", **nowhere)
    assert not (tmp_path / "out").exists()


def chequered_sample(key, captions, *, mirrored=False, seed=0):
    """A sample whose JPEG of plain squares is exactly mirrored by mirroring its pixels."""
    rng = np.random.default_rng(seed)
    ids = [CLASS_NAMES.index(name) for name in ("left-arm", "right-shoe", "dog", "grass-merged")]
    colours, labels = rng.integers(0, 256, (6, 6, 3)), rng.choice(ids, (16, 16))
    pixels = colours.astype(np.uint8).repeat(8, 0).repeat(8, 1)
    scene = SceneMap.from_labels(labels.astype(np.uint8).repeat(3, 0).repeat(3, 1))
    if mirrored:
        pixels, scene = pixels[:, ::-1], scene.mirrored()
    png = io.BytesIO()
    scene.to_png(png)
    files = {
        "jpg": encode(Image.fromarray(pixels)),
        "scene.png": png.getvalue(),
        "json": json.dumps({"captions": captions}).encode(),
    }
    return Sample(key, files)


def test_mirrored_tokens_are_those_of_shards_of_mirrored_pictures(world, tmp_path):
    captions = [["a dog on the left", "right behind a bus"], [], ["Right of a left-hand glove"]]
    swapped = [["a dog on the right", "right behind a bus"], [], ["Left of a right-hand glove"]]
    for folder, texts in (("plain", captions), ("mirrored", swapped)):
        samples = [
            chequered_sample(str(i), own, mirrored=folder == "mirrored", seed=i)
            for i, own in enumerate(texts)
        ]
        (tmp_path / folder).mkdir()
        write_photos(tmp_path / folder / "0.tar", samples)
    Tokenizer.fit(["a dog"], vocab_size=280, length=40).save(tmp_path / "tokenizer.json")
    tokenizer = str(tmp_path / "tokenizer.json")

    def tokens(name, folder, **options):
        options |= {"input": str(tmp_path / folder), "tokenizer": tokenizer}
        assert run(world, tmp_path / name, **options) == 0
        return contents(tmp_path / name)

    both, mirrored = tokens("both", "plain", mirror=True), tokens("other", "mirrored")
    streams = ("scene", "image", "text")
    for stream in streams:
        assert both[f"0.mirrored-{stream}.npy"] == mirrored[f"0.{stream}.npy"]
        assert both[f"0.mirrored-{stream}.npy"] != both[f"0.{stream}.npy"]
    without = tokens("without", "plain")
    assert without == {name: both[name] for name in without}
    assert both.keys() - without.keys() == {f"0.mirrored-{stream}.npy" for stream in streams}


def test_batches_and_executors_do_not_change_a_byte_of_mirrored_pictures(
    world, tmp_path, local_ray
):
    run(world, tmp_path / "one", batch_size=1, mirror=True)
    run(world, tmp_path / "many", batch_size=16, mirror=True)
    run(world, tmp_path / "ray", batch_size=2, mirror=True, executor="ray", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "many") == contents(tmp_path / "ray")
    assert len(contents(tmp_path / "one")) == 2 * 7


def test_the_manifest_tells_of_mirrored_pictures_and_of_nothing_new_without(world, tmp_path):
    run(world, tmp_path / "plain")
    run(world, tmp_path / "both", mirror=True)
    plain, both = (
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("plain", "both")
    )
    assert both == plain | {"mirrored": True} and "mirrored" not in plain
    assert "mirror" not in json.loads((tmp_path / "plain" / "run.json").read_text())["settings"]
    assert TokenShards(tmp_path / "both").has_mirrored


@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_with_its_own_mirror_setting_only(world, tmp_path, first, capsys):
    run(world, tmp_path / "out", mirror=first)
    made = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="other settings: mirror is"):
        run(world, tmp_path / "out", mirror=not first)
    for path in tmp_path.glob("out/00001.*"):
        path.unlink()
    capsys.readouterr()
    assert run(world, tmp_path / "out", mirror=first) == 0
    assert "1 of 2 shards done, 1 were done before" in capsys.readouterr().out
    assert contents(tmp_path / "out") == made

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import mas.model
import mas.model_folder
from mas import MakeAScene
from mas.fill import fill_free, fill_void
from mas.filter import Sampling, StreamSampling
from mas.gpt import GPT
from mas.model_folder import ModelError
from mas.precision import StoredGPT, choose_device, choose_precision
from mas.scene import VOID, SceneError, SceneMap
from mas.storage import StoredTensors

CAPTION = "a giraffe in the park"


def make_scene(size=32):
    labels = np.full((size, size), 119, np.uint8)
    labels[size // 2 :] = 125
    labels[size // 4 : 3 * size // 4, size // 4 : size // 2] = 23
    return SceneMap.from_labels(labels)


def pixels(generation):
    return [np.asarray(image) for image in generation.images]


def same(a, b):
    pictures = zip(pixels(a), pixels(b), strict=True)
    return a.scenes == b.scenes and all(np.array_equal(x, y) for x, y in pictures)


def test_a_caption_gives_pictures_with_their_scenes(tiny_model):
    out = tiny_model.generate(CAPTION, count=3, seed=5)
    assert [image.size for image in out.images] == [(32, 32)] * 3
    assert [scene.size for scene in out.scenes] == [(32, 32)] * 3
    assert out.captions == [CAPTION] * 3 and out.seeds == [5, 6, 7]
    assert [stream.shape for stream in out.tokens] == [(3, 12), (3, 16), (3, 16)]
    assert out.seconds > 0 and out.tokens_per_second > 0
    assert len({image.tobytes() for image in out.images}) == 3


def test_saved_and_loaded_models_give_identical_samples(tiny_model, tiny_folder):
    loaded = MakeAScene.from_pretrained(tiny_folder, device="cpu", precision="float32")
    assert same(
        tiny_model.generate(CAPTION, count=2, seed=1), loaded.generate(CAPTION, count=2, seed=1)
    )
    assert loaded.sampling == tiny_model.sampling
    assert loaded.sha256 and tiny_model.sha256 is None


def test_each_picture_depends_on_its_caption_and_seed_alone(tiny_model):
    captions = ["two dogs", CAPTION]
    together = tiny_model.generate(captions, count=4, seed=3, batch=3)
    for c, caption in enumerate(captions):
        for i in range(4):
            alone = tiny_model.generate(caption, seed=3 + i)
            index = 4 * c + i
            assert np.array_equal(pixels(alone)[0], pixels(together)[index])
            assert alone.scenes[0] == together.scenes[index]


def test_a_given_scene_is_kept_and_steers_the_picture(tiny_model):
    scene = make_scene()
    out = tiny_model.generate(CAPTION, scene=scene, count=2)
    assert out.scenes == [scene, scene]
    expected = tiny_model.encode_scene(scene)
    assert torch.equal(out.tokens.scene, expected.repeat(2, 1))
    other = SceneMap.from_labels(np.full((32, 32), 40, np.uint8))
    assert not np.array_equal(pixels(out)[0], pixels(tiny_model.generate(CAPTION, scene=other))[0])


def test_a_given_scene_may_have_edges_of_its_own(tiny_model):
    labels = make_scene().labels
    for edges in (np.zeros((32, 32), np.bool_), np.ones((32, 32), np.bool_)):
        scene = SceneMap(labels, edges)
        out = tiny_model.generate(CAPTION, scene=scene)
        assert out.scenes == [scene]
        assert torch.equal(out.tokens.scene, tiny_model.encode_scene(scene))


def test_a_scene_of_another_size_is_resized_and_a_wide_one_refused(tiny_model):
    out = tiny_model.generate(CAPTION, scene=make_scene(128))
    assert out.scenes[0].size == (32, 32)
    assert np.array_equal(out.scenes[0].labels, make_scene(32).labels)
    wide = SceneMap.from_labels(np.zeros((32, 48), np.uint8))
    with pytest.raises(SceneError, match=r"must be square.*48x32"):
        tiny_model.generate(CAPTION, scene=wide)


def test_a_scene_alone_is_enough_and_guidance_then_changes_nothing(tiny_model):
    a = tiny_model.generate("", scene=make_scene(), guidance=1.0)
    b = tiny_model.generate("", scene=make_scene(), guidance=5.0)
    assert same(a, b)


def test_a_partial_scene_keeps_the_given_cells_and_predicts_the_rest(tiny_model):
    scene = make_scene()
    free = np.zeros((32, 32), np.bool_)
    free[8:24, 16] = True  # one column of pixels frees the cells it crosses
    out = tiny_model.generate(CAPTION, scene=scene, scene_free=free, count=6)
    cells = np.zeros((4, 4), np.bool_)
    cells[1:3, 2] = True
    kept = torch.from_numpy(~cells.ravel())
    expected = tiny_model.encode_scene(scene)
    assert torch.equal(out.tokens.scene[:, kept], expected[:, kept].repeat(6, 1))
    assert len({tuple(row) for row in out.tokens.scene[:, ~kept].tolist()}) > 1
    everything = np.ones((32, 32), np.bool_)
    assert same(
        tiny_model.generate(CAPTION, scene=scene, scene_free=everything),
        tiny_model.generate(CAPTION),
    )


def test_a_scene_of_which_nothing_is_free_comes_back_as_it_is(tiny_model):
    scene = make_scene()
    nothing = np.zeros((32, 32), np.bool_)
    out = tiny_model.generate(CAPTION, scene=scene, scene_free=nothing, count=2)
    assert out.scenes == [scene, scene] and tiny_model.decode_scenes(out.tokens.scene)[0] != scene
    assert same(out, tiny_model.generate(CAPTION, scene=scene, count=2))


def test_a_seed_may_be_any_kind_of_integer(tiny_model):
    expected = tiny_model.generate(CAPTION, seed=3)
    for kind in (np.int64, np.uint8, np.int32):
        out = tiny_model.generate(CAPTION, seed=kind(3))
        assert same(out, expected) and type(out.seeds[0]) is int


@pytest.mark.parametrize("size", [4, 30, 101])
def test_a_free_part_of_a_scene_of_any_size_is_predicted(tiny_model, size):
    scene = make_scene().resized(size)
    free = np.zeros((size, size), np.bool_)
    free[-1, -1] = True  # lies in the last cell
    out = tiny_model.generate(CAPTION, scene=scene, scene_free=free, count=6)
    given = tiny_model.encode_scene(scene)
    assert (out.tokens.scene[:, :-1] == given[:, :-1]).all()
    assert (out.tokens.scene[:, -1] != given[:, -1]).any()


def test_void_that_is_free_counts_as_what_lies_beside_it(tiny_model):
    free = np.zeros((32, 32), np.bool_)
    free[20:] = True  # the last three of eight rows of pixels a cell: of four rows of cells two
    scenes = [make_scene() for _ in range(2)]
    known, void = scenes
    known.labels[16:], void.labels[16:] = known.labels[15], known.labels[15]
    void.labels[20:] = VOID
    known, void = (SceneMap.from_labels(scene.labels) for scene in scenes)
    filled = fill_void(void, np.arange(4)[:, None].repeat(4, 1) >= 2)
    assert filled == known and void.labels[-1, 0] == VOID
    tokens = [
        tiny_model.generate(CAPTION, scene=scene, scene_free=free, seed=3).tokens.scene
        for scene in (known, void)
    ]
    assert torch.equal(*tokens)
    nothing = SceneMap.from_labels(np.full((32, 32), VOID, np.uint8))
    assert fill_void(nothing, np.ones((4, 4), np.bool_)) == nothing
    assert fill_void(void, np.zeros((4, 4), np.bool_)) == void


def test_part_of_a_picture_can_be_given(tiny_model):
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    free = np.zeros((32, 32), np.bool_)
    free[16:] = True
    out = tiny_model.generate(CAPTION, image=image, image_free=free, count=2)
    expected = tiny_model.encode_image(fill_free(image, free))
    assert torch.equal(out.tokens.image[:, :8], expected[:, :8].repeat(2, 1))
    assert not torch.equal(out.tokens.image[0], out.tokens.image[1])


@pytest.mark.parametrize("size", [16, 32, 64])
def test_what_is_hidden_of_a_picture_counts_for_nothing(tiny_model, size):
    free = np.zeros((size, size), np.bool_)
    free[size // 2 :] = True
    pictures = [np.tile(np.arange(32, dtype=np.uint8)[:, None, None] * 7, (1, 32, 3))] * 3
    pictures = [picture.copy() for picture in pictures]
    for picture, hidden in zip(pictures, (0, 255, 15 * 7), strict=True):
        picture[16:] = hidden  # black, white, what the last kept row is
    tokens = [
        tiny_model.generate(CAPTION, image=Image.fromarray(x), image_free=free).tokens.image
        for x in pictures
    ]
    expected = tiny_model.encode_image(Image.fromarray(pictures[2]))
    assert all(torch.equal(x, tokens[0]) for x in tokens)
    assert torch.equal(tokens[0][:, :8], expected[:, :8])
    whole = Image.fromarray(pictures[0])
    assert fill_free(whole, np.ones((size, size), np.bool_)) == whole
    with pytest.raises(ModelError, match="must be square, this one is 32x48"):
        tiny_model.generate(CAPTION, image=Image.new("RGB", (32, 48)), image_free=free)


def test_a_negative_prompt_changes_scene_and_picture(tiny_model):
    plain = tiny_model.generate(CAPTION, count=3, seed=5)
    apart = tiny_model.generate(CAPTION, count=3, seed=5, batch=2, negative_prompt="two cats")
    assert (plain.negative_prompt, apart.negative_prompt) == ("", "two cats")
    assert apart.scenes != plain.scenes and apart.images != plain.images
    alone = tiny_model.generate(CAPTION, seed=7, negative_prompt="two cats")
    assert alone.scenes == apart.scenes[2:] and alone.images == apart.images[2:]
    half = tiny_model.generate(
        CAPTION, seed=7, negative_prompt="two cats", scene_sampling={"guidance": 1}
    )
    first = tiny_model.generate(CAPTION, seed=7, scene_sampling={"guidance": 1})
    assert half.scenes == first.scenes and half.images != first.images
    scene = plain.scenes[0]
    given = [
        tiny_model.generate(CAPTION, seed=7, scene=scene, negative_prompt=text).images
        for text in ("", "two cats")
    ]
    assert given[0] != given[1]


def test_settings_reach_the_stream_they_are_meant_for(tiny_model):
    plain = tiny_model.generate(CAPTION, seed=2)
    greedy = tiny_model.generate(CAPTION, seed=2, image_sampling={"temperature": 0})
    assert torch.equal(plain.tokens.scene, greedy.tokens.scene)
    assert not torch.equal(plain.tokens.image, greedy.tokens.image)
    again = tiny_model.generate(CAPTION, seed=2, temperature=0)
    assert torch.equal(again.tokens.scene, tiny_model.generate(CAPTION, top_k=1).tokens.scene)
    assert greedy.settings["image"]["temperature"] == 0
    assert greedy.settings["scene"] == dataclasses.asdict(Sampling())


def test_the_model_brings_its_own_defaults(parts, tmp_path):
    MakeAScene(**parts, sampling=Sampling(guidance=2.5, top_p=0.9)).save_pretrained(tmp_path / "m")
    model = MakeAScene.from_pretrained(tmp_path / "m", device="cpu")
    settings = model.generate(CAPTION, temperature=0.5).settings
    expected = {"guidance": 2.5, "temperature": 0.5, "top_k": None, "top_p": 0.9}
    assert settings == {"scene": expected, "image": expected}


def test_the_model_brings_defaults_of_each_stream_and_a_request_goes_before_them(parts, tmp_path):
    own = StreamSampling(scene=Sampling(guidance=1.5), image=Sampling(guidance=4, top_p=0.9))
    MakeAScene(**parts, sampling=own).save_pretrained(tmp_path / "m")
    model = MakeAScene.from_pretrained(tmp_path / "m", device="cpu", precision="float32")
    assert model.sampling == own
    model.save_pretrained(tmp_path / "m")
    assert MakeAScene.from_pretrained(tmp_path / "m", device="cpu").sampling == own

    def guidances(**request):
        settings = model.generate(CAPTION, **request).settings
        return settings["scene"]["guidance"], settings["image"]["guidance"]

    assert guidances() == (1.5, 4)
    assert guidances(guidance=2) == (2, 2)
    assert guidances(guidance=2, image_sampling={"guidance": 3}) == (2, 3)
    assert guidances(scene_sampling={"temperature": 0, "guidance": 0}) == (0, 4)
    plain = model.generate(CAPTION, seed=3)
    said = MakeAScene(**parts).generate(
        CAPTION,
        seed=3,
        scene_sampling={"guidance": 1.5},
        image_sampling={"guidance": 4, "top_p": 0.9},
    )
    assert plain.settings == said.settings
    assert all(torch.equal(*pair) for pair in zip(plain.tokens, said.tokens, strict=True))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_sampling_never_holds_the_whole_float32_network(tiny_folder, precision, monkeypatch):
    def refuse(folder):
        raise AssertionError("the whole network was read")

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "from_pretrained", refuse)
        model = MakeAScene.from_pretrained(tiny_folder, device="cpu", precision=precision)
        assert len(model.generate(CAPTION, count=2).images) == 2
    assert model.gpt.dtype == torch.float32 and model.gpt is model.gpt


def test_the_largest_seed_is_of_the_last_picture(tiny_model):
    assert tiny_model.generate(CAPTION, seed=2**63 - 2, count=2).seeds[-1] == 2**63 - 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"caption": "  "}, "caption is empty"),
        ({"caption": []}, "no caption"),
        ({"count": 0}, "count is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, r"seed is 9\d+8, use a number from 0 to 2\^63 - 1"),
        ({"seed": 2**63 - 1, "count": 2}, r"for 2 pictures, use a number from 0 to 2\^63 - 2"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": -2}, "guidance is -2"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"scene_sampling": {"topp": 0.5}}, "scene_sampling knows guidance.*not topp"),
        ({"negative_prompt": None}, "negative_prompt is None, use a text"),
        ({"negative_prompt": "a cat", "guidance": 1}, "guidance is 1: use more"),
        (
            {"negative_prompt": "a cat", "scene": make_scene(), "image_sampling": {"guidance": 1}},
            "guidance is 1: use more",
        ),
        ({"scene_free": np.ones((32, 32), np.bool_)}, "give the scene too"),
        ({"image_free": np.ones((32, 32), np.bool_)}, "give both or neither"),
        ({"scene": make_scene(), "scene_free": np.ones((3, 3), np.bool_)}, "4 pixels a side"),
        ({"scene": make_scene(), "scene_free": np.ones((32, 32))}, "square bool array"),
        ({"scene": make_scene(), "scene_free": np.zeros((3, 3), np.bool_)}, "4 pixels a side"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(tiny_model, request_, message):
    with pytest.raises(ValueError, match=message) as refusal:
        tiny_model.generate(**{"caption": CAPTION, **request_})
    assert "\n" not in str(refusal.value)


def test_a_batch_too_large_for_the_memory_says_which_one_fits(tiny_model, monkeypatch):
    row = 2 * 2 * tiny_model.gpt.layout.length * 32 * 4  # bytes: keys and values, layers, float32
    spare = 300 * 2**20
    monkeypatch.setattr(mas.precision, "free_memory", lambda device: spare + 2 * row * 5)
    with pytest.raises(ModelError, match=r"8 pictures at a time.*5 do: use batch 5"):
        tiny_model.generate(CAPTION, count=9, batch=8)
    assert len(tiny_model.generate(CAPTION, count=9, batch=5).images) == 9
    monkeypatch.setattr(mas.precision, "free_memory", lambda device: 0)
    with pytest.raises(ModelError, match="not even one"):
        tiny_model.generate(CAPTION)


def test_running_out_of_memory_all_the_same_is_one_line(tiny_model, monkeypatch):
    errors = [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        ValueError("another error"),
        RuntimeError("another error"),
    ]

    def fail(*arguments, **options):
        raise errors.pop(0)

    monkeypatch.setattr(mas.model, "generate", fail)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"ran out with 6 pictures at a time: try batch 3$"):
            tiny_model.generate(CAPTION, count=6)
    with pytest.raises(ModelError, match="use a smaller model"):
        tiny_model.generate(CAPTION)
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match="another error"):
            tiny_model.generate(CAPTION)


def test_auto_takes_int8_where_its_fast_step_runs(tiny_model, monkeypatch):
    for there, precision in ((True, "int8"), (False, "float32")):
        monkeypatch.setattr(mas.precision, "can_step", lambda config, there=there: there)
        assert choose_precision(tiny_model.gpt, "auto") == precision


def test_auto_takes_int8_for_large_networks_on_a_cpu(tiny_model, monkeypatch):
    monkeypatch.setattr(mas.precision, "can_step", lambda config: False)
    assert choose_precision(tiny_model.gpt, "auto") == "float32"
    monkeypatch.setattr(mas.precision, "LARGE", 1000)
    assert choose_precision(tiny_model.gpt, "auto") == "int8"


def test_auto_reads_no_weights_of_a_stored_gpt(tiny_model, tiny_folder, monkeypatch):
    def fail(tensors, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(StoredTensors, "__getitem__", fail)
    monkeypatch.setattr(mas.precision, "can_step", lambda config: False)
    stored = StoredGPT(tiny_folder / "gpt", torch.device("cpu"))
    parameters = sum(parameter.numel() for parameter in tiny_model.gpt.parameters())
    assert stored.tensors.numbers == parameters
    for largest, precision in ((parameters, "int8"), (parameters + 1, "float32")):
        monkeypatch.setattr(mas.precision, "LARGE", largest)
        assert choose_precision(stored, "auto") == precision


def test_devices_and_precisions_that_do_not_exist_are_refused(tiny_model):
    with pytest.raises(ValueError, match="device 'gpu9'"):
        choose_device("gpu9")
    with pytest.raises(ValueError, match="device 'meta'"):
        choose_device("meta")
    with pytest.raises(ValueError, match="precision is 'float8'"):
        choose_precision(tiny_model.gpt, "float8")


def test_void_in_a_scene_is_a_label_like_any_other_unless_it_is_freed(tiny_model):
    labels = make_scene().labels.copy()
    labels[:8] = VOID
    scene = SceneMap.from_labels(labels)
    out = tiny_model.generate(CAPTION, scene=scene, count=3)
    assert torch.equal(out.tokens.scene, tiny_model.encode_scene(scene).repeat(3, 1))


@pytest.mark.parametrize(("rows", "warned"), [(1, False), (2, True), (16, True)])
def test_much_void_that_is_not_freed_is_warned_of_once(tiny_model, caplog, rows, warned):
    labels = make_scene().labels.copy()
    labels[:rows] = VOID
    scene = SceneMap.from_labels(labels)
    tiny_model.generate(CAPTION, scene=scene, count=2)
    messages = [text for text in caplog.messages if "is void" in text]  # else it is untrained
    assert len(messages) == warned
    for message in messages:
        assert f"{rows / 32:.0%}".replace("%", " %") in message and "--fill-void" in message
    caplog.clear()
    tiny_model.generate(CAPTION, scene=scene, scene_free=labels == VOID)
    assert not any("is void" in text for text in caplog.messages)

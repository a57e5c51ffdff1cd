"""Several scenes for a caption: what is drawn, which one stays, and what a model tells of it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mas.candidates
import mas.request
from mas.__main__ import main
from mas.candidates import candidate_seed, choose_scenes
from mas.examiner import Examiner
from mas.filter import Sampling, StreamSampling
from mas.generate import generate
from mas.judge import JudgeConfig, SceneJudge, describe_scenes
from mas.model import MakeAScene
from mas.model_folder import JUDGE, ModelError, list_files
from mas.request import LARGEST_SEED
from mas.scene import SceneMap
from mas.sequence import FREE

CAPTIONS = ["a giraffe in the park", "two brown dogs", "three sheep behind a red bus"]
SEEDS = [7, 8, 9]


class Stub:
    """Judges by the most common label; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def choose(self, text_BT, scenes):
        self.asked += [[score(scene) for scene in group] for group in scenes]
        return [int(np.argmax([score(scene) for scene in group])) for group in scenes]


def score(scene):
    return int(scene.labels.astype(int).sum())


def build_judge(**sizes):
    torch.manual_seed(3)
    sizes = {"text_vocabulary": 300, "text_length": 12, "width": 16, "heads": 2, **sizes}
    return SceneJudge(JudgeConfig(hidden=16, **sizes))


@pytest.fixture(scope="module")
def judged_model(tiny_model):
    """The tiny model with a judge; it draws three scenes a picture unless told otherwise."""
    names = ("tokenizer", "vqseg", "vqgan", "gpt")
    parts = {name: getattr(tiny_model, name) for name in names}
    return MakeAScene(**parts, judge=build_judge(), scene_candidates=3)


@pytest.fixture(scope="module")
def judged_folder(judged_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged") / "model"
    judged_model.save_pretrained(folder)
    return folder


def choose(
    model,
    judge,
    *,
    rows=slice(None),
    scene_BT=None,
    sided_B=None,
    batch=8,
    candidates=4,
    **options,
):
    text_BT = model.tokenizer.encode(CAPTIONS)
    if scene_BT is None:
        scene_BT = model.decoder.layout.free(model.decoder.layout.scene, len(text_BT))
    return choose_scenes(
        model.decoder,
        judge,
        text_BT[rows],
        scene_BT[rows],
        seeds=SEEDS[rows],
        sided_B=[False] * len(text_BT[rows]) if sided_B is None else sided_B,
        candidates=candidates,
        sampling=Sampling(),
        batch=batch,
        decode=model.decode_scenes,
        encode_mirrored=model.encode_mirrored,
        **options,
    )


def test_stopping_after_the_scene_draws_the_same_scene_and_no_picture(tiny_model):
    text_BT = tiny_model.tokenizer.encode(CAPTIONS)
    image_BT = tiny_model.decoder.layout.free(tiny_model.decoder.layout.image, 3)
    image_BT[:, :5] = 3
    given = {"seeds": SEEDS, "image_BT": image_BT}
    whole = generate(tiny_model.decoder, text_BT, **given)
    steps = []
    part = generate(
        tiny_model.decoder,
        text_BT,
        **given,
        scene_only=True,
        on_progress=lambda _, tokens_BT: steps.append(int((tokens_BT == FREE).sum())),
    )
    assert torch.equal(part.scene, whole.scene) and torch.equal(part.image, image_BT)
    assert steps == [3 * (16 - n + 11) for n in range(1, 17)]
    none = generate(tiny_model.decoder, text_BT, scene_BT=whole.scene, scene_only=True, **given)
    assert torch.equal(none.scene, whole.scene) and torch.equal(none.image, image_BT)


def test_seeds_of_candidates_are_distinct_and_the_first_is_the_pictures_own():
    pictures = [0, 1, 2, 2**32, LARGEST_SEED]
    seeds = [candidate_seed(seed, number) for seed in pictures for number in range(50)]
    assert seeds[::50] == pictures
    assert len(set(seeds)) == len(seeds) and all(0 <= seed <= LARGEST_SEED for seed in seeds)


def test_the_candidate_with_the_highest_score_is_chosen(tiny_model):
    judge = Stub()
    chosen_BT = choose(tiny_model, judge)
    scenes = tiny_model.decode_scenes(chosen_BT)
    assert [score(scene) for scene in scenes] == [max(scores) for scores in judge.asked]
    assert [len(set(scores)) > 1 for scores in judge.asked] == [True] * 3
    own = tiny_model.generate(CAPTIONS[1], seed=SEEDS[1])
    assert judge.asked[1][0] == score(own.scenes[0])


def test_the_first_candidate_is_the_scene_of_the_seed_alone(tiny_model):
    own_BT = generate(tiny_model.decoder, tiny_model.tokenizer.encode(CAPTIONS), seeds=SEEDS).scene
    assert torch.equal(choose(tiny_model, Stub(), candidates=1), own_BT)


def test_a_choice_depends_on_its_caption_and_seed_alone(judged_model):
    judge = judged_model.judge
    together_BT = choose(judged_model, judge)
    for batch in (1, 3, 12):
        assert torch.equal(choose(judged_model, judge, batch=batch), together_BT)
    for i in range(3):
        rows = slice(i, i + 1)
        assert torch.equal(choose(judged_model, judge, rows=rows), together_BT[rows])


def test_mirror_images_are_candidates_where_sides_matter(tiny_model):
    plain, judge = Stub(), Stub()
    own_BT = choose(tiny_model, plain)
    layout = tiny_model.decoder.layout
    scene_BT = layout.free(layout.scene, 3)
    chosen_BT = choose(tiny_model, judge, scene_BT=scene_BT, sided_B=[False, True, True])
    assert [len(scores) for scores in judge.asked] == [4, 8, 8]
    assert [scores[:4] for scores in judge.asked] == plain.asked
    assert torch.equal(chosen_BT[0], own_BT[0])
    for i in (1, 2):
        seeds = [candidate_seed(SEEDS[i], number) for number in range(4)]
        text_BT = tiny_model.tokenizer.encode([CAPTIONS[i]] * 4)
        drawn_KT = generate(tiny_model.decoder, text_BT, seeds=seeds, scene_only=True).scene
        scenes = tiny_model.decode_scenes(drawn_KT)
        mirrored_KT = torch.cat([tiny_model.encode_scene(scene.mirrored()) for scene in scenes])
        scenes += tiny_model.decode_scenes(mirrored_KT)
        assert [score(scene) for scene in scenes] == judge.asked[i]
        best = int(np.argmax(judge.asked[i]))
        assert torch.equal(chosen_BT[i], torch.cat([drawn_KT, mirrored_KT])[best])
    scene_BT[1, 3] = 5  # part of it is given, and has its side
    choose(tiny_model, judge, scene_BT=scene_BT, sided_B=[False, True, True])
    assert [len(scores) for scores in judge.asked[3:]] == [4, 4, 8]


def test_given_tokens_of_a_scene_are_never_changed(tiny_model):
    layout = tiny_model.decoder.layout
    scene_BT = layout.free(layout.scene, 3)
    scene_BT[0, ::2], scene_BT[1] = 5, torch.arange(16)
    chosen_BT = choose(tiny_model, Stub(), scene_BT=scene_BT)
    given_BT = scene_BT != FREE
    assert torch.equal(chosen_BT[given_BT], scene_BT[given_BT]) and (chosen_BT != FREE).all()


def test_a_picture_of_a_model_follows_the_scene_its_judge_likes_best(judged_model):
    out = judged_model.generate(CAPTIONS, seed=5, count=2, batch=4, scene_candidates=5)
    text_BT = judged_model.tokenizer.encode(CAPTIONS).repeat_interleave(2, dim=0)
    for text_T, scene, seed, image in zip(text_BT, out.scenes, out.seeds, out.images, strict=True):
        seeds = [candidate_seed(seed, number) for number in range(5)]
        drawn = generate(judged_model.decoder, text_T.repeat(5, 1), seeds=seeds)
        scenes = judged_model.decode_scenes(drawn.scene)
        described_1KNF = torch.from_numpy(describe_scenes(scenes))[None]
        assert scene == scenes[judged_model.judge(text_T[None], described_1KNF).argmax()]
        given = generate(
            judged_model.decoder,
            text_T[None],
            seeds=[seed],
            scene_BT=drawn.scene[[scenes.index(scene)]],
        )
        assert image == judged_model.decode_images(given.image)[0]
    one = judged_model.generate(CAPTIONS, seed=5, count=2, scene_candidates=1)
    assert one.scenes != out.scenes
    assert out.settings["scene"]["candidates"] == 5 and "candidates" not in one.settings["scene"]


def test_candidates_move_away_from_a_negative_prompt(judged_model, monkeypatch):
    asked, choose = [], SceneJudge.choose

    def watch(self, text_BT, scenes):
        asked.append(scenes[0])
        return choose(self, text_BT, scenes)

    monkeypatch.setattr(SceneJudge, "choose", watch)
    out = judged_model.generate(CAPTIONS[0], seed=4, negative_prompt="a cat")
    assert len(asked[0]) == 3 and out.scenes[0] in asked[0]
    for number, scene in enumerate(asked[0]):
        seed = candidate_seed(4, number)
        one = judged_model.generate(
            CAPTIONS[0], seed=seed, scene_candidates=1, negative_prompt="a cat"
        )
        assert one.scenes == [scene]


def test_each_picture_of_a_judged_model_is_the_same_alone(judged_model):
    together = judged_model.generate(CAPTIONS, count=2, seed=3, batch=5)
    for i, (caption, seed) in enumerate(zip(together.captions, together.seeds, strict=True)):
        alone = judged_model.generate(caption, seed=seed, batch=1)
        assert alone.scenes[0] == together.scenes[i] and alone.images[0] == together.images[i]


def test_a_model_mirrors_scenes_for_captions_that_name_a_side(judged_model, monkeypatch):
    """The judge here likes what lies on the left: of a scene and its mirror image one at most."""
    asked = []

    def choose(self, text_BT, scenes):
        asked.append([len(group) for group in scenes])
        return [int(np.argmax([weigh(scene) for scene in group])) for group in scenes]

    def weigh(scene):
        columns_W = scene.labels.astype(float).mean(0)
        return columns_W[:16].mean() - columns_W[16:].mean()

    monkeypatch.setattr(SceneJudge, "choose", choose)
    captions = ["cow LEFT", "cow left on", CAPTIONS[0]]
    out = judged_model.generate(captions, seed=4, batch=2)
    assert asked == [[6, 3], [3]]
    plain = judged_model.generate(captions, seed=4, scene_candidates=1)
    assert out.scenes[0] != plain.scenes[0] and weigh(out.scenes[0]) > 0
    alone = judged_model.generate(captions[0], seed=4)
    assert alone.scenes == out.scenes[:1] and alone.images == out.images[:1]
    free = np.ones((32, 32), np.bool_)
    free[:8] = False
    judged_model.generate(captions[0], scene=out.scenes[0], scene_free=free)
    assert asked[-1] == [3]


def test_one_candidate_of_a_judged_model_is_the_model_without_a_judge(judged_model, tiny_model):
    one = judged_model.generate(CAPTIONS[0], seed=4, scene_candidates=1)
    plain = tiny_model.generate(CAPTIONS[0], seed=4)
    assert one.scenes == plain.scenes and one.images == plain.images
    assert one.settings == plain.settings


def test_a_scene_that_is_given_asks_no_judge_and_a_part_is_kept(judged_model, monkeypatch):
    scene = SceneMap.from_labels(np.tile(np.repeat(np.uint8([16, 119]), 16), (32, 1)))
    free = np.zeros((32, 32), np.bool_)
    free[:8] = True  # the top row of cells
    out = judged_model.generate(CAPTIONS[0], scene=scene, scene_free=free)
    assert torch.equal(out.tokens.scene[:, 4:], judged_model.encode_scene(scene)[:, 4:])

    def refuse(*arguments):
        raise AssertionError("the judge was asked")

    monkeypatch.setattr(judged_model.judge, "choose", refuse)
    assert judged_model.generate(CAPTIONS[0], scene=scene).scenes == [scene]
    with pytest.raises(AssertionError, match="was asked"):
        judged_model.generate(CAPTIONS[0], scene=scene, scene_free=free)


def test_candidates_need_memory_like_pictures(judged_model, monkeypatch):
    monkeypatch.setattr(MakeAScene, "pictures_that_fit", lambda _: 2)
    with pytest.raises(ModelError, match=r"3 pictures at a time do not fit .*: use batch 2"):
        judged_model.generate(CAPTIONS[0])
    assert len(judged_model.generate(CAPTIONS[0], batch=2).images) == 1
    scene = SceneMap.from_labels(np.full((32, 32), 16, np.uint8))
    out = judged_model.generate(CAPTIONS[0], scene=scene, count=2)  # nothing to choose
    assert "candidates" not in out.settings["scene"]

    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(mas.candidates, "generate", fail)
    with pytest.raises(ModelError, match="ran out with 2 pictures at a time: try batch 1"):
        judged_model.generate(CAPTIONS[0], batch=2)


def test_an_examiner_draws_what_the_model_draws(judged_model):
    cases = [SimpleNamespace(caption=caption) for caption in CAPTIONS]
    made = Examiner(judged_model, None, seed=3, batch=2).paint(cases, None)
    for i, caption in enumerate(CAPTIONS):
        own = judged_model.generate(caption, seed=3 + i)
        assert own.scenes[0] == made.scenes[i]
        assert np.array_equal(np.asarray(own.images[0]), made.pictures[i])


def test_several_scenes_need_a_judge_and_none_cannot_be_drawn(tiny_model, judged_model, parts):
    with pytest.raises(ModelError, match=r"is 2, but this model has no judge.*mas train judge"):
        tiny_model.generate(CAPTIONS[0], scene_candidates=2)
    with pytest.raises(ModelError, match="is 4, but this model has no judge"):
        MakeAScene(**parts, scene_candidates=4)
    for candidates in (0, -3):
        with pytest.raises(ModelError, match=f"scene_candidates is {candidates}, use 1 or more"):
            judged_model.generate(CAPTIONS[0], scene_candidates=candidates)
    with pytest.raises(ModelError, match="scene_candidates is 1000000000, use 256 or fewer"):
        judged_model.generate(CAPTIONS[0], scene_candidates=10**9)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"text_vocabulary": 299}, "judge and GPT.*vocabulary 299 against 300"),
        ({"text_length": 13}, "judge and GPT.*text length 13 against 12"),
    ],
)
def test_a_judge_of_another_tokenizer_is_refused(parts, sizes, message):
    with pytest.raises(ModelError, match=message):
        MakeAScene(**parts, judge=build_judge(**sizes))


def test_progress_counts_the_candidates_and_shows_no_scene_before_it_is_chosen(judged_model):
    seen = []

    def watch(progress):
        seen.append((progress.first, progress.done, progress.total, progress.new_scene))
        drawing = (progress.done - 1) % (2 * 64) < 2 * 48  # three scenes of 16 tokens a picture
        assert drawing == (progress.scenes() is None)
        assert not (drawing and (progress.new_rows or progress.images()))

    judged_model.generate(CAPTIONS[0], count=4, batch=2, on_progress=watch)
    total = 4 * (3 * 16 + 16)
    assert [done for _, done, _, _ in seen] == sorted({done for _, done, _, _ in seen})
    assert seen[-1][1] == total and {t for _, _, t, _ in seen} == {total}
    announced = [(first, done) for first, done, _, new_scene in seen if new_scene]
    assert announced == [(0, 2 * 48 + 2), (2, 2 * 64 + 2 * 48 + 2)]


def test_a_folder_keeps_judge_and_candidates(judged_model, judged_folder, tmp_path):
    index = json.loads((judged_folder / "model_index.json").read_text())
    assert (index["format"], index["scene_candidates"]) == (3, 3)
    assert set(index["sha256"]) == set(list_files((JUDGE,)))
    loaded = MakeAScene.from_pretrained(judged_folder, device="cpu", precision="float32")
    assert loaded.scene_candidates == 3 and loaded.sampling == judged_model.sampling
    a, b = (model.generate(CAPTIONS, seed=6) for model in (judged_model, loaded))
    assert a.scenes == b.scenes and a.images == b.images and a.settings == b.settings
    loaded.sampling = StreamSampling(scene=Sampling(guidance=1.5), image=Sampling(guidance=4))
    loaded.save_pretrained(tmp_path / "m", weights="int8")
    again = MakeAScene.from_pretrained(tmp_path / "m", device="cpu")
    assert again.sampling == loaded.sampling and again.scene_candidates == 3
    assert json.loads((tmp_path / "m/model_index.json").read_text())["weights"]["judge"] == (
        "float16"
    )
    again.judge, again.scene_candidates = None, 1
    again.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m/judge").exists()
    assert MakeAScene.from_pretrained(tmp_path / "m", device="cpu").judge is None


def test_a_folder_without_a_judge_is_as_it_was_before_there_were_any(tiny_folder):
    text = (tiny_folder / "model_index.json").read_text()
    index = json.loads(text)
    assert list(index) == ["sizes", "weights", "format", "sampling", "sha256"]
    assert index["format"] == 1 and set(index["sha256"]) == set(list_files())
    assert "judge" not in text and "candidates" not in text
    assert "judge" not in (tiny_folder / "README.md").read_text()
    assert MakeAScene.from_pretrained(tiny_folder, device="cpu").scene_candidates == 1


@pytest.mark.parametrize("name", [f"judge/{file}" for file in ("config.json", "model.safetensors")])
def test_a_missing_or_exchanged_judge_is_named(judged_folder, tmp_path, name):
    copied = shutil.copytree(judged_folder, tmp_path / "copy")
    content = bytearray((copied / name).read_bytes())
    content[-2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name}: not the file this model was saved with"):
        MakeAScene.from_pretrained(copied)
    (copied / name).unlink()
    with pytest.raises(ModelError, match=f"incomplete, {name} is missing"):
        MakeAScene.from_pretrained(copied)


@pytest.mark.parametrize("candidates", [None, 0, "two", 2.5])
def test_a_damaged_number_of_candidates_is_refused(judged_folder, tmp_path, candidates):
    copied = shutil.copytree(judged_folder, tmp_path / "copy")
    index = json.loads((copied / "model_index.json").read_text())
    index["scene_candidates"] = candidates
    (copied / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=f"scene_candidates is {candidates}; assemble again"):
        MakeAScene.from_pretrained(copied)


def test_mas_sample_draws_as_many_scenes_as_it_is_told(judged_folder, tmp_path, capsys):
    def run(*words):
        words = ("--count=2", "--device=cpu", "--model", str(judged_folder), *words)
        status = main(["sample", CAPTIONS[0], "--output", str(tmp_path / "out"), *words])
        err = capsys.readouterr().err
        if status:
            return err
        settings = json.loads((tmp_path / "out/samples.json").read_text())["settings"]
        return settings["scene"].get("candidates")

    assert run() == 3 and run("--scene-candidates=2") == 2 and run("--scene-candidates=1") is None
    assert run("--scene-candidates=0") == ("mas: error: scene-candidates is 0, use 1 or more\n")

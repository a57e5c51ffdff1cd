"""What the judge's choice among scenes is worth: the table of docs/sampling.md.

    python tools/choice.py --model park --input data/held-out

In: a model with a judge, scene shards of the park world it has not seen (docs/evaluation.md says
how to make them). Out: for 1 to 12 candidates, which share of the claims holds in the scene that
the judge keeps, and in the one that would be best if one knew. Numbers are those of captions spread
over the shards, relations those of others that claim one between two classes. Where a caption names
a side, mirror images are chosen from, too, as when sampling; what they bring is said of captions
that name one. No picture is painted. Cost: 2,900 scenes of docs/evaluation.md's held-out set, 12
minutes of two cores.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from plain_errors import run_tool
from tqdm import tqdm

from mas import MakeAScene
from mas.cases import Case, read_cases
from mas.generate import generate
from mas.obedience import Seen, judge
from mas.scene import SceneMap
from mas.text import names_side

MOST = 12  # candidates
SHOWN = (1, 2, 4, 6, 9, MOST)
SEED = 1000  # of the first candidate of all
BATCH = 4  # captions at a time
Verdict = dict[str, list[bool]]  # of `mas.obedience.judge`
T = TypeVar("T")


class Drawn(NamedTuple):
    """A caption, what holds in its candidates, and which one is kept of the first K."""

    case: Case
    own: list[Verdict]
    mirrored: list[Verdict]  # of their mirror images, where the caption names a side
    kept: dict[int, int]
    kept_own: dict[int, int]  # the same without mirror images

    def first(self, count: int) -> list[Verdict]:
        """What there is to choose from when so many scenes are drawn."""
        return _join(self.own, self.mirrored, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="park", help="park, a model folder or a hub id")
    parser.add_argument("--input", required=True, help="scene shards of the park world")
    parser.add_argument("--count", type=int, default=100, help="captions of each kind")
    options = parser.parse_args()
    model = MakeAScene.from_pretrained(options.model)
    if model.judge is None:
        raise SystemExit(f"{options.model} has no judge: there is nothing to choose")
    found = read_cases(options.input, 2000)
    if not found.has_facts:
        raise SystemExit(f"{options.input} says nothing of what its captions claim: use the park's")
    cases = found.cases
    spread = cases[:: max(1, len(cases) // options.count)][: options.count]
    relating = [case for case in cases[1::3] if _relations(case)]
    related, others = relating[: options.count], relating[options.count :]
    sided = [case for case in others if names_side(case.caption)]
    drawn = _draw(model, [*spread, *related, *sided[: options.count]])
    numbers, drawn = drawn[: len(spread)], drawn[len(spread) :]
    relations, sides = drawn[: len(related)], drawn[len(related) :]
    print("candidates  number kept  best  relation kept  best")
    for count in SHOWN:
        columns = [
            _share(some, claim, count, best=best)
            for some, claim in ((numbers, "number"), (relations, "relation"))
            for best in (False, True)
        ]
        number, most, relation, all_told = columns
        print(f"{count:10d}  {number:11.3f} {most:5.3f}  {relation:13.3f} {all_told:5.3f}")
    few = min(MOST, model.scene_candidates)
    _print_relations([*numbers, *relations], count=few)
    _print_sides(sides, count=few)


def _draw(model: MakeAScene, cases: Sequence[Case]) -> list[Drawn]:
    text_BT = model.tokenizer.encode([case.caption for case in cases])
    drawn = []
    for first in tqdm(range(0, len(cases), BATCH), desc="scenes", unit=" captions"):
        part = cases[first : first + BATCH]
        text_RT = text_BT[first : first + len(part)].repeat_interleave(MOST, dim=0)
        start = SEED + first * MOST
        tokens = generate(
            model.decoder,
            text_RT,
            seeds=range(start, start + len(text_RT)),
            scene=model.sampling.scene,
            image=model.sampling.scene,
            scene_only=True,
        )
        scenes = model.decode_scenes(tokens.scene)
        for number, case in enumerate(part):
            own = scenes[number * MOST : (number + 1) * MOST]
            turned = names_side(case.caption)
            mirrored = model.decode_scenes(model.encode_mirrored(own)) if turned else []
            words_1T = text_BT[first + number][None].to(model.device)
            kept, kept_own = (
                {
                    k: model.judge.choose(words_1T, [_join(own, others, k)])[0]
                    for k in range(1, MOST + 1)
                }
                for others in (mirrored, [])
            )
            verdicts = (_judge_all(case, scenes) for scenes in (own, mirrored))
            drawn.append(Drawn(case, *verdicts, kept, kept_own))
    return drawn


def _join(own: Sequence[T], mirrored: Sequence[T], count: int) -> list[T]:
    """The first `count` of both; one alone is no choice."""
    return [*own[:count], *(mirrored[:count] if count > 1 else ())]


def _judge_all(case: Case, scenes: Sequence[SceneMap]) -> list[Verdict]:
    """What holds in each scene; claims about pixels, of which there are none, are not asked for."""
    assert case.facts is not None
    things = [{k: v for k, v in thing.items() if k != "colour"} for thing in case.facts["things"]]
    facts = {**case.facts, "things": things}
    return [
        judge(facts, Seen(scene=scene, pixels_HWC=np.zeros((*scene.size, 3), np.uint8)))
        for scene in scenes
    ]


def _share(drawn: Sequence[Drawn], claim: str, count: int, *, best: bool) -> float:
    """Share of the claims that hold in the kept, or in the best of the first `count` scenes."""
    holds = []
    for one in drawn:
        first = one.first(count)
        chosen = max(first, key=_kept_share) if best else first[one.kept[count]]
        holds += chosen[claim]
    return sum(holds) / max(1, len(holds))


def _kept_share(verdict: Verdict) -> float:
    claims = [holds for some in verdict.values() for holds in some]
    return sum(claims) / max(1, len(claims))


def _print_relations(drawn: Sequence[Drawn], *, count: int) -> None:
    """How often each relation holds: in the first scene, the kept one, in any."""
    claimed, first, kept, anywhere = (Counter[str]() for _ in range(4))
    for one in drawn:
        for place, relation in enumerate(_relations(one.case)):
            claimed[relation] += 1
            first[relation] += one.own[0]["relation"][place]
            shown = one.first(count)
            kept[relation] += shown[one.kept[count]]["relation"][place]
            anywhere[relation] += any(verdict["relation"][place] for verdict in shown)
    print(f"\n{count} candidates: relation  claimed  first  kept  any")
    for relation, number in sorted(claimed.items()):
        row = f"{number:7d} {first[relation]:6d} {kept[relation]:5d} {anywhere[relation]:4d}"
        print(f"{relation:>24s}  {row}")


def _print_sides(drawn: Sequence[Drawn], *, count: int) -> None:
    """What holds of captions that name a side, with and without mirror images."""
    print(f"\n{count} candidates, {len(drawn)} captions that name a side: claims, first, kept,")
    print("kept of mirror images, too, best of all")
    for claim in ("number", "relation"):
        chosen = [
            [one.own[0] for one in drawn],
            [one.own[one.kept_own[count]] for one in drawn],
            [one.first(count)[one.kept[count]] for one in drawn],
            [max(one.first(count), key=_kept_share) for one in drawn],
        ]
        holds = [[kept for verdict in some for kept in verdict[claim]] for some in chosen]
        shares = "  ".join(f"{sum(some) / max(1, len(some)):.3f}" for some in holds)
        print(f"{claim:>10s} {len(holds[0]):6d}  {shares}")


def _relations(case: Case) -> list[str]:
    """The relations between two classes that a caption claims, as `judge` lists them."""
    assert case.facts is not None
    facts = case.facts
    return [
        relation["relation"]
        for relation in facts["relations"]
        if facts["things"][relation["subject"]]["class"]
        != facts["things"][relation["object"]]["class"]
    ]


if __name__ == "__main__":
    run_tool(main)

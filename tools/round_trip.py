"""How much of real scenes and pictures is left after a round trip through their tokens.

    python tools/round_trip.py --model park --input data/held-out --count 2000

In: a model, scene shards it has not seen. Out: the figures of `mas evaluate` for VQ-SEG and VQ-GAN,
as JSON, over as many scenes as are wanted, since nothing is sampled. Cost: 2,000 in four minutes of
two cores.
"""

import argparse
import json

from plain_errors import run_tool
from tqdm import tqdm

from mas import MakeAScene
from mas.cases import read_cases
from mas.examiner import Examiner
from mas.figures import measure_tokenizers, plain
from mas.vqseg import VQSEG


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="park", help="park, a model folder or a hub id")
    parser.add_argument("--vqseg", help="folder of another VQ-SEG than the model's")
    parser.add_argument("--input", required=True, help="scene shards")
    parser.add_argument("--count", type=int, default=2000, help="pictures, spread over the shards")
    options = parser.parse_args()
    cases = read_cases(options.input, options.count).cases
    model = MakeAScene.from_pretrained(options.model)
    if options.vqseg:
        model.vqseg = VQSEG.from_pretrained(options.vqseg).to(model.device)
    examiner = Examiner(model, None, seed=0, batch=16)
    with tqdm(total=len(cases), desc="tokenizers", unit=" pictures") as examiner.bar:
        print(json.dumps(plain(measure_tokenizers(examiner, cases)), indent=1))


if __name__ == "__main__":
    run_tool(main)

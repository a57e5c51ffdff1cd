"""Gives a trained VQ-SEG more codes, so that less is rounded away, and tunes its decisions.

    python tools/split_codes.py --vqseg runs/park/vqseg --input data/scenes --codes 4096 \\
        --output runs/park/vqseg-codes

In: a VQ-SEG folder and scenes of its training. Out: a VQ-SEG folder, in int8. All tokens change, so
a GPT must be trained on the new ones. Codes that round away most are split (LBG, see
`mas.vq_codebook.split_codes`); half of the scenes they are split on hold people, where the shards
have as many: human parts are what codes draw worst. Cost: three and a half minutes of two cores for
4,000 scenes at 128 px.
"""

import argparse
import dataclasses

import torch
from plain_errors import run_tool
from tqdm import tqdm

from mas.scene import HUMAN_IDS
from mas.storage import save_network
from mas.vq_codebook import split_codes
from mas.vqseg import VQSEG
from mas.vqseg_tune import tune_decisions
from train.assemble import read_scenes

AT_ONCE = 32  # scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vqseg", required=True, help="folder of a trained VQ-SEG")
    parser.add_argument("--input", required=True, help="scene shards of its training")
    parser.add_argument("--codes", type=int, required=True, help="how many there shall be")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=4000, help="scenes to split on")
    parser.add_argument("--tune-count", type=int, default=600, help="scenes to tune on; 0: do not")
    parser.add_argument("--seed", type=int, default=0, help="of the k-means")
    options = parser.parse_args()
    trained = VQSEG.from_pretrained(options.vqseg)
    config = trained.config
    if config.quantizer != "nearest":
        raise SystemExit(
            f"{options.vqseg} has a {config.quantizer} codebook: only nearest is split"
        )
    if options.count < 2:
        raise SystemExit(f"--count is {options.count}, use 2 or more scenes")
    vectors_NC = read_features(trained, options.input, options.count)
    generator = torch.Generator().manual_seed(options.seed)
    rows_KC = split_codes(
        trained.quantizer.codebook.detach(), vectors_NC, options.codes, generator=generator
    )
    network = VQSEG(dataclasses.replace(config, codes=options.codes)).eval().requires_grad_(False)
    quantizer = {"quantizer.codebook": rows_KC, "quantizer.usage": torch.ones(len(rows_KC))}
    quantizer["quantizer.usage"] /= len(rows_KC)
    network.load_state_dict(trained.state_dict() | quantizer)
    save_network(network, options.output, weights="int8")
    network = VQSEG.from_pretrained(options.output)  # tuned as it will be read
    if options.tune_count:
        tuned = tune_decisions(
            network, *read_scenes(options.input, options.tune_count, config.size)
        )
        print(f"tuned: mean IoU {tuned.before:.3f}, now {tuned.after:.3f} on these scenes")
        save_network(network, options.output, weights="int8")


@torch.no_grad()
def read_features(network: VQSEG, shards: str, count: int) -> torch.Tensor:
    """Features before they are rounded to codes, N C; half of the scenes hold people if any do."""
    labels_BHW, edges_BHW = read_scenes(shards, 2 * count, network.config.size)
    people_B = torch.isin(labels_BHW, torch.tensor(HUMAN_IDS, dtype=torch.uint8)).any(2).any(1)
    chosen = [which.nonzero()[:, 0][: count // 2] for which in (people_B, ~people_B)]
    features = []
    for part in tqdm(torch.cat(chosen).split(AT_ONCE), desc="features"):
        z_BCHW = network.encode_features(labels_BHW[part], edges_BHW[part])
        features.append(z_BCHW.permute(0, 2, 3, 1).flatten(0, 2))
    return torch.cat(features)


if __name__ == "__main__":
    run_tool(main)

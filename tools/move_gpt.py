"""Gives a trained GPT the tokens of another VQ-SEG, so that training goes on instead of anew.

    python tools/move_gpt.py --gpt runs/park/gpt-first --before runs/park/vqseg-second \\
        --after runs/park/vqseg-codes --input data/scenes --output runs/park/gpt-moved

In: a GPT folder, the VQ-SEG of its tokens, the new one, and scenes of their training. Out: a GPT
folder for `mas train gpt --model.init_from`. Text and image must be tokenized as before; which
tokens it knows is not checked any more: the folder has no tokens.json. `train/moving.py` says how.
Cost: seven minutes of a core (8,000 scenes at 128 px).
"""

import argparse

from plain_errors import run_tool

from mas.gpt import GPT
from mas.storage import save_network
from mas.vqseg import VQSEG
from train.assemble import read_scenes
from train.moving import check_sizes, count_pairs, move, shares


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpt", required=True, help="folder of a trained GPT")
    parser.add_argument("--before", required=True, help="folder of the VQ-SEG of its tokens")
    parser.add_argument("--after", required=True, help="folder of the VQ-SEG it shall read")
    parser.add_argument("--input", required=True, help="scene shards of their training")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=8000, help="scenes to count on")
    options = parser.parse_args()
    gpt = GPT.from_pretrained(options.gpt)
    before, after = (VQSEG.from_pretrained(path) for path in (options.before, options.after))
    check_sizes(gpt, before, after)
    scenes = read_scenes(options.input, options.count, before.config.size)
    counts_AB = count_pairs(before, after, *scenes, show=True)
    save_network(move(gpt, counts_AB), options.output, weights="float16")
    seen_B = counts_AB.sum(0) > 0
    largest_B = shares(counts_AB).amax(0)
    print(
        f"{options.output}: {int(seen_B.sum())} of {len(seen_B)} new codes seen; "
        f"an old code makes up {float(largest_B[seen_B].mean()):.0%} of one on average"
    )


if __name__ == "__main__":
    run_tool(main)

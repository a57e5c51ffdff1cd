"""`mas train STAGE`: one trained thing, one config file, one run folder.

In: a YAML (configs/) and overrides on the command line, parsed by LightningCLI from the signatures
of the stage's module and data: typed, `--print_config`, unknown keys refused. Out: a run folder.
Only a run imports Lightning; the usage appears at once.
"""

from __future__ import annotations

import sys

STAGES = ("vqseg", "vqgan", "gpt", "reader", "judge", "refiner")
USAGE = """usage: mas train STAGE --config FILE.yaml [--ckpt_path last] [--KEY VALUE ...]

  vqseg    scene maps ↔ scene tokens      (reads scene shards)
  vqgan    pictures ↔ image tokens        (reads scene shards)
  gpt      text → scene → image tokens    (reads token shards)
  reader   pictures → what they show      (reads scene shards; for mas evaluate)
  judge    scenes → how well they fit     (reads scene shards; for mas sample)
  refiner  decoded pictures → sharper     (reads scene shards; for mas sample)

mas train STAGE --help lists every key; --print_config prints the config with all defaults."""


def train(arguments: list[str]) -> int:
    """Trains the stage named first; returns 0, 2 without a stage, 128 + signal when stopped.

    Raises:
        ValueError: data, checkpoint or settings that cannot be used, in one line.
    """
    if not arguments or arguments[0] not in STAGES:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        if arguments and not asked:
            print(f"mas train: error: no stage {arguments[0]!r}", file=sys.stderr)
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    from train.runner import run

    return run(arguments[0], arguments[1:])

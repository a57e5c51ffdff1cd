"""Runs `mas preprocess` on a cluster with gated workers: INPUT OUTPUT GATES [ADDRESS]."""

import logging
import os
import sys
from functools import partial

import gated_worker
from ray import cloudpickle

import preprocess.run
from preprocess.photo import PhotoConfig
from preprocess.segment import FaceConfig, HumanConfig


def main(input, output, gates, address=None):
    cloudpickle.register_pickle_by_value(gated_worker)  # Ray's processes lack tests/
    preprocess.run.lacks_of_sources = partial(gated_worker.lacks, gates)
    preprocess.run.SceneWorker = partial(gated_worker.GatedWorker, gates)
    return preprocess.run.preprocess(
        preprocess.run.PreprocessConfig(
            input=input,
            output=output,
            photo=PhotoConfig(size=48, min_side=16),
            human=HumanConfig(source="none"),
            face=FaceConfig(source="none"),
            batch_size=2,
            executor="ray" if address else "serial",
            workers=int(os.environ.get("WORKERS", 2)),
            address=address,
        )
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("preprocess").setLevel(logging.INFO)
    try:
        sys.exit(main(*sys.argv[1:]))
    except OSError as error:
        sys.exit(f"error: {error}")

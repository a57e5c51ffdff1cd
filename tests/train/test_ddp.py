"""Two processes train as one (DDP over gloo): every sample once an epoch, also after a resume."""

import json
import os
import signal
import socket

import pytest
import torch
from processes import finish, start

from train.stage import Stage

RANKS = (0, 1)
BATCH = 3  # a rank
PICTURES = 20  # an epoch: three steps and a third, so that epochs begin within a step
STEPS = 10  # of six pictures: three epochs


@pytest.fixture
def launch(words, tmp_path):
    """launch(folder, before): runs both ranks as torchrun does; `before` is called in rank 1."""

    def launch(folder, before=None):
        recorder = {
            "class_path": "recorder.Recorder",
            "init_args": {"folder": seen_in(tmp_path, folder)},
        }
        arguments = words(
            "vqseg",
            folder,
            trainer__max_steps=STEPS,
            trainer__devices=len(RANKS),
            trainer__strategy="ddp",
            trainer__callbacks=json.dumps([recorder]),
            checkpoints__every_n_steps=1,
            data__batch_size=BATCH,
            ckpt_path="auto",
        )
        environment = torchrun_environment()
        processes = [
            start(
                arguments,
                log=tmp_path / f"{folder}.{rank}.log",
                environment=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                before=before if rank == 1 else None,
            )
            for rank in RANKS
        ]
        return finish(*processes)

    return launch


def torchrun_environment():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(RANKS)),
        "LOCAL_WORLD_SIZE": str(len(RANKS)),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "none",
    }


def seen_in(tmp_path, folder):
    return str(tmp_path / f"{folder} saw")


def collect(tmp_path, folder):
    """(sample number, key) of what both ranks trained on and the last checkpoint holds."""
    step, _ = trained(tmp_path / folder)
    samples = []
    for rank in RANKS:
        path = f"{seen_in(tmp_path, folder)}/{rank}.txt"
        with open(path) as file:
            lines = [line.split() for line in file]
        samples += [(int(number), key) for at, number, key in lines if int(at) <= step]
        os.remove(path)
    return samples


def trained(folder):
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint["global_step"], checkpoint["state_dict"]


def assert_each_once_an_epoch(samples):
    numbers, keys = zip(*sorted(samples), strict=True)
    assert list(numbers) == list(range(STEPS * BATCH * len(RANKS)))
    epochs = [keys[start : start + PICTURES] for start in range(0, len(keys), PICTURES)]
    assert [len(set(epoch)) for epoch in epochs] == [PICTURES] * 3
    assert len(set(keys)) == PICTURES
    assert epochs[0] != epochs[1] != epochs[2]


def at_step(step, number):
    """Sends this process a signal as optimiser step `step` (from 0) begins."""
    original = Stage.on_train_batch_start

    def hook(self, batch, batch_idx):
        if self.global_step == step:
            os.kill(os.getpid(), number)
        original(self, batch, batch_idx)

    Stage.on_train_batch_start = hook


def kill_at_step_5():
    at_step(5, signal.SIGKILL)


def terminate_at_step_3():
    at_step(3, signal.SIGTERM)


@pytest.mark.slow
def test_every_sample_is_seen_once_an_epoch_before_and_after_a_rank_was_killed(launch, tmp_path):
    assert launch("straight") == [0, 0]
    assert_each_once_an_epoch(collect(tmp_path, "straight"))

    status = launch("killed", kill_at_step_5)
    assert status[1] == -signal.SIGKILL and status[0] != 0  # the other rank does not wait for it
    step, _ = trained(tmp_path / "killed")
    assert step == 5  # 30 samples: half of the second epoch
    before = collect(tmp_path, "killed")
    assert launch("killed") == [0, 0]
    assert_each_once_an_epoch(before + collect(tmp_path, "killed"))

    straight, resumed = (trained(tmp_path / folder) for folder in ("straight", "killed"))
    assert straight[0] == resumed[0] == STEPS
    assert all(torch.equal(weight, resumed[1][name]) for name, weight in straight[1].items())


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(launch, tmp_path):
    assert launch("stopped", terminate_at_step_3)[1] == 128 + signal.SIGTERM
    assert trained(tmp_path / "stopped")[0] == 4
    before = collect(tmp_path, "stopped")
    assert len(before) == 4 * BATCH * len(RANKS)
    assert launch("stopped") == [0, 0]
    assert_each_once_an_epoch(before + collect(tmp_path, "stopped"))

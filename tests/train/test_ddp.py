"""Two processes train as one (DDP over gloo): every sample once an epoch, also after a resume.

They are started as torchrun and as SLURM start them, and by the scripts of configs/cluster.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import LIMIT, finish, start

from train.stage import Stage

CLUSTER = Path(__file__).parents[2] / "configs/cluster"

RANKS = (0, 1)
BATCH = 3  # a rank
PICTURES = 20  # an epoch: three steps and a third, so that epochs begin within a step
STEPS = 10  # of six pictures: three epochs


@pytest.fixture
def launch(words, tmp_path):
    """launch(folder, before): runs both ranks as torchrun does; `before` is called in rank 1.

    `alike` is called in both.
    """

    def launch(
        folder, before=None, environment=torchrun_environment, stage="vqseg", alike=None, **changed
    ):
        recorder = {
            "class_path": "recorder.Recorder",
            "init_args": {"folder": seen_in(tmp_path, folder)},
        }
        settings = {
            "trainer__max_steps": STEPS,
            "trainer__devices": len(RANKS),
            "trainer__strategy": "ddp",
            "trainer__callbacks": json.dumps([recorder]),
            "checkpoints__every_n_steps": 1,
            "data__batch_size": BATCH,
            "ckpt_path": "auto",
        }
        arguments = words(stage, folder, **settings | changed)
        port = free_port()
        processes = [
            start(
                arguments,
                log=tmp_path / f"{folder}.{rank}.log",
                environment=environment(rank, port),
                before=before if before and rank == 1 else alike,
            )
            for rank in RANKS
        ]
        return finish(*processes)

    return launch


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def torchrun_environment(rank, port):
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(len(RANKS)),
        "LOCAL_WORLD_SIZE": str(len(RANKS)),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


def slurm_environment(rank, port):
    return {
        "MASTER_PORT": port,
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(len(RANKS)),
        "SLURM_NTASKS_PER_NODE": str(len(RANKS)),
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
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
    assert status == [1, -signal.SIGKILL]  # the other rank does not wait for it
    said = (tmp_path / "killed.0.log").read_text()
    assert "another process of this training has ended" in said and "Traceback" not in said
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


def terminate_amid_validation():
    original = Stage.on_validation_batch_start

    def hook(self, batch, batch_idx, dataloader_idx=0):
        assert batch_idx < 2, "the rest of the validation was not left out"
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, batch, batch_idx, dataloader_idx)

    Stage.on_validation_batch_start = hook


def test_a_signal_to_one_rank_amid_validation_stops_all_within_a_step(launch, tmp_path):
    settings = {"data__holdout": 2, "data__batch_size": 1, "trainer__val_check_interval": 2}
    stopped = launch("stopped", terminate_amid_validation, trainer__callbacks="[]", **settings)
    assert stopped[1] == 128 + signal.SIGTERM
    assert trained(tmp_path / "stopped")[0] == 3
    assert not (tmp_path / "stopped/checkpoints/best.ckpt").exists()


def compile_quickly():
    """Traces as torch.compile does, and leaves out generating code: that takes a minute a rank."""
    original = torch.nn.Module.compile

    def compile(part):
        print("compiled a part")
        original(part, backend="aot_eager")

    torch.nn.Module.compile = compile


@pytest.mark.slow
def test_compiled_blocks_train_the_same_weights_on_two_ranks(launch, tmp_path):
    settings = {"trainer__max_steps": 3, "trainer__val_check_interval": 2, "stage": "gpt"}
    settings["model__network__dropout"] = 0
    for compiled in ("false", "true"):
        status = launch(compiled, alike=compile_quickly, model__compile=compiled, **settings)
        assert status == [0, 0]
        said = [(tmp_path / f"{compiled}.{rank}.log").read_text() for rank in RANKS]
        assert [log.count("compiled a part") for log in said] == [2 * (compiled == "true")] * 2
    (_, eager), (_, fused) = (trained(tmp_path / folder) for folder in ("false", "true"))
    torch.testing.assert_close(dict(fused), dict(eager))


def test_processes_that_do_not_find_each_other_are_told_why(words, tmp_path):
    settings = {"trainer__max_steps": 1, "trainer__devices": len(RANKS)}
    arguments = words("vqseg", "run", trainer__strategy="ddp", **settings)
    with socket.create_server(("", 0)) as taken:
        environment = torchrun_environment(0, str(taken.getsockname()[1]))
        process = start(arguments, log=tmp_path / "log", environment=environment)
        assert finish(process) == [1]
    said = (tmp_path / "log").read_text()
    assert "cannot be reached" in said and "address already in use" in said
    assert "Traceback" not in said


def test_ranks_agree_on_which_checkpoint_is_best(launch, tmp_path):
    """Of the loss of a training step every rank has logged its own."""
    settings = {"checkpoints__monitor": "train/loss", "trainer__val_check_interval": 1}
    assert launch("best", **settings) == [0, 0]
    best = torch.load(tmp_path / "best/checkpoints/best.ckpt", weights_only=True)
    assert 0 < best["callbacks"]["Checkpoints"]["best"] < float("inf")


def test_ranks_agree_on_when_the_patience_ends_a_run(launch, tmp_path):
    rising = {"checkpoints__monitor": "learning_rate", "model__optimiser__warmup_steps": 100}
    settings = {"trainer__val_check_interval": 2, "checkpoints__patience": 3}
    assert launch("patient", **rising, **settings) == [0, 0]
    last = torch.load(tmp_path / "patient/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 6  # 4 is two steps after the best
    said = [(tmp_path / f"patient.{rank}.log").read_text() for rank in RANKS]
    assert ["no better than at step 2" in log for log in said] == [True, False]


def test_tasks_of_slurm_find_each_other(launch, tmp_path):
    assert launch("slurm", environment=slurm_environment) == [0, 0]
    assert_each_once_an_epoch(collect(tmp_path, "slurm"))


@pytest.mark.slow
def test_the_torchrun_script_trains(words, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    torchrun = tools / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    done = subprocess.run(
        ["bash", CLUSTER / "torchrun.sh", *words("vqseg", trainer__max_steps=2)],
        env={
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PORT": free_port(),
            "GPUS": str(len(RANKS)),
        },
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"consumed": 16}]


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (143, True)])
def test_the_slurm_script_queues_itself_again_only_when_it_was_told_to_stop(
    status, requeued, tmp_path
):
    for name, content in (
        ("srun", f'echo "$@" > {tmp_path}/asked; exit {status}'),
        ("scontrol", f'echo "$@" > {tmp_path}/told'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{content}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", CLUSTER / "slurm-train.sh", "gpt", "--config", "c.yaml"],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS_PER_NODE": "8",
        },
        cwd=tmp_path,
    )
    assert done.returncode == status
    command = (tmp_path / "asked").read_text()
    assert "mas train gpt --trainer.num_nodes 2 --trainer.devices 8" in command
    assert command.endswith("--ckpt_path auto --config c.yaml\n")
    told = tmp_path / "told"
    assert told.exists() == requeued and (not requeued or told.read_text() == "requeue 7\n")


def test_ranks_that_were_refused_can_be_started_again(launch, tmp_path):
    assert launch("refused", data__batch_size=11) == [1, 1]
    for rank in RANKS:
        log = (tmp_path / f"refused.{rank}.log").read_text()
        assert "24 pictures (20 without those held out) are fewer than one batch of 22" in log
    assert launch("refused", trainer__max_steps=1) == [0, 0]

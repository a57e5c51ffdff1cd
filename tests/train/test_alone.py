"""A run folder belongs to one training at a time; all ranks of that one may enter."""

import os
import sys
import time

import pytest

import mas.lock
from train.alone import LOCK, alone, is_first
from train.cli import train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no locks there")


def test_a_second_training_in_a_run_folder_is_refused_and_the_first_ends_well(
    words, at_step, tmp_path
):
    half_written = tmp_path / "run/checkpoints/.last.ckpt.abc.tmp"
    refused = []

    def start_another():
        half_written.parent.mkdir(exist_ok=True)
        half_written.touch()
        for way in ([], ["--ckpt_path=auto"]):
            with pytest.raises(ValueError) as caught:
                train([*words("vqseg", trainer__max_steps=2), *way])
            refused.append(str(caught.value))

    at_step(1, start_another)
    assert train(words("vqseg", trainer__max_steps=2)) == 0
    assert len(refused) == 2
    for message in refused:
        start = f"another training is at work in {tmp_path}/run (process {os.getpid()} on "
        assert message.startswith(start) and message.endswith("another --trainer.default_root_dir")
    assert half_written.exists()
    assert not (tmp_path / "run" / LOCK).exists()
    at_step(None)
    assert train([*words("vqseg", trainer__max_steps=3), "--ckpt_path=last"]) == 0


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),  # torchrun under srun
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # Lightning's own, in a job of one task
        ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
    ],
)
def test_of_the_ranks_of_a_training_the_first_alone_takes_the_lock(
    environment, first, tmp_path, monkeypatch
):
    assert is_first(environment) == first
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    with alone(tmp_path):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if first:
            with pytest.raises(ValueError, match="another training is at work"), alone(tmp_path):
                pass
        else:
            with alone(tmp_path):
                pass
        assert (tmp_path / LOCK).exists()


def test_a_process_that_a_killed_training_leaves_behind_does_not_hold_its_folder(tmp_path):
    """Processes that read go on for seconds."""
    ready, begun = os.pipe()
    with alone(tmp_path):
        child = os.fork()
        if not child:
            os.write(begun, b"x")
            time.sleep(600)
        os.read(ready, 1)
        path = tmp_path / LOCK
        os.rename(path, tmp_path / "kept")  # as if nobody were there to remove it
    try:
        os.rename(tmp_path / "kept", path)
        with alone(tmp_path):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(begun)


def test_without_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(mas.lock.fcntl, "flock", refuse)
    with alone(tmp_path), alone(tmp_path):
        pass


def test_a_new_folder_that_stays_empty_is_removed_again(tmp_path):
    with alone(tmp_path / "new/run"):
        assert (tmp_path / "new/run" / LOCK).exists()
    assert not (tmp_path / "new").exists()
    with alone(tmp_path / "new/run"):
        (tmp_path / "new/run/config.yaml").touch()
    assert [path.name for path in (tmp_path / "new/run").iterdir()] == ["config.yaml"]

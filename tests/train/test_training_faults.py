"""Whatever stops a run: what lies on its disk is whole, and going on equals not having stopped."""

import csv
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from processes import LIMIT, run

from mas import shard_files
from mas.gpt import GPT
from train.callbacks import Checkpoints

STEPS = 3
KILLED = 2  # the step whose checkpoint is disturbed; the one before is whole
MOMENTS = 10


@pytest.fixture
def arguments(words):
    """arguments(folder): the command line of a run that saves after every step."""

    def make(folder, **changed):
        settings = dict(trainer__max_steps=STEPS, checkpoints__every_n_steps=1, ckpt_path="auto")
        return words("gpt", folder, **settings | changed)

    return make


def while_saving(act):
    """Has `act(save)` call the `save` that writes the checkpoint of step KILLED."""
    original = Checkpoints.on_train_batch_end

    def hook(self, trainer, *arguments):
        save = partial(original, self, trainer, *arguments)
        return act(save) if trainer.global_step == KILLED else save()

    Checkpoints.on_train_batch_end = hook


def count_calls(path):
    """Writes down how many calls and returns of functions saving takes."""

    def act(save):
        count = [0]
        sys.setprofile(lambda *event: count.__setitem__(0, count[0] + 1))
        save()
        sys.setprofile(None)
        path.write_text(str(count[0]))

    while_saving(act)


def signal_at_call(number, moment):
    """Sends this process a signal at the moment-th call or return of a function while saving."""

    def act(save):
        left = moment

        def profile(frame, event, argument):
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), number)

        sys.setprofile(profile)
        save()
        sys.setprofile(None)

    while_saving(act)


class Deadly(io.FileIO):
    """A file whose writer is killed once `limit` bytes are in it."""

    limit = 0

    def write(self, content):
        part = memoryview(content)[: self.limit - self.tell()]
        written = super().write(part)
        if self.tell() == self.limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return written


def kill_at_byte(limit):
    """Kills this process when `limit` bytes of the checkpoint are written."""

    def act(save):
        Deadly.limit = limit
        shard_files.open = Deadly
        save()

    while_saving(act)


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def read_step(folder):
    path = folder / "checkpoints/last.ckpt"
    return torch.load(path, weights_only=True)["global_step"] if path.exists() else 0


def hidden(folder):
    return [path for path in folder.rglob(".*.tmp")]


def assert_went_on_as_if_nothing_had_happened(run_folder, straight):
    checkpoints = [
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        for folder in (run_folder, straight)
    ]
    for part in ("state_dict", "current_model_state"):
        ours, theirs = (checkpoint[part] for checkpoint in checkpoints)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (GPT.from_pretrained(folder).state_dict() for folder in (run_folder, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (
        list(csv.DictReader((folder / "metrics.csv").open())) for folder in (run_folder, straight)
    )
    # A run killed between saving a step and logging it has no row of that step.
    missing = [row for row in theirs if row not in ours]
    assert all(row in theirs for row in ours) and len(missing) <= 1
    assert all(int(row["step"]) == KILLED - 1 for row in missing)
    assert not hidden(run_folder)


@pytest.fixture
def straight(arguments, tmp_path):
    """The folder of a run that nothing happened to, with the number of calls a save takes."""
    before = partial(count_calls, tmp_path / "calls")
    assert run(arguments("straight"), log=tmp_path / "log", before=before) == 0
    return tmp_path / "straight"


@pytest.mark.slow
def test_killed_at_any_moment_of_saving_a_run_goes_on_from_a_whole_checkpoint(
    arguments, straight, tmp_path
):
    rng = np.random.default_rng(0)
    calls = int((tmp_path / "calls").read_text())
    size = (straight / "checkpoints/last.ckpt").stat().st_size
    half = MOMENTS // 2
    shares = (np.arange(half) + rng.random(half)) / half  # one in each fifth
    moments = [partial(kill_at_byte, 1 + int(share * (size - 1))) for share in shares]
    moments += [partial(signal_at_call, signal.SIGKILL, 1 + int(s * calls)) for s in shares]
    found = []
    for number, before in enumerate(moments):
        name, log = f"killed {number}", tmp_path / f"log {number}"
        assert run(arguments(name), log=log, before=before) == -signal.SIGKILL
        found.append((read_step(tmp_path / name), bool(hidden(tmp_path / name))))
        GPT.from_pretrained(tmp_path / name)  # whole as well
        assert run(arguments(name), log=log) == 0
        assert_went_on_as_if_nothing_had_happened(tmp_path / name, straight)
    assert found[:half] == [(KILLED - 1, True)] * half  # by bytes: half a file, not picked up
    assert {step for step, _ in found[half:]} == {KILLED - 1, KILLED}  # before and after renaming


def test_half_a_checkpoint_alone_is_no_checkpoint(arguments, straight, tmp_path):
    before = partial(kill_at_byte, 1000)
    name, log = "killed", tmp_path / "killed.log"
    first = arguments(name, checkpoints__every_n_steps=KILLED)
    assert run(first, log=log, before=before) == -signal.SIGKILL
    assert hidden(tmp_path / name) and not read_step(tmp_path / name)
    assert run(arguments(name, ckpt_path="last"), log=log) == 1
    assert "there is no checkpoint" in log.read_text().splitlines()[-1]
    assert run(arguments(name), log=log) == 0  # auto: from the start
    assert_went_on_as_if_nothing_had_happened(tmp_path / name, straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_saving_waits_for_the_save(number, arguments, straight, tmp_path):
    moment = int((tmp_path / "calls").read_text()) // 4  # while the checkpoint is put together
    name, log = "stopped", tmp_path / "stopped.log"
    before = partial(signal_at_call, number, moment)
    assert run(arguments(name), log=log, before=before) == 128 + number
    assert KILLED <= read_step(tmp_path / name) <= STEPS
    assert "Traceback" not in log.read_text()
    assert run(arguments(name), log=log) == 0
    assert_went_on_as_if_nothing_had_happened(tmp_path / name, straight)


@pytest.mark.parametrize("room", [0.5, 0.999], ids=["while written", "when closed"])
def test_a_file_that_cannot_grow_stops_the_run_with_one_line(arguments, straight, tmp_path, room):
    name, log = "limited", tmp_path / "limited.log"
    assert run(arguments(name, trainer__max_steps=1), log=log) == 0
    last = tmp_path / name / "checkpoints/last.ckpt"
    whole = last.read_bytes()
    log.unlink()
    before = partial(limit_files, int(room * len(whole)))
    assert run(arguments(name), log=log, before=before) == 1
    assert_one_line(log.read_text(), "File too large", "last.ckpt")
    assert last.read_bytes() == whole and not hidden(tmp_path / name)
    assert run(arguments(name), log=log) == 0


def assert_one_line(told, *words):
    error = told.rstrip().splitlines()[-1]
    assert error.startswith("mas: error: ") and all(word in error for word in words), told
    assert told.count("error") == 1 and "Traceback" not in told, told


def can_mount():
    return (
        shutil.which("unshare")
        and not subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
        ).returncode
    )


REAL_DISK = """
mount -t tmpfs -o size="$SIZE" tmpfs "$DISK" && cp -r "$RUN" "$DISK"/run
"$@"; echo "status $?"
cp -r "$DISK"/run "$RUN"-full
"""


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a tmpfs")
def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(arguments, straight, tmp_path):
    name, disk = "begun", tmp_path / "disk"
    disk.mkdir()
    assert run(arguments(name, trainer__max_steps=1), log=tmp_path / "log") == 0
    whole = (tmp_path / name / "checkpoints/last.ckpt").read_bytes()
    command = [sys.executable, "-m", "mas", "train", *arguments("disk/run")]
    used = sum(path.stat().st_size for path in (tmp_path / name).rglob("*"))
    printed = subprocess.run(
        ["unshare", "-rm", "sh", "-c", REAL_DISK, "sh", *command],
        env={
            **os.environ,
            "DISK": str(disk),
            "RUN": str(tmp_path / name),
            "SIZE": str(used + len(whole) // 2),
        },
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert "status 1" in printed.stdout
    assert_one_line(printed.stderr, "No space left", "last.ckpt")
    full = tmp_path / f"{name}-full"
    assert (full / "checkpoints/last.ckpt").read_bytes() == whole and not hidden(full)
    assert run(arguments(full.name), log=tmp_path / "log") == 0
    assert_went_on_as_if_nothing_had_happened(full, straight)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(path):
    content = bytearray(path.read_bytes())
    content[3:40] = os.urandom(37)
    path.write_bytes(content)


def write_other_tokens(path):
    array = np.load(path)
    array[:, 0] = 60_000
    np.save(path, array)


@pytest.mark.parametrize("damage", [cut, damage_header, write_other_tokens, os.remove])
@pytest.mark.parametrize("stream", ["text", "scene", "image"])
def test_a_damaged_token_shard_is_named(damage, stream, arguments, token_shards, tmp_path):
    tokens = tmp_path / "tokens"
    shutil.copytree(token_shards, tokens)
    damage(tokens / f"00000.{stream}.npy")
    log = tmp_path / "log"
    whole_epoch = arguments("run", data__input=tokens, trainer__max_steps=6)
    assert run(whole_epoch, log=log) == 1
    assert_one_line(log.read_text(), f"00000.{stream}.npy", "remove 00000.stats.json")


def test_damage_that_a_worker_finds_ends_the_run(arguments, token_shards, tmp_path):
    tokens = tmp_path / "tokens"
    shutil.copytree(token_shards, tokens)
    image = np.load(tokens / "00000.image.npy")
    image[9, 3] = 60_000
    np.save(tokens / "00000.image.npy", image)
    log = tmp_path / "log"
    whole_epoch = arguments("run", data__input=tokens, trainer__max_steps=6, data__workers=2)
    assert run(whole_epoch, log=log) == 1
    assert_one_line(log.read_text(), "picture 9 has token 60000", "tokenize again")

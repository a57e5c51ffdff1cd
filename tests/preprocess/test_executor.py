import errno
import json
import os
import socket
import subprocess
import threading
import time
from functools import partial

import pytest
from counted_world import NAMES
from counting_worker import BrokenWorker, CountingWorker

from mas.shards import ShardError
from preprocess.executor import ExecutorConfig, Summary, execute
from preprocess.executor import _take_in as take_in
from preprocess.progress import ProgressBar
from preprocess.run_folder import FolderError, RunFolder
from preprocess.runner import Job, Outcome, Runner


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("preprocess.runner.WAIT_SECONDS", (0.0, 0.0))


@pytest.fixture(params=["serial", "ray"])
def kind(request):
    if request.param == "ray":
        request.getfixturevalue("local_ray")
    return request.param


WANTED = {f"{name}.txt": f"made of source {name}" for name in NAMES}
TIDY = {"run.json", *WANTED, *(f"{name}.stats.json" for name in NAMES)}


def test_every_job_is_done_once_and_nothing_else_is_left(world, kind):
    summary = world.run(kind)
    assert (summary.done, summary.skipped, summary.failed, summary.status) == (6, 0, {}, 0)
    assert world.results() == WANTED and set(world.names("*")) == TIDY
    assert set(world.names(".*")) <= {".", ".."}
    again = world.run(kind)
    assert (again.done, again.skipped) == (0, 6)


def test_only_what_is_missing_is_made_again(world):
    world.run()
    for name in ("00001.stats.json", "00004.stats.json", "00004.txt"):
        (world.output / name).unlink()
    (world.output / "00001.txt").write_text("half written")
    (world.output / "00004.running.json").write_text('{"attempt": 3}')  # its run was killed
    summary = world.run()
    assert (summary.done, summary.skipped) == (2, 4)
    assert world.results() == WANTED and set(world.names("*")) == TIDY


def test_bad_data_is_set_aside_and_the_others_go_on(world):
    world.plan(n00002="data data")
    summary = world.run()
    assert summary.failed == {"00002": "the data is bad"} and summary.status == 1
    assert len(world.results()) == 5
    assert json.loads((world.output / "00002.error.json").read_text())["traceback"]

    again = world.run()
    assert again.failed.keys() == {"00002"} and (again.done, again.skipped) == (0, 5)

    world.plan(n00002="")
    mended = world.run(retry_failed=True)
    assert mended.status == 0 and world.results() == WANTED and set(world.names("*")) == TIDY


def test_a_failure_counts_for_the_settings_and_the_input_it_was_met_with(world, caplog):
    caplog.set_level("INFO")
    bad = {f"n{name}": "data" for name in NAMES}
    world.plan(**bad)
    assert world.run().failed.keys() == set(NAMES)
    world.plan(n00000="data")
    assert world.run().failed.keys() == set(NAMES) and not caplog.messages[len(NAMES) :]
    other = {"photo": {"size": 9}}
    assert world.run(settings=other).failed == {"00000": "the data is bad"}
    assert "6 shards that failed with other settings or input are tried again" in caplog.messages
    assert world.run(settings=other).failed == {"00000": "the data is bad"}
    job = Job("00000", "mended", fingerprint="of another size")
    assert world.run(jobs=[job], settings=other).done == 1
    assert not world.names("*.error.json")


def test_a_failure_of_an_older_version_counts(world):
    """It does not tell its settings."""
    world.plan(n00000="data")
    world.run()
    path = world.output / "00000.error.json"
    path.write_text(json.dumps({"error": "the data was bad"}))
    assert world.run().failed == {"00000": "the data was bad"}


def test_passing_trouble_is_tried_again(world):
    world.plan(n00000="network", n00003="bug network", n00004="bug bug bug")
    summary = world.run()
    assert summary.failed == {"00004": "RuntimeError('a bug')"}
    assert len(world.results()) == 5


def test_a_run_in_which_nothing_works_does_not_go_through_all_shards(world):
    """As when the memory of a GPU is too small for the batch: every shard would be set aside."""
    world.plan(**{f"n{name}": "bug bug bug" for name in NAMES[:5]})
    with pytest.raises(
        OSError, match=r"^5 shards failed .* RuntimeError\('a bug'\) .*--retry-failed"
    ):
        world.run()
    assert world.names("*.error.json") == [f"{name}.error.json" for name in NAMES[:5]]
    summary = world.run(retry_failed=True)
    assert summary.status == 0 and world.results() == WANTED and set(world.names("*")) == TIDY


@pytest.mark.parametrize("first", ["", "data"])
def test_a_run_in_which_something_works_goes_on(world, first):
    """And bad data tell nothing of the machine."""
    kind = "bug bug bug" if not first else "data"
    world.plan(n00000=first, **{f"n{name}": kind for name in NAMES[1:]})
    assert len(world.run().failed) == 5 + bool(first)


def test_the_last_shards_may_all_fail(world):
    """Nothing is left that would have to be kept from failing: the run tells of them at its end."""
    bad = {f"n{name}": "bug bug bug" for name in NAMES[1:]}
    for retry in (False, True):
        world.plan(**bad)
        summary = world.run(retry_failed=retry)
        assert (summary.skipped, len(summary.failed)) == (int(retry), 5)


def test_of_many_workers_each_may_fail_once_before_a_run_is_given_up(world):
    """Bad shards end within seconds, good ones may take an hour."""
    bar = ProgressBar(RunFolder(str(world.output)), 100, unit="item")
    bad = [Outcome(str(number), error="killed its worker", host="node") for number in range(8)]
    bar.workers = 8
    assert take_in([*bad[:7], Outcome("good", stats={})], Summary(100), bar) == ["good"]
    with pytest.raises(OSError, match=r"^8 shards failed and none was made"):
        take_in(bad, Summary(100), bar)


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(world):
    world.plan(n00001="full")
    with pytest.raises(OSError, match="No space left"):
        world.run()
    assert not world.names("*.error.json")
    summary = world.run()
    assert summary.status == 0 and world.results() == WANTED and set(world.names("*")) == TIDY


def test_killed_workers_are_replaced_and_deadly_shards_set_aside(world, local_ray):
    world.plan(n00001="kill", n00002="kill kill kill kill kill", n00004="data")
    summary = world.run("ray")
    assert summary.failed == {"00002": "killed its worker 3 times", "00004": "the data is bad"}
    assert world.results().keys() == WANTED.keys() - {"00002.txt", "00004.txt"}


def test_a_worker_that_met_an_error_is_not_used_again(world):
    world.plan(n00001="sick", n00004="sick bug")
    summary = world.run()
    assert summary.failed == {} and world.results() == WANTED


def test_each_attempt_is_made_by_another_process(world, local_ray, caplog):
    world.plan(n00001="lost", n00003="bug bug bug")
    summary = world.run("ray")
    assert summary.failed == {"00003": "RuntimeError('a bug')"}
    assert world.results().keys() == WANTED.keys() - {"00003.txt"}
    record = json.loads((world.output / "00003.error.json").read_text())
    assert len({(error["host"], error["pid"]) for error in record["errors"]}) == 3
    assert record["host"] == socket.gethostname() and record["pid"] and record["traceback"]
    assert f"shard 00003 failed: RuntimeError('a bug') (on {record['host']})" in caplog.messages


def test_a_worker_that_cannot_be_made_again_ends_the_run_and_spares_the_shards(world):
    made = []

    def factory():
        if made:
            raise OSError("no GPU here")
        made.append(CountingWorker(str(world.output), str(world.trouble)))
        return made[0]

    world.plan(n00001="bug")
    jobs = [Job(name, f"source {name}", fingerprint=name) for name in NAMES]
    config = ExecutorConfig(kind="serial")
    with pytest.raises(OSError, match=f"{socket.gethostname()}: no GPU here; .* run again"):
        execute(jobs, factory, str(world.output), command="count", settings={}, config=config)
    assert not world.names("*.error.json")


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (RuntimeError("CUDA out of memory"), 3),  # of the process before this one
        (OSError(errno.ESTALE, "Stale file handle"), 3),
        (OSError("weights missing: run mas fetch-weights"), 1),
        (ValueError("no such device"), 1),
        (ImportError("no such package"), 1),
    ],
)
def test_what_may_pass_is_tried_again_before_a_worker_is_given_up(world, monkeypatch, error, tries):
    monkeypatch.setattr("preprocess.runner.START_SECONDS", (0.0, 0.0))
    made = []

    def factory(fails):
        made.append(1)
        if len(made) <= fails:
            raise error
        return lambda job, report: {}

    folder = RunFolder(str(world.output))
    with pytest.raises(type(error)):
        Runner(partial(factory, 9), folder, {}, leave=lambda: None)
    assert len(made) == tries
    made.clear()
    if tries > 1:
        assert Runner(partial(factory, 2), folder, {}, leave=lambda: None).worker
    with pytest.raises(type(error)):  # this process has nothing that another one may free
        Runner(partial(factory, 9), folder, {})


def test_a_cluster_without_a_free_cpu_is_told_of(world, local_ray, caplog, monkeypatch):
    @local_ray.remote(num_cpus=2)
    class Other:
        def ready(self):
            return True

    other = Other.remote()
    assert local_ray.get(other.ready.remote())
    release = threading.Event()

    def wait_for_warning():
        while "no worker has started" not in caplog.text and not release.wait(0.05):
            pass
        local_ray.kill(other)

    monkeypatch.setattr("preprocess.ray_executor.START_SECONDS", 0.5)
    waiting = threading.Thread(target=wait_for_warning)
    waiting.start()
    timer = threading.Timer(30, release.set)  # only a test that fails takes so long
    timer.start()
    assert world.run("ray").status == 0
    timer.cancel()
    waiting.join()
    assert caplog.text.count("no worker has started after 0.5 s; each waits for a free CPU") == 1


def test_a_run_gives_a_sign_of_life_before_it_reads_what_is_done(world, monkeypatch):
    """That takes minutes where many shards are done, and the lock alone is old by then."""
    seen, finished = [], RunFolder.finished

    def watch(folder, fingerprints, **options):
        seen.extend(
            name for name in world.names("*.json") if name in ("lock.json", "progress.json")
        )
        return finished(folder, fingerprints, **options)

    monkeypatch.setattr(RunFolder, "finished", watch)
    assert world.run().status == 0 and seen == ["lock.json", "progress.json"]


def test_a_worker_whose_output_is_gone_ends_the_run_and_names_its_machine(world, monkeypatch):
    read = RunFolder.read

    def unmounted(folder, name):
        if name == "00003.stats.json":
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return read(folder, name)

    monkeypatch.setattr(RunFolder, "read", unmounted)
    where = f"{world.output} on {socket.gethostname()}: Transport endpoint is not connected; "
    with pytest.raises(OSError, match=f"^{where}finished shards are kept"):
        world.run()


def test_a_listing_of_an_older_state_is_not_believed(world, monkeypatch):
    list_names = RunFolder.list_names
    monkeypatch.setattr(
        RunFolder, "list_names", lambda f: [n for n in list_names(f) if n != "00004.stats.json"]
    )
    assert world.run().status == 0


def test_shards_that_are_not_to_be_seen_are_an_error(world, monkeypatch):
    """As when workers on other machines write to disks of their own."""
    write = RunFolder.write

    def elsewhere(folder, name, content):
        if name != "00004.stats.json":
            write(folder, name, content)

    monkeypatch.setattr(RunFolder, "write", elsewhere)
    with pytest.raises(OSError, match=r"1 of 6 shards .* 00004; .* every node sees"):
        world.run()


def test_a_worker_that_cannot_start_ends_the_run_with_its_reason(world, kind):
    with pytest.raises(OSError, match="mas fetch-weights"):
        execute(
            [Job("00000", "x", fingerprint="1")],
            BrokenWorker,
            str(world.output),
            command="count",
            settings={},
            config=ExecutorConfig(kind=kind, workers=1),
        )
    assert world.run(settings={"other": 1}).status == 0  # nothing was made, nothing is in the way


def test_other_settings_are_refused_by_name(world):
    world.run()
    with pytest.raises(FolderError, match=r"photo\.size is 8 there and 9 here"):
        world.run(settings={"photo": {"size": 9}})
    with pytest.raises(FolderError, match=r"photo\.new is None there and 1 here"):
        world.run(settings={"photo": {"size": 8, "new": 1}})
    with pytest.raises(FolderError, match="mas count"):
        world.run(command="tokenize")


def test_another_input_is_refused(world):
    world.run()
    with pytest.raises(ShardError, match="another input"):
        world.run(jobs=[Job("00001", "x", fingerprint="other")])


def test_a_run_may_grow(world):
    first = [Job(name, f"source {name}", fingerprint=name) for name in NAMES[:2]]
    assert world.run(jobs=first).done == 2
    summary = world.run()
    assert (summary.done, summary.skipped) == (4, 2)


def test_a_folder_that_holds_something_else_is_left_alone(world):
    world.output.mkdir()
    (world.output / "thesis.doc").write_text("x")
    with pytest.raises(FolderError, match=r"something else \(thesis\.doc\)"):
        world.run()
    assert world.names("*") == ["thesis.doc"]


def test_an_output_that_cannot_be_written_is_an_error_and_leaves_nothing(world, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("mas.shard_files.os.replace", refuse)
        with pytest.raises(OSError, match=r"out: cannot be written to \(Permission denied\)"):
            world.run()
    assert not [p for p in world.output.rglob("*") if p.is_file()]
    world.output.rmdir()
    world.output.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="out"):
        world.run()


def test_two_runs_at_once_on_one_folder_are_refused(world):
    world.output.mkdir()
    beat = {"updated": time.time(), "host": socket.gethostname(), "pid": os.getppid()}
    folder = RunFolder(str(world.output))
    folder.write("run.json", {"command": "count"})
    folder.write("progress.json", beat)
    with pytest.raises(FolderError, match=f"process {os.getppid()}"):
        world.run()
    folder.write("progress.json", {**beat, "host": "elsewhere"})
    with pytest.raises(FolderError, match="elsewhere"):
        world.run()
    gone = subprocess.Popen(["true"])
    gone.wait()
    folder.write("progress.json", {**beat, "pid": gone.pid})
    assert world.run().status == 0


def test_a_broken_evidence_file_is_named(world):
    world.run()
    (world.output / "run.json").write_text("{")
    with pytest.raises(FolderError, match=r"run\.json"):
        RunFolder(str(world.output)).read("run.json")

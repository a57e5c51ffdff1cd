"""Six jobs for `CountingWorker`, an output folder, and trouble to be planned."""

from functools import partial

from counting_worker import CountingWorker

from preprocess.executor import ExecutorConfig, execute
from preprocess.runner import Job

NAMES = [f"{i:05d}" for i in range(6)]


class World:
    """Jobs, an output folder, and trouble to be planned."""

    def __init__(self, folder):
        self.output, self.trouble = folder / "out", folder / "trouble"
        self.trouble.mkdir()

    def plan(self, **trouble):
        for name, kinds in trouble.items():
            (self.trouble / name.removeprefix("n")).write_text(kinds)

    def run(self, kind="serial", *, jobs=None, settings=None, command="count", **options):
        return execute(
            jobs or [Job(name, f"source {name}", fingerprint=name) for name in NAMES],
            partial(CountingWorker, str(self.output), str(self.trouble)),
            str(self.output),
            command=command,
            settings=settings or {"photo": {"size": 8}},
            config=ExecutorConfig(kind=kind, workers=2, **options),
        )

    def results(self):
        return {path.name: path.read_text() for path in sorted(self.output.glob("*.txt"))}

    def names(self, pattern):
        return sorted(path.name for path in self.output.glob(pattern))

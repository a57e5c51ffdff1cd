"""A worker without images, for the tests of the executor; it misbehaves where a file says so."""

import errno
import os
import signal
from pathlib import Path

from mas.shards import write_file

LOST = "COUNTING_WORKER_LOST"  # in the environment of a process that has lost what it needs


class CountingWorker:
    """Writes NAME.txt. In the folder `trouble`, NAME holds what goes wrong, once per line."""

    def __init__(self, output, trouble):
        self.output, self.trouble = Path(output), Path(trouble)
        self.sick = False

    def __call__(self, job, report):
        if self.sick or LOST in os.environ:
            raise RuntimeError("nothing works any more")
        script = self.trouble / job.name
        kinds = script.read_text().split() if script.exists() else []
        if kinds:
            script.write_text("\n".join(kinds[1:]))
            (self.output / f".{job.name}.txt.0000.tmp").write_text("half")
            self.fail(kinds[0])
        report(3)
        (self.output / f".{job.name}.txt.0000.tmp").unlink(missing_ok=True)
        write_file(str(self.output / f"{job.name}.txt"), f"made of {job.source}".encode())
        return {"photos_in": 3, "photos_out": 2, "rejected": {"no_caption": 1}}

    def fail(self, kind):
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "sick":
            self.sick = True
        if kind == "lost":
            os.environ[LOST] = "1"
        raise {
            "data": ValueError("the data is bad"),
            "network": OSError(errno.EIO, "the network is gone"),
            "bug": RuntimeError("a bug"),
            "sick": RuntimeError("the GPU has met an error"),
            "lost": RuntimeError("the GPU is lost to this process"),
            "full": OSError(errno.ENOSPC, "No space left on device"),
        }[kind]


class BrokenWorker:
    """Cannot start."""

    def __init__(self):
        raise OSError("weights missing: run mas fetch-weights")

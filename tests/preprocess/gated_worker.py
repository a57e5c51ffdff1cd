"""A scene worker that waits where a test says so, and whose disk fails where a test says so."""

import errno
import io
import json
import os
import signal
import time
from pathlib import Path

import mas.shard_files
from preprocess.worker import SceneWorker

TROUBLE = {"full": errno.ENOSPC, "readonly": errno.EROFS}


class GatedWorker(SceneWorker):
    """Waits before a photo while `gates/KEY.stop` is there, and tells so in `gates/KEY.reached`."""

    def __init__(self, gates, *args, **options):
        deadly = Path(gates) / f"{node_id()}.deadly"
        if deadly.exists():
            deadly.write_text(f"{deadly.read_text()}x")
            os.kill(os.getpid(), signal.SIGKILL)
        lacking = Path(gates) / f"{node_id()}.lacks"
        if lacking.exists():
            raise OSError(lacking.read_text())
        super().__init__(*args, **options)
        self.gates, self.segment = Path(gates), self.panoptic
        self.panoptic = self.wait_and_segment
        mas.shard_files.open = lambda path, mode: open_on_bad_disk(path, mode, self.gates)

    def __call__(self, job, report):
        if (self.gates / f"{node_id()}.broken").exists():
            raise ImportError("No module named 'x'")
        if (self.gates / f"{node_id()}.unmounted").exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), job.source.name)
        return super().__call__(job, report)

    def wait_and_segment(self, photos):
        for photo in photos:
            stop = self.gates / f"{photo.key}.stop"
            if stop.exists():
                note = self.gates / f"{photo.key}.writing"
                note.write_text(
                    json.dumps(
                        {
                            "pid": os.getpid(),
                            "node": node_id(),
                            "weights": os.environ.get("MAS_WEIGHTS"),
                        }
                    )
                )
                note.rename(note.with_suffix(".reached"))
                while stop.exists():
                    time.sleep(0.01)
        return self.segment(photos)


def lacks(gates, *_):
    """What `gates/NODE.lacks` and `gates/NODE.unmounted` say of this node."""
    paths = [Path(gates) / f"{node_id()}.{what}" for what in ("lacks", "unmounted")]
    return [path.read_text() for path in paths if path.exists()]


def node_id():
    import ray

    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else None


def open_on_bad_disk(path, mode, gates):
    if mode != "xb":
        return open(path, mode)
    return io.BufferedWriter(DiskFile(path, mode, gates))


class DiskFile(io.FileIO):
    """Stores half of a tar's first block and then no more, while `gates/full` is there."""

    def __init__(self, path, mode, gates):
        self.gates = gates
        if (gates / "readonly").exists():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        super().__init__(path, mode)

    def write(self, content):
        if (self.gates / "full").exists() and ".tar." in self.name:
            super().write(bytes(content[: len(content) // 2]))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content)

"""One run at a time in a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(path: Path, *, note: str = "") -> Iterator[str | None]:
    """Holds the lock on a file, which is made and in the end removed.

    Yields None, or, where another process holds it, the note that this one has left in the file.
    Without locks, as on Windows and on some file systems, everybody gets it. Processes that are
    forked meanwhile do not keep it.

    Raises:
        OSError: the file cannot be made.
    """
    if fcntl is None:
        yield None
        return
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.fstat(file.fileno()).st_nlink > 0  # else its run has ended this moment
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = True
        if not free:
            file.seek(0)
            yield file.read()
            return
        file.truncate(0)  # of a process that was killed
        file.write(note)
        file.flush()
        os.register_at_fork(after_in_child=file.close)
        try:
            yield None
        finally:
            path.unlink(missing_ok=True)

"""`mas train` in processes of its own that can be killed, forked from one that has imported all.

A fresh interpreter spends seconds on importing; a fork of the fork server does not.
"""

import multiprocessing
import os
import sys
import threading
import traceback

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.runner", "mas.__main__"])
LIMIT = 240  # seconds; a process that takes longer hangs


def start(words, *, log, environment=None, before=None):
    """Starts `mas train WORDS`; what it says goes to the file `log`.

    `before`, a picklable function without arguments, is called in the new process.
    """
    process = CONTEXT.Process(target=_main, args=(words, str(log), environment or {}, before))
    process.start()
    return process


def finish(*processes):
    """Waits for the processes and returns their exit statuses (negative: killed by a signal)."""
    for process in processes:
        process.join(LIMIT)
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert not hanging, f"{len(hanging)} of {len(processes)} processes hang"
    return [process.exitcode for process in processes]


def run(words, **options):
    """Starts one process and returns its exit status."""
    return finish(start(words, **options))[0]


def _main(words, log, environment, before):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    import torch
    from tqdm import tqdm

    from mas.__main__ import main

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    try:
        if before is not None:
            before()
        status = main(["train", *words])
    except Exception:
        traceback.print_exc()
        status = 70
    sys.exit(status)

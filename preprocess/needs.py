"""What a run needs of a machine: what is missing there is named all at once, before work begins.

In: names of packages, URLs. Out: one sentence per thing that is missing, with the mend. Nothing is
loaded, and nothing heavy imported but PyTorch where GPUs are asked for.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence

import fsspec

from mas.shards import StoreError, local_path, store_errors

EXTRA = "pip install 'mini-make-a-scene[preprocess]'"


class NeedsError(OSError):
    """What a machine lacks; the message names all of it, with the mends."""


def has_module(name: str) -> bool:
    """Whether a module could be imported; of one in a package the package is.

    A folder that only bears the name, as a checkout of the package's sources, does not count.
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def lacking_modules(*names: str, user: str, mend: str = EXTRA) -> list[str]:
    """What to say of modules that are not installed: one sentence, none where all are there.

    Args:
        names: of the modules.
        user: what needs them.
        mend: how they are installed, all of them.
    """
    absent = [name for name in names if not has_module(name)]
    return [f"{user} needs {' and '.join(absent)}: {mend}"] if absent else []


def lacking_filesystems(*urls: str) -> list[str]:
    """What to say of URLs whose file system needs a package that is missing, or does not answer."""
    lacks = {}
    for url in urls:
        try:
            with store_errors(url):
                filesystem, inner = fsspec.core.url_to_fs(url)
                if local_path(url) is None:
                    filesystem.info(inner)
        except ImportError as error:
            lacks[str(error)] = f"{url}: {error}"
        except StoreError as error:
            lacks[str(error)] = str(error)
        except OSError:  # it answers, if only that nothing is there yet
            pass
    return list(lacks.values())


def lacking_input(path: str) -> list[str]:
    """What to say of an input that is not to be seen on this machine; URLs are not looked up."""
    local = local_path(path)
    if local is None or os.path.exists(local):
        return []
    return [f"the input {path} is not there: mount it"]


def lacking_gpu(share: float) -> list[str]:
    """What to say where workers get shares of a GPU that PyTorch does not see.

    Networks whose device is `auto` would take the CPU without a word, and a hundred times as long.
    """
    if not share:
        return []
    import torch  # takes a second

    if torch.cuda.is_available():
        return []
    return [
        f"--gpus-per-worker {share:g}, but PyTorch sees no GPU: install one that fits the driver, "
        "or leave the option out"
    ]


def gather(*parts: Callable[[], list[str]]) -> list[str]:
    """What each of them says that is lacking."""
    return [lack for part in parts for lack in part()]


def tell(lacks: Sequence[str]) -> str:
    """All that is lacking in one line, numbered where there are several."""
    if len(lacks) == 1:
        return lacks[0]
    told = "; ".join(f"({number}) {lack}" for number, lack in enumerate(lacks, start=1))
    return f"{len(lacks)} things are missing: {told}"


def require(lacks: Sequence[str]) -> None:
    """Raises what `lacks` tells of, if anything.

    Raises:
        NeedsError: names all of it.
    """
    if lacks:
        raise NeedsError(tell(lacks))

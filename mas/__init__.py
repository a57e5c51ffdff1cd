"""mini Make-A-Scene: a caption becomes a scene, the scene becomes a picture."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mas.model import MakeAScene as MakeAScene
    from mas.progress import Progress as Progress
    from mas.request import Generation as Generation
    from mas.scene import SceneMap as SceneMap

__version__ = "0.1.0"
__all__ = ["Generation", "MakeAScene", "Progress", "SceneMap"]

_HOMES = {
    "Generation": "mas.request",
    "MakeAScene": "mas.model",
    "Progress": "mas.progress",
    "SceneMap": "mas.scene",
}

# Threads that wait must spin a little, or every small operation waits for the scheduler; but not
# long, or they take the cores from those that work (docs/sampling.md). torch reads it when it is
# imported, which is later unless a program has done so before.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def __getattr__(name: str) -> Any:
    """Imports torch only when a model is asked for, so that `mas --help` stays quick."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mas' has no attribute {name!r}")

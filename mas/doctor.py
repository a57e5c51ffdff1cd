"""`mas doctor`: what is installed, which extras are missing, what the machine offers.

In: nothing. Out: a report a person can paste into a bug report, or JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import mas

DISTRIBUTION = "mini-make-a-scene"
WEIGHTS_GROUP = "mini_make_a_scene.weights"  # of entry points: functions that list weights


def doctor(*, as_json: bool = False) -> None:
    """Says what is installed, which extras are missing, and what the machine offers.

    Args:
        as_json: print one JSON object instead of text.
    """
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    machine = report["machine"]
    print(f"mini-make-a-scene {report['version']}, Python {machine['python']}")
    print(f"{machine['platform']}, {machine['cores']} cores, {machine['memory_gb']} GB memory")
    print(f"accelerator: {machine['accelerator']}")
    print(f"fast step of int8 sampling: {machine['fast_step']}")
    for extra, packages in report["extras"].items():
        absent = [name for name, version in packages.items() if version is None]
        state = f"missing {', '.join(absent)}" if absent else "complete"
        print(f"\n{extra or 'plain install'}: {state}")
        if absent and extra:
            print(f"  pip install '{DISTRIBUTION}[{extra}]'")
        for name, version in packages.items():
            print(f"  {name:<20} {version or '-'}")
    print("\noutside the package index")
    for name, version in report["outside"].items():
        print(f"  {name:<20} {version or '- (see docs/segmenters.md)'}")
    print("\nweights (mas fetch-weights STAGE)")
    for weights in report["weights"]:
        mark = "there" if weights["present"] else "-"
        print(f"  {weights['stage']:<10} {weights['name']:<22} {mark:<6} {weights['path']}")
    print(f"\nshipped models: {', '.join(report['models']) or 'none'}, in {_models()}")


def examine() -> dict[str, Any]:
    """The report as a dictionary: version, machine, extras, outside, weights, models."""
    return {
        "version": mas.__version__,
        "machine": _machine(),
        "extras": _extras(),
        "outside": {"detectron2": _version("detectron2")},
        "weights": _weights(),
        "models": sorted(p.parent.name for p in _models().glob("*/model_index.json")),
    }


def _machine() -> dict[str, Any]:
    import torch

    from mas.fast_decoder import find_step

    accelerator = "none"
    if torch.cuda.is_available():
        accelerator = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        accelerator = "Apple MPS"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 2**30),
        "accelerator": accelerator,
        "fast_step": find_step().state,
    }


def _extras() -> dict[str, dict[str, str | None]]:
    """Required packages per extra ('' = plain install) with their installed versions."""
    found: dict[str, dict[str, str | None]] = {}
    for requirement in importlib.metadata.requires(DISTRIBUTION) or []:
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        key = extra.group(1) if extra else ""
        if key == "all":
            continue
        name = re.match(r"[\w.-]+", requirement)
        if name:
            found.setdefault(key, {})[name.group()] = _version(name.group())
    return found


def _weights() -> list[dict[str, Any]]:
    """Published weights and where they belong, as the installed packages list them.

    A package announces its list as an entry point, so that nothing here imports it by name.
    """
    return [
        {
            "name": state.name,
            "stage": state.stage,
            "path": str(state.path),
            "licence": state.licence,
            "present": state.present,
        }
        for entry in importlib.metadata.entry_points(group=WEIGHTS_GROUP)
        for state in entry.load()()
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _models() -> Path:
    return Path(mas.__file__).parent / "models"

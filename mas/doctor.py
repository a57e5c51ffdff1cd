"""`mas doctor`: what is installed, what is missing or too old, what the machine offers.

In: nothing. Out: a report a person can paste into a bug report, or JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import mas
from mas.machine import total_memory

DISTRIBUTION = "mini-make-a-scene"
WEIGHTS_GROUP = "mini_make_a_scene.weights"  # of entry points: functions that list weights


def doctor(*, as_json: bool = False) -> None:
    """Says what is installed, what is missing or too old, and what the machine offers.

    Args:
        as_json: print one JSON object instead of text.
    """
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    machine = report["machine"]
    print(f"mini-make-a-scene {report['version']}, Python {machine['python']}")
    memory = "?" if machine["memory_gb"] is None else machine["memory_gb"]
    print(f"{machine['platform']}, {machine['cores']} cores, {memory} GB memory")
    print(f"accelerator: {machine['accelerator']}")
    print(f"fast step of int8 sampling: {machine['fast_step']}")
    for extra, packages in report["extras"].items():
        _print_packages(extra, packages, report["too_old"].get(extra, {}))
    if not report["extras"]:
        print(f"\npackages and weights: not known, {DISTRIBUTION} runs without being installed")
        print("  pip install -e . where its setup.py lies")
    print("\noutside the package index")
    for name, version in report["outside"].items():
        print(f"  {name:<20} {version or '- (see docs/segmenters.md)'}")
    if report["weights"]:
        print("\nweights (mas fetch-weights STAGE)")
    width = max((len(weights["name"]) for weights in report["weights"]), default=0)
    for weights in report["weights"]:
        mark = "there" if weights["present"] else "-"
        print(f"  {weights['stage']:<10} {weights['name']:<{width}} {mark:<6} {weights['path']}")
    print(f"\nshipped models: {', '.join(report['models']) or 'none'}, in {_models()}")


def _print_packages(extra: str, packages: dict[str, str | None], old: dict[str, str]) -> None:
    absent = [name for name, version in packages.items() if version is None]
    faults = {"missing": absent, "too old": old}
    state = [f"{fault} {', '.join(names)}" for fault, names in faults.items() if names]
    print(f"\n{extra or 'plain install'}: {'; '.join(state) or 'complete'}")
    if state:
        print(f"  pip install '{DISTRIBUTION}{f'[{extra}]' if extra else ''}'")
    for name, version in packages.items():
        needs = f"  needs {old[name]}" if name in old else ""
        print(f"  {name:<20} {version or '-'}{needs}")


def examine() -> dict[str, Any]:
    """The report as a dictionary: version, machine, extras, too_old, outside, weights, models."""
    required = _required()
    return {
        "version": mas.__version__,
        "machine": _machine(),
        "extras": {
            extra: {each.name: _version(each.name) for each in requirements}
            for extra, requirements in required.items()
        },
        "too_old": {extra: old for extra, each in required.items() if (old := _too_old(each))},
        "outside": {"detectron2": _version("detectron2")},
        "weights": _weights(),
        "models": sorted(p.parent.name for p in _models().glob("*/model_index.json")),
    }


def _machine() -> dict[str, Any]:
    import torch

    from mas.fast_decoder import find_step

    try:
        step = find_step().state
    except ValueError as error:  # MAS_STEP names one that is not here
        step = str(error)
    accelerator = "none"
    if torch.cuda.is_available():
        accelerator = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        accelerator = "Apple MPS"
    memory = total_memory()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gb": None if memory is None else round(memory / 2**30),
        "accelerator": accelerator,
        "fast_step": step,
    }


def _required() -> dict[str, list[Requirement]]:
    """Required packages by extra ('' = plain install); empty where mas is not installed."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
        extras = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder on the path
        return {}
    plain: list[Requirement] = []
    optional: list[Requirement] = []
    for requirement in map(Requirement, lines):
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        (plain if needed else optional).append(requirement)
    return {"": plain} | {
        extra: [each for each in optional if each.marker and each.marker.evaluate({"extra": extra})]
        for extra in extras
        if extra != "all"
    }


def _too_old(requirements: list[Requirement]) -> dict[str, str]:
    """The versions asked for of packages that are installed in older ones, by name."""
    found = {}
    for each in requirements:
        version = _version(each.name)
        if version and not each.specifier.contains(version, prereleases=True):
            found[each.name] = str(each.specifier)
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

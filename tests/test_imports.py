"""The import rule: who may import whom, imports inside functions included."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Flow order; a module imports only modules to its left.
MAS_ORDER = """
    field_help errors machine lock picture_file
    scene_files instances scene shard_files token_shards shards rounding packing storage sheet text
    vq_codebook vq vq_fast
    vqseg_loss vqseg vqseg_tune vqgan bench_vqseg unet reader refiner pretrained things judge
    sequence heap cache gpt filter quantize decoder fast_decoder generate candidates cuda_kernels
    cuda_blocks cuda_step cuda_decoder precision progress model_folder hub bench_sample fill request
    codec model rerank metrics weights_file sample_folder sample drawing painter studio_canvas
    studio_guard studio_page studio obedience cases distances inception features kept_tokens
    examiner figures report evaluate doctor
""".split()
FOREIGN_TO_MAS = {"ray", "detectron2", "face_alignment", "pytorch_lightning"}
PREPROCESS_FROM_MAS = {"errors", "machine", "scene", "shards", "sheet"}
TOKENS_FROM_MAS = PREPROCESS_FROM_MAS | {"text", "vqseg", "vqgan", "storage"}
ONE_FILE_EACH = {
    "detectron2": "preprocess/panoptic.py",
    "face_alignment": "preprocess/face.py",
}


def imported_modules(source: str) -> Iterator[str]:
    """Dotted names that `source` imports anywhere, `importlib.import_module("x")` included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            argument = node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield str(argument.value)


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def own_modules(path: Path, package: str) -> set[str]:
    """Second parts of the modules of `package` that a file imports: {"scene"} for mas.scene."""
    found = set()
    for name in imported_modules(path.read_text("utf-8")):
        parts = name.split(".")
        if parts[0] == package and len(parts) > 1 and (ROOT / package / f"{parts[1]}.py").exists():
            found.add(parts[1])
    return found


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(path.read_text("utf-8"))}


def test_the_rule_sees_imports_inside_functions():
    body = ("import ray.data", "from mas import gpt", "import_module('train.cli')")
    source = "\n    ".join(("def f():", *body))
    assert {"ray.data", "mas.gpt", "train.cli"} <= set(imported_modules(source))


@pytest.mark.parametrize("path", files("mas"), ids=lambda p: p.stem)
def test_mas_imports_only_to_its_left(path):
    if path.stem in ("__main__", "__init__"):
        assert not top_level(path) & (FOREIGN_TO_MAS | {"preprocess", "train"})
        return
    assert path.stem in MAS_ORDER, f"give mas/{path.name} its place in MAS_ORDER"
    allowed = set(MAS_ORDER[: MAS_ORDER.index(path.stem)])
    assert own_modules(path, "mas") <= allowed
    assert not top_level(path) & (FOREIGN_TO_MAS | {"preprocess", "train"})


def test_the_order_names_what_there_is_and_stands_in_the_documentation():
    assert sorted(MAS_ORDER) == sorted(path.stem for path in files("mas") if path.stem[:2] != "__")
    _, told = (ROOT / "docs/architecture.md").read_text("utf-8").split("```\nmas ", 1)
    assert told.partition("each module imports")[0].split() == MAS_ORDER


@pytest.mark.parametrize("path", files("preprocess"), ids=lambda p: p.stem)
def test_preprocess_meets_the_rest_only_in_files(path):
    allowed = TOKENS_FROM_MAS if path.stem == "tokens" else PREPROCESS_FROM_MAS
    assert own_modules(path, "mas") <= allowed
    assert not top_level(path) & {"train", "pytorch_lightning"}


@pytest.mark.parametrize("path", files("train"), ids=lambda p: p.stem)
def test_train_knows_nothing_of_preprocessing(path):
    assert not top_level(path) & {"preprocess", "ray", "detectron2", "face_alignment"}


@pytest.mark.parametrize("package", ["mas", "preprocess", "train"])
def test_nothing_imports_the_roof(package):
    for path in files(package):
        assert "__main__" not in own_modules(path, "mas"), path


@pytest.mark.parametrize("module", ONE_FILE_EACH)
def test_foreign_code_stays_in_one_file(module):
    users = {
        str(path.relative_to(ROOT))
        for package in ("mas", "preprocess", "train")
        for path in files(package)
        if module in top_level(path)
    }
    assert users <= {ONE_FILE_EACH[module]}


def test_importing_mas_loads_nothing_heavy():
    code = "import sys, mas, mas.__main__; print([m for m in ('torch', 'ray') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("said", "found"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")],
)
def test_threads_that_wait_spin_a_little_unless_somebody_says_otherwise(said, found):
    """Without it sampling in Python is a third slower (docs/sampling.md)."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | said
    code = "import mas, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == found

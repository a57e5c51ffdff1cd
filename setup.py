"""Packages mas (library), preprocess (Ray), train (Lightning); extras bring what each needs."""

import re
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "mas/__init__.py").read_text()).group(1)

EXTRAS = {
    "preprocess": ["ray[data]>=2.50", "transformers>=5.4", "face-alignment>=1.5"],
    "train": ["pytorch-lightning>=2.6.6", "tensorboard>=2.18"],
    "eval": ["torchmetrics>=1.6", "transformers>=5.4"],
    "studio": ["gradio>=6.31"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "playwright>=1.50",
        "ruff>=0.14",
        "mypy>=1.18",
        "types-tqdm",
    ],
}

# The fast step of int8 sampling: no Python module but a library, which mas/fast_decoder.py loads.
# Without a compiler the rest is installed, and PyTorch computes the steps.
STEP = Extension(
    "mas._step",
    ["mas/step.c", "mas/step_avx512.c", "mas/step_avx2.c", "mas/step_neon.c"],
    depends=sorted(map(str, Path("mas").glob("step_*.h"))),
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,
)

setup(
    name="mini-make-a-scene",
    version=VERSION,
    description="Scene-based text-to-image generation: caption, then scene, then picture",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["mas", "preprocess", "train"],
    package_data={
        "mas": [
            *("py.typed", "step.cu", "step_*.cuh", "studio*.js", "studio*.html", "studio.css"),
            *("models/*/*", "models/*/*/*"),
        ]
    },
    ext_modules=[STEP],
    install_requires=[
        "torch>=2.9",
        "numpy>=1.26",
        "scipy>=1.13",
        "einops>=0.8",
        "tokenizers>=0.20",
        "pillow>=11",
        "safetensors>=0.4",
        "huggingface_hub>=0.26",
        "jsonargparse[signatures]>=4.51",
        "fsspec>=2024.6",
        "braceexpand>=0.1.7",
        "packaging>=21",
        "tqdm>=4.66",
    ],
    extras_require={**EXTRAS, "all": sorted({p for extra in EXTRAS.values() for p in extra})},
    entry_points={
        "console_scripts": ["mas = mas.__main__:main"],
        "mini_make_a_scene.weights": ["preprocess = preprocess.weights:known_weights"],
    },
)

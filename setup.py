"""Build file of fairseq-moe-opt; pyproject.toml holds tool settings only."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent

# Every package by name: a folder that is forgotten here fails tests/test_environment.py.
PACKAGES = [
    "fairseq_moe_opt",
    "fairseq_moe_opt.buffering",
    "fairseq_moe_opt.build",
    "fairseq_moe_opt.checkpoints",
    "fairseq_moe_opt.cli",
    "fairseq_moe_opt.models",
    "fairseq_moe_opt.moe",
    "fairseq_moe_opt.moe.kernels",
    "fairseq_moe_opt.parallel",
    "fairseq_moe_opt.placement",
    "fairseq_moe_opt.placement.strategies",
    "fairseq_moe_opt.profiling",
    "fairseq_moe_opt.reproduction",
    "fairseq_moe_opt.reproduction.sections",
    "fairseq_moe_opt.tasks",
    "hf_integration",
    "hf_integration.fairseq_lm",
    "hf_integration.families",
]

# The top-level folder of presets, installed inside the engine's package: an installed project has no other place that
# it finds without asking the packaging tools.
PRESETS = "fairseq_moe_opt.configs"

CORE = ["torch>=2.10", "numpy>=1.26", "safetensors>=0.5", "pyyaml>=6.0", "typer>=0.15.4", "rich>=13"]
# accelerate 1.3: with an older one, Transformers' own Trainer fails when it saves.
HF = ["transformers>=5.6,<6", "accelerate>=1.3", "sentencepiece>=0.2", "protobuf>=4"]
# What fairseq-fixed==0.12.3.1 needs, less torch (here already) and torchaudio (whose registry build cannot
# load beside a CPU torch). fairseq-fixed itself takes one line more, with --no-build-isolation --no-deps: see
# README.md.
FAIRSEQ = [
    "bitarray",
    "cffi",
    "cython",
    "hydra-core==1.3.2",
    "omegaconf==2.3.0",
    "packaging",
    "regex",
    "sacrebleu",
    "scikit-learn",
    "tqdm",
]
PLOTS = ["matplotlib>=3.8"]
DEV = ["hypothesis>=6.100", "mypy>=1.15", "pytest>=8", "pytest-cov>=5", "pytest-xdist>=3.6.1", "ruff>=0.9"]
DEV += ["scipy>=1.11", "types-PyYAML"]
DEV.append("peft>=0.18")  # tests of adapters
# Its interpreter runs the device code on a CPU. CUDA builds of torch for Linux bring it along.
DEV.append("triton>=3.5; sys_platform == 'linux'")


# The compiled expert kernel: plain C++ that needs neither Python's headers nor torch's. It chooses its instruction
# set when it runs, so one build serves every processor of an architecture.
NATIVE = "fairseq_moe_opt/moe/kernels/native"
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-w"]
FUSED = Extension(
    "fairseq_moe_opt.moe.kernels._fused",
    sources=[f"{NATIVE}/fused.cpp"],
    depends=[str(path) for path in sorted(Path(NATIVE).glob("*.inc"))],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,  # without a compiler the project installs all the same, and computes with torch alone
)


class BuildKernel(build_ext):
    """Says what it means when the kernel is not compiled."""

    def build_extension(self, ext: Any) -> None:
        """As usual."""
        try:
            super().build_extension(ext)
        except Exception as error:
            self.warn(f"the fused kernel is left out, kernel='loop' takes its place: {error}")
            raise


def version() -> str:
    """The one version number, as ``fairseq_moe_opt/__init__.py`` states it."""
    source = (HERE / "fairseq_moe_opt" / "__init__.py").read_text(encoding="utf-8")
    return re.findall(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)[0]


def long_description() -> str:
    """The README, or nothing in a tree without one."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="fairseq-moe-opt",
    version=version(),
    description="Mixture-of-Experts inference for fairseq and Hugging Face Transformers",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="The fairseq-moe-opt authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*PACKAGES, PRESETS],
    package_dir={PRESETS: "configs"},
    package_data={
        "fairseq_moe_opt": ["py.typed"],
        "hf_integration": ["py.typed"],
        PRESETS: ["*.yaml", "*.txt", "presets/*.yaml"],
    },
    zip_safe=False,
    ext_modules=[] if os.environ.get("MOE_OPT_FUSED") == "0" else [FUSED],
    cmdclass={"build_ext": BuildKernel},
    install_requires=CORE,
    extras_require={
        "hf": HF,
        "fairseq": FAIRSEQ,
        "plots": PLOTS,
        "dev": DEV,
        "all": HF + FAIRSEQ + PLOTS + DEV,
    },
    entry_points={"console_scripts": ["moe-opt = fairseq_moe_opt.cli:main"]},
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)

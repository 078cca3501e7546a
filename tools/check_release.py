#!/usr/bin/env python
"""Build the sdist and, from it, the wheel, and try the wheel away from the checkout:

    tools/check_release.py --output dist

The wheel is installed alone into an environment that sees the libraries of the running one (which
setup.cfg requires), but no checkout. There the package is imported, its configs are listed and
loaded, a small model detects, and every command that setup.cfg names prints its help.
"""

import argparse
import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path
from typing import List, Optional, Sequence

from smca.errors import exit_code

ROOT = Path(__file__).resolve().parent.parent

# Run by the environment's Python. Its argument is the folder that the package has to be in.
SMOKE_TEST = """
import sys
from pathlib import Path
import torch
import smca, smca.configs
from detectron2.config import get_cfg, instantiate
from smca import model_zoo

for folder in (*smca.__path__, *smca.configs.__path__):
    assert Path(folder).is_relative_to(Path(sys.argv[1]).resolve()), folder
names = model_zoo.list_configs()
configs = {name: model_zoo.get_config(name) for name in names}
files = sorted(path.name for path in Path(smca.configs.__path__[0]).rglob("*.yaml"))
assert "Base-SMCA.yaml" in files and "shapes.yaml" in files, files
cfg = get_cfg()
smca.add_smca_config(cfg)
cfg.merge_from_file(str(Path(smca.configs.__path__[0], "yacs", "smca_r50_50ep.yaml")))
detector = smca.Predictor.from_model(instantiate(configs["smca_shapes"].model).eval())
detections = detector(torch.zeros(3, 96, 128, dtype=torch.uint8), threshold=0.0)
print(f"smca {smca.__version__}: {len(names)} configs, {len(files)} YAML files,",
      f"{len(detections)} detections of a small model")
"""


def run(*command: object, cwd: Path) -> str:
    """What a command prints; ends the program with its output if it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PYTHONWARNINGS"] = "ignore"
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:200]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(output: Path) -> List[Path]:
    """
    Args:
        output: an existing folder.

    Returns:
        The sdist, built from the checkout's files, and the wheel, built from the sdist's.
    """
    call = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"
    with tempfile.TemporaryDirectory() as name:
        # A copy, for setuptools leaves files behind, and packs what older builds left.
        copy = Path(name, "checkout")
        ignored = shutil.ignore_patterns(
            ".git", ".venv", "output", "build", "dist", "__pycache__", "*.egg-info", "*.pth"
        )
        shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
        lines = run(sys.executable, "-c", call.format("sdist"), output, cwd=copy).split("\n")
        sdist = output / lines[-2]
        with tarfile.open(sdist) as archive:
            archive.extractall(Path(name, "sdist"), filter="data")
        (tree,) = Path(name, "sdist").iterdir()
        lines = run(sys.executable, "-c", call.format("wheel"), output, cwd=tree).split("\n")
    return [sdist, output / lines[-2]]


def make_environment(folder: Path, wheel: Path) -> Path:
    """
    An environment with the wheel alone, and the libraries of the running one on its path.

    Returns:
        Its folder of commands.
    """
    python = [sys.executable, "-m"]
    run(*python, "venv", "--without-pip", folder, cwd=folder.parent)
    commands = folder / "bin"
    site = run(
        commands / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
        cwd=folder.parent,
    ).strip()  # fmt: skip
    pip = [*python, "pip", "--python", commands / "python", "install", "-q", "--no-deps"]
    run(*pip, "--no-index", wheel, cwd=folder.parent)
    # As plain lines: .pth files in these folders, such as an editable install's, are not read.
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(site, "libraries.pth").write_text("\n".join([*libraries, sysconfig.get_path("purelib")]))
    return commands


def command_names() -> List[str]:
    """The commands that setup.cfg names."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lines = settings["options.entry_points"]["console_scripts"].strip().splitlines()
    return [line.partition("=")[0].strip() for line in lines]


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", metavar="DIR", help="keep the files here; default: nowhere")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        away = Path(name)
        output = Path(args.output or away / "dist").resolve()
        output.mkdir(parents=True, exist_ok=True)
        sdist, wheel = build(output)
        print(f"{sdist.name} ({sdist.stat().st_size >> 10} KiB)")
        print(f"{wheel.name} ({wheel.stat().st_size >> 10} KiB)")
        commands = make_environment(away / "environment", wheel)
        smoke_test = [commands / "python", "-c", SMOKE_TEST, away / "environment"]
        print(run(*smoke_test, cwd=away), end="")
        for command in command_names():
            usage = run(commands / command, "--help", cwd=away).splitlines()[0]
            print(usage)
    print("The wheel works away from the checkout.")


if __name__ == "__main__":
    sys.exit(exit_code(main))

#!/usr/bin/env python3
"""Install Detectron2 into the running Python.

Without an argument: the pinned rebuild that the package registry has (see
constraints.txt), with its compiled file removed, so that it installs on any
Python. With one: that pip requirement, for instance
``git+https://github.com/facebookresearch/detectron2.git``.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Tuple, Union

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"


def run(*command: Union[str, Path]) -> None:
    """Run a module of this Python, with its arguments."""
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True)


def pinned_rebuild() -> Tuple[str, str]:
    """(requirement, sha256) of the rebuild, as written in constraints.txt."""
    text = CONSTRAINTS.read_text()
    sha256 = re.search(r"^# sha256:([0-9a-f]{64})$", text, re.MULTILINE)
    requirement = re.search(r"^sal-detectron2==\S+$", text, re.MULTILINE)
    if not sha256 or not requirement:
        sys.exit(f"{CONSTRAINTS} has no sha256 line or no sal-detectron2 pin: restore it from git.")
    return requirement.group(), sha256.group(1)


def install_rebuild() -> None:
    """Download the rebuild, check it, take its compiled file out, install it."""
    requirement, sha256 = pinned_rebuild()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        download = ["--no-deps", "--only-binary=:all:", "--python-version", "3.10"]
        run("pip", "download", "-q", *download, "-d", folder, requirement)
        (wheel,) = folder.glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != sha256:
            sys.exit(
                f"{wheel.name} has sha256 {found}, but constraints.txt expects {sha256}: "
                "the download is not the file that was checked; nothing was installed."
            )
        run("wheel", "unpack", "-d", folder / "unpacked", wheel)
        (tree,) = (folder / "unpacked").iterdir()
        for compiled in tree.glob("detectron2/_C*.so"):
            compiled.unlink()
        (folder / "packed").mkdir()
        run("wheel", "pack", "-d", folder / "packed", tree)
        (wheel,) = (folder / "packed").iterdir()
        tags = ["--python-tag", "py3", "--abi-tag", "none", "--platform-tag", "any", "--remove"]
        run("wheel", "tags", *tags, wheel)
        (wheel,) = (folder / "packed").iterdir()
        run("pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Install Detectron2 into the running Python.")
    parser.add_argument("requirement", nargs="?", default="", help="any pip requirement")
    requirement = parser.parse_args().requirement
    if requirement:
        # Detectron2's build imports torch, which an isolated build would not see.
        run("pip", "install", "--no-build-isolation", requirement)
    else:
        install_rebuild()
    run("detectron2.utils.collect_env")


if __name__ == "__main__":
    main()

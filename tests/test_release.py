"""What is built and given away: packages, extras, commands, versions."""

import configparser
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import smca
from helpers import ROOT
from test_structure import FOLDERS


def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def words(text):
    return {line for line in text.split("\n") if line and not line.startswith("#")}


def test_the_extra_all_has_every_other_one():
    extras = settings()["options.extras_require"]
    named = re.fullmatch(r"smca\[(.*)\]", *words(extras["all"])).group(1).split(",")
    assert named == sorted(set(extras) - {"all"})


COMMANDS = dict(
    line.split(" = ") for line in words(settings()["options.entry_points"]["console_scripts"])
)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_help_of_a_command_fits_a_screen_and_has_examples(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    module, _, function = COMMANDS[name].partition(":")
    with pytest.raises(SystemExit, match="^0$"):
        getattr(importlib.import_module(module), function)()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert len([line for line in lines if line.startswith(f"    {name} -")]) >= 2


def test_changelog_and_citation_have_the_packages_version():
    assert f"\n## {smca.__version__} " in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {smca.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("extras", ["all", "dev,study"])
def test_make_setup_notices_other_extras(tmp_path, extras):
    def commands(*variables):
        make = ["make", "-n", "-C", ROOT, "setup", f"VENV={tmp_path}", *variables]
        return subprocess.run(make, check=True, capture_output=True, text=True).stdout

    before = commands()
    assert "[dev,docs,export,pretrained,publish,study]" in before
    Path(re.search(r"^touch (.*)$", before, re.MULTILINE).group(1)).touch()
    assert "pip" not in commands()
    assert f"[{extras}]" in commands(f"EXTRAS={extras}")


def test_the_workflow_runs_targets_of_the_makefile_and_pins_its_actions():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = {step["run"] for step in steps if "run" in step}
    assert commands == {"make lint", "make test"} <= {f"make {target}" for target in targets}
    assert all(re.search(r"@v\d+$", step["uses"]) for step in steps if "uses" in step)


def test_the_wheel_has_every_file_of_the_package(tmp_path):
    ignored = shutil.ignore_patterns(".*", "build", "dist", "output", "site", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist"]
    subprocess.run(command, cwd=tmp_path / "copy", check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")  # which is built from the sdist
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    on_disk = {
        "/".join([*package.split("."), *path.relative_to(folder).parts])
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*.*")
        if path.suffix in (".py", ".yaml", ".html", ".json", ".md")
    }
    assert packed == on_disk

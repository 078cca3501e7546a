"""Planted bugs: the lists fit the code, and the tool tells a caught bug from one that survives. (To
plant the listed ones takes an hour, see docs/testing.md.)"""

import functools
import json
import signal
import subprocess
import sys
import time

import pytest

import mutate
from helpers import error_of

CODE = """\
def mean(values):
    if not values:
        return 0.0
    return sum(values) / len(values)
"""
TESTS = """\
from code_of_the_toy import mean


def test_mean():
    assert mean([1, 3]) == 2
"""
BUGS = """\
- bug: the sum is not divided
  file: projects/SMCA/smca/code_of_the_toy.py
  old: " / len(values)"
  new: ""
- bug: nothing has a mean of one
  file: projects/SMCA/smca/code_of_the_toy.py
  old: "0.0"
  new: "1.0"
- bug: it cannot be imported
  file: projects/SMCA/smca/code_of_the_toy.py
  old: "def mean(values):"
  new: "def mean(values:"
- bug: it never ends
  file: projects/SMCA/smca/code_of_the_toy.py
  old: "    return sum"
  new: "    while True: pass\\n    return sum"
  tests: [tests/test_toy.py::test_mean]
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A checkout with four bugs in a list, one of which its test does not notice."""
    files = {
        "projects/SMCA/smca/code_of_the_toy.py": CODE,
        "tests/test_toy.py": TESTS,
        "tests/mutants/toy.yaml": BUGS,
        "tests/mutants/tests.yml": "projects/*: [tests/test_toy.py]\n",
        "setup.cfg": "[tool:pytest]\npythonpath = projects/SMCA/smca\n",
    }
    for name, text in files.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "toy" / "configs").mkdir()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path / "toy", check=True)
    monkeypatch.setattr(mutate, "ROOT", tmp_path / "toy")
    monkeypatch.setattr(mutate, "LISTS", tmp_path / "toy" / "tests" / "mutants")
    monkeypatch.setattr(mutate, "_LIBRARIES", [])
    monkeypatch.setattr(mutate, "_TIMEOUT_S", 3.0)
    return tmp_path / "toy"


def test_every_listed_bug_fits_the_code(capsys):
    mutants = mutate.read_mutants([], "")
    assert len(mutants) >= 100
    assert mutate.main(["--check"]) == 0
    assert capsys.readouterr().out == f"{len(mutants)} bugs fit.\n"


def test_every_listed_bug_has_its_own_words_and_tests_that_exist():
    mutants = mutate.read_mutants([], "")
    assert len({(m.file, m.bug) for m in mutants}) == len(mutants)
    for test in {test for m in mutants for test in m.tests}:
        file, _, name = test.partition("::")
        assert f"def {name}" in (mutate.ROOT / file).read_text()


def test_a_file_of_the_package_has_tests_by_its_name():
    for path in (mutate.ROOT / "projects" / "SMCA" / "smca").rglob("*.py"):
        if path.name not in ("__init__.py", "version.py"):
            for test in mutate.tests_of(path.relative_to(mutate.ROOT).as_posix()):
                assert (mutate.ROOT / test).is_file()


def test_bugs_are_caught_or_survive_and_the_checkout_stays_as_it_is(toy, tmp_path, capsys):
    output = tmp_path / "outcomes.json"
    assert mutate.main(["--jobs", "2", "--output", str(output)]) == 1
    table = capsys.readouterr().out
    assert "| toy    |         4 |        3 |          1 |" in table
    assert "survived: projects/SMCA/smca/code_of_the_toy.py: nothing has a mean of one" in table
    content = json.loads(output.read_text())
    assert content["rows"] == [["toy", "4", "3", "1"], ["all", "4", "3", "1"]]
    assert content["command"] == f"python tools/mutate.py --jobs 2 --output {output}"
    assert {bug.split(": ")[1]: outcome for bug, outcome in content["bugs"].items()} == {
        "the sum is not divided": "caught",
        "nothing has a mean of one": "survived",
        "it cannot be imported": "caught",
        "it never ends": "late",
    }
    assert (toy / "projects/SMCA/smca/code_of_the_toy.py").read_text() == CODE


def test_bugs_that_nobody_listed_are_drawn_from_the_code(toy, capsys):
    mutants = mutate.random_mutants(100, 0, "")
    # An operator, three constants and none of an argument.
    assert sorted(m.new.splitlines()[int(m.bug.split()[1][:-1]) - 1].strip() for m in mutants) == [
        "return (1.0)",
        "return (sum(values) * len(values))",
    ]
    assert mutate.main(["--random", "2", "--jobs", "1"]) == 1
    assert "| random |         2 |        1 |          1 |" in capsys.readouterr().out


def test_a_bug_that_fits_no_more_is_named(toy, capsys):
    (toy / "projects/SMCA/smca/code_of_the_toy.py").write_text(CODE.replace("0.0", "0"))
    assert mutate.main(["--check"]) == 1
    error = capsys.readouterr().err
    assert "'nothing has a mean of one' of tests/mutants/toy.yaml does not fit" in error


def test_nothing_to_plant_is_an_error(toy, capsys):
    assert "--match 'typo' is in no bug's words" in error_of(capsys, mutate.main, "--match", "typo")
    for option in ("--jobs", "--random"):
        with pytest.raises(SystemExit):
            mutate.main([option, "0"])
        assert f"{option}: has to be a whole number of at least 1" in capsys.readouterr().err


def test_tests_that_fail_without_a_bug_catch_nothing(toy, capsys):
    (toy / "tests/test_toy.py").write_text(TESTS.replace("== 2", "== 3"))
    assert mutate.main(["--jobs", "1"]) == 1
    assert "The tests fail without a bug" in capsys.readouterr().err


def forked_pytest(folder, **settings):
    command = [sys.executable, str(mutate._FORKED_PYTEST)]
    return subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, text=True, **settings)


def test_forked_pytest_gives_the_exit_code_of_each_run(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it(): assert open('answer').read() == 'right'")
    process = forked_pytest(tmp_path, stdout=subprocess.PIPE)
    for answer, code in (("right", "0"), ("wrong", "1"), ("right", "0")):
        (tmp_path / "answer").write_text(answer)
        job = json.dumps([60, ["-q", "-n0", "-p", "no:cacheprovider"]])
        print(job, file=process.stdin, flush=True)
        assert process.stdout.readline() == f"{code}\n"
    process.communicate()


def test_tests_that_run_in_a_fork_end_with_ctrl_c(tmp_path):
    text = "import time\ndef test_it():\n    open('begun', 'w')\n    time.sleep(60)\n"
    (tmp_path / "test_it.py").write_text(text)
    # A shell that starts the suite in the background has the signal ignored.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = forked_pytest(tmp_path, stderr=subprocess.PIPE, preexec_fn=heed)
    print(json.dumps([60, ["-q", "-n0"]]), file=process.stdin, flush=True)
    while process.poll() is None and not (tmp_path / "begun").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)  # which the fork's end of the pipe would keep open

import functools
import os
import subprocess

import pytest

import busy_machine
from busy_machine import CASES, Case
from helpers import error_of
from smca.errors import exit_code


def test_ratios_are_to_the_first_row_on_a_quiet_machine():
    columns, rows = busy_machine.table_of({CASES[0].name: [0.2, 4.0], "other": [0.25, 0.5]})
    assert [row[1:] for row in rows] == [
        ["0.200", "4.000", "1.00", "20.0"],
        ["0.250", "0.500", "1.25", "2.5"],
    ]
    assert len(columns) == 5


@pytest.fixture
def trainings(monkeypatch):
    """What each training is started with; it logs steps that take as long as their number says."""
    started = []

    def run(command, env, **kwargs):
        started.append((command, env))
        if "optimizer.rl=1" in command:
            return subprocess.CompletedProcess(
                command, 1, "", "a warning\nError: no optimizer.rl.\n"
            )
        (folder,) = [x.partition("=")[2] for x in command if x.startswith("train.output_dir=")]
        os.makedirs(folder)
        with open(os.path.join(folder, "metrics.json"), "w") as file:
            file.writelines(f'{{"iteration": {i}, "time": {i}.0}}\n' for i in range(2, 11))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return started


def test_first_steps_do_not_count(trainings):
    assert busy_machine.seconds_of_a_step(CASES[0], 5, []) == 8.0  # of 6 to 10


def test_a_case_has_its_own_settings_alone(trainings, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "9")
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    case = Case("two", {"OMP_WAIT_POLICY": "PASSIVE"}, ["--num-gpus", "2"])
    busy_machine.measure(case, 5, ["optimizer.lr=1"])
    assert len(trainings) == 2
    for command, env in trainings:
        assert env["OMP_WAIT_POLICY"] == "PASSIVE"
        assert not {"GOMP_SPINCOUNT", "OMP_NUM_THREADS"} & set(env)
        assert command[2:4] == ["--num-gpus", "2"] and command[-1] == "optimizer.lr=1"


def test_a_neighbour_is_there_for_the_second_training_only(trainings, monkeypatch):
    events = []

    class Neighbour:
        def __init__(self, *args, **kwargs):
            events.append(len(trainings))

        def kill(self):
            events.append("killed")

        def wait(self):
            events.append("gone")

    monkeypatch.setattr(subprocess, "Popen", Neighbour)
    busy_machine.measure(CASES[0], 5, [])
    assert events == [1, "killed", "gone"] and len(trainings) == 2


def test_what_a_training_says_is_the_error(trainings, capsys):
    text = error_of(capsys, functools.partial(exit_code, busy_machine.main), "optimizer.rl=1")
    assert text == "Error: The training failed: no optimizer.rl."


def test_no_steps_are_an_error(capsys):
    with pytest.raises(SystemExit):
        busy_machine.main(["--steps", "0"])
    assert "--steps: has to be a whole number of at least 1, not 0" in capsys.readouterr().err

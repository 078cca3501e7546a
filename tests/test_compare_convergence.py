import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import instantiate
from detectron2.engine import default_argument_parser
from detectron2.structures import Boxes, Instances

import compare_convergence as tool
import convergence_report as convergence
from convergence_study import make_report
from helpers import (
    ROOT,
    TinyDetector,
    close_logs,
    error_of,
    state_of,
    write_dataset,
    write_tiny_config,
)
from smca import engine
from smca.engine import Trainer
from smca.errors import UserError

CONVERGENCE = ROOT / "configs" / "convergence"


@pytest.fixture(autouse=True)
def poll_often(monkeypatch):
    monkeypatch.setattr(tool, "_POLL_SECONDS", 0.01)


WIDE = {"config": "config.py"}


def write_study(folder, **changes):
    """Two runs of 6 steps, evaluated after 3 and 6, 2 steps an epoch; each with two seeds."""
    checkpointer = {"period": 100, "max_to_keep": 1}
    config = write_tiny_config(folder, max_iter=6, eval_period=3, checkpointer=checkpointer)
    runs = {
        "wide": WIDE,
        "narrow": {"config": config, "overrides": ["model.width=4"]},
    }
    study = {"seeds": [0, 1], "overrides": ["model.dropout=0.2"], "runs": runs, **changes}
    path = folder / "tiny.yaml"
    path.write_text(yaml.dump(study, sort_keys=False))
    return str(path)


class InThisProcess:
    """Stands for a process: trains where it is launched, which takes no start-up."""

    launched = []

    def __init__(self, training, jobs=1):
        self.launched.append(training)
        args = ["--config-file", training.config_file, "--resume", *training.overrides]
        self.returncode = engine.run(default_argument_parser().parse_args(args))

    def poll(self):
        return self.returncode

    def terminate(self):
        raise AssertionError("it has ended already")


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setattr(InThisProcess, "launched", [])
    monkeypatch.setattr(tool, "launch", InThisProcess)
    return InThisProcess.launched


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study and the folder of its trainings and report. Tests only read them."""
    folder = tmp_path_factory.mktemp("study")
    path = write_study(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tool, "_POLL_SECONDS", 0.01)
        monkeypatch.setattr(tool, "launch", InThisProcess)
        assert tool.main([path, "--output", str(folder / "out")]) == 0
    close_logs()
    before = state_of(folder)
    yield path, folder / "out"
    assert state_of(folder) == before


@pytest.fixture
def copied(finished, tmp_path):
    """The same study and a copy of that folder, to write into."""
    path, out = finished
    shutil.copytree(out, tmp_path / "out")
    return path, tmp_path / "out"


def read_json(folder, name="tiny"):
    return json.loads((folder / f"{name}.json").read_text())


def modified(folder):
    """Checkpoints and metrics with the times of their last change."""
    files = state_of(folder)
    return {path: files[path] for path in files if path.endswith((".pth", "metrics.json"))}


# What a study leaves behind


def test_every_run_trains_with_every_seed_in_a_folder_of_its_own(finished):
    _, out = finished
    folders = {str(path.parent.relative_to(out)) for path in out.rglob("model_final.pth")}
    assert folders == {"wide/seed0", "wide/seed1", "narrow/seed0", "narrow/seed1"}


def test_report_has_what_training_logged(finished):
    _, out = finished
    for run in read_json(out)["runs"]:
        lines = (out / run["name"] / f"seed{run['seed']}" / "metrics.json").read_text()
        rows = [json.loads(line) for line in lines.splitlines()]
        logged = [(row["bbox/AP"], row["bbox/AP50"]) for row in rows if "bbox/AP" in row]
        iterations, epochs, seconds, ap, ap50 = zip(*run["evaluations"])
        assert iterations == (3, 6)
        assert epochs == (1.5, 3.0)  # batches of 4 of 8 images
        assert 0 < seconds[0] < seconds[1]
        assert list(zip(ap, ap50)) == [pytest.approx(row, abs=1e-3) for row in logged]
        assert run["final"]["iteration"] == 6 and run["final"]["AP"] == ap[-1]


def test_report_tells_what_each_run_is(finished):
    _, out = finished
    report = read_json(out)
    assert report["overrides"] == ["model.dropout=0.2"]
    first, second, third = report["runs"][:3]
    assert (first["name"], first["seed"]) == ("wide", 0)
    assert (second["name"], second["seed"]) == ("narrow", 0)
    assert (third["name"], third["seed"]) == ("wide", 1)
    assert second["overrides"] == ["model.width=4"] and second["config"] == "config.py"
    for run, width in ((first, 8), (second, 4)):
        parameters = TinyDetector(width=width).parameters()
        assert run["num_parameters"] == sum(p.numel() for p in parameters)


def test_seeds_change_the_training(finished):
    _, out = finished
    weights = [
        torch.load(out / "wide" / f"seed{seed}" / "model_final.pth", weights_only=True)["model"]
        for seed in (0, 1)
    ]
    assert not torch.equal(weights[0]["class_embed.weight"], weights[1]["class_embed.weight"])


def test_finished_runs_are_not_run_again(copied, launched, capsys):
    path, out = copied
    before = modified(out)
    assert tool.main([path, "--output", str(out)]) == 0
    assert launched == [] and modified(out) == before
    assert "4 of 4 trainings are finished" in capsys.readouterr().out


def test_report_is_made_again_from_the_folders(finished, launched, tmp_path):
    path, out = finished
    args = [path, "--output", str(out), "--report-only", "--report-dir", str(tmp_path)]
    assert tool.main(args) == 0
    assert launched == []
    names = ["tiny.json", "tiny.md", "tiny_all.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_table_and_picture_are_made_from_the_json_alone(finished, tmp_path):
    _, out = finished
    alone = tmp_path / "tiny.json"
    alone.write_bytes((out / "tiny.json").read_bytes())
    assert tool.main([str(alone)]) == 0
    for name in ("tiny.md", "tiny_all.png"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_a_report_keeps_what_another_machine_trained(finished, tmp_path, monkeypatch, capsys):
    path, out = finished
    here, docs = tmp_path / "here", tmp_path / "docs"
    docs.mkdir()
    report = read_json(out)
    wide, narrow, *_ = report["runs"]
    wide["evaluations"][-1][3:] = wide["final"]["AP"], wide["final"]["AP50"] = [12.5, 25.0]
    narrow["final"], narrow["evaluations"] = None, narrow["evaluations"][:1]  # stopped there
    report["runs"] = [wide, narrow]
    (docs / "tiny.json").write_text(json.dumps(report))
    args = [path, "--output", str(here), "--report-dir", str(docs)]
    assert tool.main([*args, "--report-only"]) == 0
    assert read_json(docs)["runs"][:2] == [wide, narrow]

    trained = []

    def launch(training, jobs):
        trained.append(str(training))
        write_metrics(training, [{"iteration": 6, "bbox/AP": 1.0, "bbox/AP50": 2.0}])
        return subprocess.Popen(["true"])

    monkeypatch.setattr(tool, "launch", launch)
    assert tool.main(args) == 0
    assert trained == ["narrow, seed 0", "wide, seed 1", "narrow, seed 1"]
    assert "1 finished trainings that are not here" in capsys.readouterr().out
    first, *others = read_json(docs)["runs"]
    assert first == wide and [run["final"]["AP"] for run in others] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "key, value, num_lost",
    [
        ("overrides", ["model.dropout=0.3"], 4),
        ("iterations_per_epoch", 3.0, 4),  # other data
        ("max_iter", 5, 1),
        ("name", "not in the study any more", 1),
    ],
)
def test_a_report_of_other_settings_is_not_lost(
    finished, launched, tmp_path, capsys, key, value, num_lost
):
    path, out = finished
    report, file = read_json(out), tmp_path / "tiny.json"
    (report if key in report else report["runs"][0])[key] = value
    file.write_text(json.dumps(report))
    before = state_of(tmp_path)
    args = [path, "--output", tmp_path / "here", "--report-dir", tmp_path]
    for more in ([], ["--report-only"]):
        text = error_of(capsys, tool.main, *args, *more)
        assert f"{file} has {num_lost} trainings of other settings" in text
        assert "choose another --report-dir" in text
    assert launched == [] and state_of(tmp_path) == before


def test_other_settings_in_the_same_folder_are_an_error(copied, launched, capsys):
    path, out = copied
    assert tool.main([path, "--output", str(out), "optimizer.lr=0.5"]) == 1
    assert "other settings (optimizer.lr is 0.01 there, 0.5 now)" in capsys.readouterr().err
    assert launched == []


def test_what_is_kept_may_change(copied, launched):
    path, out = copied
    before = modified(out)
    assert tool.main([path, "--output", str(out), "train.checkpointer.max_to_keep=2"]) == 0
    assert launched == [] and modified(out) == before


# Starting, going on, stopping


def test_only_the_named_runs_are_trained(tmp_path, launched):
    path = write_study(tmp_path, seeds=[3])
    assert tool.main([path, "--output", str(tmp_path / "out"), "--runs", "wide"]) == 0
    assert [str(training) for training in launched] == ["wide, seed 3"]
    table = (tmp_path / "out" / "tiny.md").read_text()
    assert "| wide " in table and "| narrow " not in table


def test_a_process_goes_on_where_the_training_was_stopped(finished, tmp_path, monkeypatch):
    path, out = write_study(tmp_path, seeds=[0], runs={"wide": WIDE}), tmp_path / "out"
    stopped = tool.read_study(path, str(out)).trainings[0]
    original = Trainer._forward_backward

    def fail(self, data, micro_batch):
        if self.iter == 4:
            raise RuntimeError
        return original(self, data, micro_batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_forward_backward", fail)
        with pytest.raises(RuntimeError):
            InThisProcess(stopped)
    assert not stopped.is_finished()

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
    assert tool.main([path, "--output", str(out)]) == 0
    assert "Resuming at iteration 4" in (out / "wide/seed0/log.txt").read_text()
    same, other = (
        torch.load(folder / "wide/seed0/model_final.pth", weights_only=True)["model"]
        for folder in (finished[1], out)
    )
    assert all(torch.equal(same[key], other[key]) for key in same)


FAILS_IF_NARROW = """
import sys
if "model.width=4" in sys.argv:
    print("Error: The loss became nan.", file=sys.stderr)
    print("bye")
    sys.exit(1)
folder = sys.argv[-1].split('"')[1]
with open(folder + "/metrics.json", "w") as file:
    file.write('{"iteration": 6, "bbox/AP": 1.0, "bbox/AP50": 2.0}')
"""


def test_one_failure_leaves_the_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "train_net.py").write_text(FAILS_IF_NARROW)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    path, out = write_study(tmp_path, seeds=[0]), tmp_path / "out"
    assert tool.main([path, "--output", str(out), "--jobs", "2"]) == 1
    assert capsys.readouterr().err == (
        f"Error: narrow, seed 0 failed: The loss became nan. (see {out}/narrow/seed0/console.txt)\n"
    )
    finals = {run["name"]: run["final"] for run in read_json(out)["runs"]}
    assert finals["wide"]["AP"] == 1.0 and finals["narrow"] is None


def test_the_reason_of_a_failure_is_that_of_this_attempt(tmp_path, monkeypatch, capsys):
    (tmp_path / "train_net.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    path, out = write_study(tmp_path, seeds=[0], runs={"wide": WIDE}), tmp_path / "out"
    console = out / "wide" / "seed0" / "console.txt"
    console.parent.mkdir(parents=True)
    console.write_text("Error: The disk is full: schön.\n")
    text = error_of(capsys, tool.main, path, "--output", out)
    assert text == f"Error: wide, seed 0 failed: exit code -9 (see {console})"


def test_jobs_share_the_threads(copied, monkeypatch):
    path, out = copied
    training = tool.read_study(path, str(out)).trainings[0]
    calls = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(tool.subprocess, "Popen", lambda *args, **kwargs: calls.append(kwargs))
    for jobs in (1, 3, 20):
        tool.launch(training, jobs)
    assert [call["env"]["OMP_NUM_THREADS"] for call in calls] == ["8", "2", "1"]


SLEEPER = """
import pathlib, signal, sys, time

def save(number, frame):
    signal.signal(number, signal.SIG_DFL)
    time.sleep(0.3)
    pathlib.Path("saved").touch()
    sys.exit(1)

signal.signal(signal.SIGTERM, save)
pathlib.Path("metrics.json").write_text(sys.argv[1])
time.sleep(60)
"""


def sleeper(training, rows=()):
    """A process that writes metrics, waits for a signal and then takes its time to save; a second
    signal ends it at once, as it does the training script."""
    os.makedirs(training.folder)
    text = "\n".join(map(json.dumps, rows))
    process = subprocess.Popen([sys.executable, "-S", "-c", SLEEPER, text], cwd=training.folder)
    metrics_file = os.path.join(training.folder, "metrics.json")
    while process.poll() is None and not os.path.exists(metrics_file):
        pass
    return process


def has_saved(training):
    return os.path.exists(os.path.join(training.folder, "saved"))


def test_a_run_stops_at_its_ap(tmp_path, monkeypatch):
    runs = {"wide": {"config": "config.py", "stop_at_ap": 20}}
    path = write_study(tmp_path, seeds=[0], runs=runs)
    study = tool.read_study(path, str(tmp_path / "out"))
    row = {"iteration": 2, "bbox/AP": 20.5, "bbox/AP50": 30.0}
    monkeypatch.setattr(tool, "launch", lambda training, jobs: sleeper(training, [row]))
    assert tool.train(study.trainings, 1) == {}
    assert study.trainings[0].is_finished() and has_saved(study.trainings[0])
    assert make_report(study)["runs"][0]["final"]["iteration"] == 3


def test_processes_end_with_the_script(tmp_path, monkeypatch):
    study = tool.read_study(write_study(tmp_path), str(tmp_path / "out"))
    processes = []

    def launch(training, jobs):
        processes.append(sleeper(training))
        return processes[-1]

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "launch", launch)
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tool.train(study.trainings, 2)
    assert [process.returncode for process in processes] == [1, 1]
    assert all(map(has_saved, study.trainings[:2]))


# Reading what training wrote


@pytest.fixture
def training(tmp_path):
    path = write_study(tmp_path)
    return tool.read_study(path, str(tmp_path / "out")).trainings[0]


def write_metrics(training, rows):
    os.makedirs(training.folder)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path(training.folder, "metrics.json").write_text(lines)


def test_a_run_that_has_not_begun_has_no_evaluations(training):
    assert training.evaluations() == [] and not training.is_finished()


def test_time_is_that_of_the_training_steps_on_a_machine_that_does_nothing_else(training):
    times = [0.1, *(60.0 for _ in range(9)), 0.2]
    rows = [{"iteration": i, "time": t} for i, t in enumerate(times)]
    for row, ap in zip((rows[1], rows[2], rows[5]), (1.0, 2.0, 3.0)):
        row.update({"bbox/AP": ap, "bbox/AP50": ap})
    write_metrics(training, rows)
    seconds = {iteration: spent for iteration, spent, _, _ in training.evaluations()}
    assert seconds == pytest.approx({2: 0.4, 3: 0.6, 6: 1.2})


def test_runs_too_short_for_times_have_none(training):
    write_metrics(training, [{"iteration": 1, "bbox/AP": 1.0, "bbox/AP50": 2.0}])
    assert [seconds for _, seconds, _, _ in training.evaluations()] == [None]


def test_ap_without_any_detection_is_zero(training):
    write_metrics(training, [{"iteration": 2, "bbox/AP": math.nan, "bbox/AP50": math.nan}])
    assert training.evaluations() == [(3, None, 0.0, 0.0)]


def test_the_last_evaluation_makes_a_run_finished(training):
    rows = [{"iteration": i, "bbox/AP": 1.0, "bbox/AP50": 2.0} for i in (2, 6)]
    write_metrics(training, rows)  # Detectron2 numbers the final one by the steps done
    assert [row[0] for row in training.evaluations()] == [3, 6]
    assert training.is_finished()


# Table and picture


def run_record(name, seed, ap, ap50, steps=(100, 200, 300), seconds_per_step=0.5):
    rows = [[i, i / 50, i * seconds_per_step, a, b] for i, a, b in zip(steps, ap, ap50)]
    about = {"config": "a.py", "overrides": [], "num_parameters": 1234567, "max_iter": 400}
    return {"name": name, "seed": seed, **about, "evaluations": rows}


REPORT = {
    "study": "made",
    "overrides": [],
    "target_ap": None,
    "comparisons": {"main": ["DETR", "SMCA"]},
    "runs": [
        run_record("DETR", 0, [0, 5, 10], [1, 10, 20]),
        run_record("SMCA", 0, [1, 20, 30], [2, 40, 60], seconds_per_step=0.6),
        run_record("SMCA", 1, [0, 10, 20], [2, 30, 50], seconds_per_step=0.8),
    ],
}


NAMES = ["DETR", "SMCA"]


def table_of(report=REPORT, names=NAMES, target_ap=None):
    return convergence.make_table(convergence.evaluations(report), names, target_ap)


def cells(table, row):
    """{header: text} of the rows of this name."""
    texts = {}
    for part in table.split("\n\n"):
        lines = [[x.strip() for x in line.strip("|").split("|")] for line in part.splitlines()]
        for line in lines:
            if line[0] == row:
                texts.update(zip(lines[0], line))
    return texts


def test_table_has_mean_and_range_over_seeds():
    row = cells(table_of(), "SMCA")
    assert row["seeds"] == "2" and row["parameters"] == "1.23M" and row["steps"] == "300"
    assert row["AP"] == "25.0 (20.0 to 30.0)"
    assert row["AP50"] == "55.0 (50.0 to 60.0)"
    assert row["AP, half"] == "15.0 (10.0 to 20.0)"  # 200 of 400 steps
    assert row["AP50, half"] == "35.0 (30.0 to 40.0)"
    assert row["s/step"] == "0.700"
    assert cells(table_of(), "DETR")["AP"] == "10.0"


def test_table_has_the_steps_and_time_to_the_baselines_ap():
    table = table_of()
    baseline, row = cells(table, "DETR"), cells(table, "SMCA")
    # The mean over the seeds rises from 0.5 at step 100 to 15 at step 200.
    steps = 100 + 100 * (10 - 0.5) / (15 - 0.5)
    assert baseline["steps to AP 10.0"] == "300" and baseline["steps ratio"] == "1.0"
    assert row["steps to AP 10.0"] == f"{steps:.0f}"
    assert row["steps ratio"] == f"{300 / steps:.1f}"
    assert baseline["minutes to AP 10.0"] == f"{300 * 0.5 / 60:.1f}"
    assert row["minutes to AP 10.0"] == f"{steps * 0.7 / 60:.1f}"
    assert row["time ratio"] == f"{300 * 0.5 / (steps * 0.7):.1f}"


def test_a_baseline_that_does_not_reach_the_ap_gives_a_bound():
    table, to_detr, note = table_of(target_ap=15).split("\n\n")
    assert cells(table, "DETR")["steps to AP 15.0"] == "-"
    assert cells(table, "DETR")["steps ratio"] == "-"
    assert cells(table, "SMCA")["steps to AP 15.0"] == "200"
    assert cells(table, "SMCA")["steps ratio"] == "> 1.5"
    # The AP that it does reach is counted, too.
    assert cells(to_detr, "DETR")["steps to AP 10.0"] == "300"
    assert cells(to_detr, "SMCA")["steps ratio"] == f"{300 / (100 + 100 * 9.5 / 14.5):.1f}"
    assert "DETR" in note


def test_a_baseline_that_reaches_the_ap_is_not_counted_further():
    table = table_of(target_ap=5)
    assert cells(table, "DETR")["steps to AP 5.0"] == "200"
    assert cells(table, "SMCA")["steps ratio"] == f"{200 / (100 + 100 * 4.5 / 14.5):.1f}"
    assert "AP 10.0" not in table


def test_no_steps_are_counted_to_an_ap_near_zero():
    report = {**REPORT, "runs": [run_record("DETR", 0, [0, 0, 0.4], [0, 0, 1])]}
    table = table_of(report, ["DETR"])
    assert "steps to" not in table.splitlines()[0]
    assert "steps to AP" not in table
    assert "DETR stays at AP 0.40" in table
    assert "steps to AP" not in table_of(target_ap=0.9)


def claims_report(**finals):
    """Of runs with these final AP, one a seed; None: not finished."""
    runs = [
        {"name": name, "seed": seed, "final": ap and {"AP": ap}}
        for name, values in finals.items()
        for seed, ap in enumerate(values)
    ]
    claims = {"A over B": {"runs": ["A", "B"], "published": [43.7, 41.0]}}
    return {"runs": runs, "claims": claims}


@pytest.mark.parametrize(
    ("better", "worse", "here", "difference", "seeds", "verdict"),
    [
        # Variances 1 of three seeds: sqrt(1 / 3 + 1 / 3).
        ([30, 31, 32], [10, 11, 12], "31.0 over 11.0", "+20.0 ± 0.8", "3 and 3", "yes"),
        ([10, 11, 12], [30, 31, 32], "11.0 over 31.0", "-20.0 ± 0.8", "3 and 3", "no"),
        # Variances 50 and 40.5 of two.
        ([30, 20], [28, 19], "25.0 over 23.5", "+1.5 ± 6.7", "2 and 2", "undecided"),
        # t = 2.5 of 4 degrees of freedom: the chance is 7 %, though more than two standard errors.
        ([12, 13, 14], [10, 11, 12], "13.0 over 11.0", "+2.0 ± 0.8", "3 and 3", "undecided"),
        ([30, None], [10, 11], "30.0 over 10.5", "+19.5", "1 and 2", "undecided"),
        ([None], [10, 11], "not trained", "-", "-", "undecided"),
    ],
)
def test_a_claim_is_decided_where_its_difference_is_no_chance(
    better, worse, here, difference, seeds, verdict
):
    table = convergence.make_claims(claims_report(A=better, B=worse))
    expected = dict(claim="A over B", published="43.7 over 41.0", here=here)
    expected.update(difference=difference, seeds=seeds, verdict=verdict)
    assert table.to_dict("records") == [expected]


@pytest.mark.parametrize(
    "target, expected", [(0, 10), (2, 10), (3, 15), (4, 20), (5, 35), (6, 40), (6.5, None)]
)
def test_reach_is_the_first_crossing(target, expected):
    x, ap = np.array([10.0, 20, 30, 40]), np.array([2.0, 4, 4, 6])
    assert convergence.reach(x, ap, target) == expected


def test_a_comparison_without_its_baseline_is_left_out(tmp_path):
    report = {**REPORT, "runs": REPORT["runs"][1:]}
    written = [str(tmp_path / "made.json"), str(tmp_path / "made.md")]
    assert convergence.write_report(report, str(tmp_path)) == written
    assert "## main" not in (tmp_path / "made.md").read_text()


def test_only_evaluations_that_all_seeds_have_are_compared():
    runs = [run_record("SMCA", 0, [1, 2, 3], [1, 2, 3]), run_record("SMCA", 1, [3, 4], [5, 6])]
    runs.append(run_record("SMCA", 2, [], []))  # not begun
    rows = convergence.evaluations({"runs": runs})
    assert rows[["seed", "iteration", "AP"]].values.tolist() == [
        [0, 100, 1],
        [0, 200, 2],
        [1, 100, 3],
        [1, 200, 4],
    ]


def test_picture_shows_both_metrics_over_steps_epochs_and_minutes():
    figure = convergence.draw(convergence.evaluations(REPORT), NAMES)
    axes = figure.get_axes()
    assert [x.get_xlabel() for x in axes[3:]] == ["steps", "epochs", "minutes of training"]
    lines = [x.get_lines()[1] for x in axes]
    ap, ap50 = [0.5, 15, 25], [2, 35, 55]
    for line, mean in zip(lines, [ap] * 3 + [ap50] * 3, strict=True):
        assert line.get_ydata().tolist() == mean
    steps = np.array([100, 200, 300])
    for line, x in zip(lines, [steps, steps / 50, steps * 0.7 / 60] * 2, strict=True):
        assert line.get_xdata() == pytest.approx(x)
    band = axes[0].collections[1].get_paths()[0].vertices
    assert {(100, 0), (100, 1), (300, 20), (300, 30)} <= {tuple(point) for point in band}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DETR", "SMCA"]


# What cannot be used


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seed": [0]}, "unknown key seed, did you mean seeds?"),
        ({"seeds": 2}, "tiny.yaml: seeds has to be a list, it cannot be 2"),
        ({"runs": {}}, "is no study: add runs"),
        ({"runs": {"wide": "config.py"}}, "run wide has no config"),
        ({"runs": {"wide": {**WIDE, "override": []}}}, "did you mean overrides?"),
        ({"runs": {"wide": {**WIDE, "stop_at_ap": "a"}}}, "stop_at_ap has to be a number"),
        ({"runs": {"wide": {"config": "nowhere.py"}}}, "nowhere.py does not exist"),
        (
            {"comparisons": {"main": "wide"}},
            "comparisons: main has to be a list of runs, it cannot be 'wide'",
        ),
        ({"comparisons": {"main": []}}, "comparisons: main has to be a list of runs"),
        ({"comparisons": {"main": ["wde"]}}, "no run wde in .*did you mean wide?"),
        ({"claims": {"A over B": ["wide"]}}, "claims: A over B has to be a section"),
        ({"claims": {"A": {"runs": ["wide"]}}}, "claims: A needs runs: [A, B]"),
        ({"claims": {"A": {"runs": ["wide", "wde"]}}}, "no run wde in .*did you mean wide?"),
        ({"claims": {"A": {"published": [4, 3]}}}, "claims: A needs runs: [A, B]"),
        ({"overrides": [{"train.max_iter": 5}]}, "tiny.yaml: overrides has to be a list of texts"),
        ({"runs": {"wide": {**WIDE, "overrides": [5]}}}, "wide: overrides has to be a list of te"),
        ({"overrides": ["train.early_stopping=3"]}, "make it 0, and use stop_at_ap"),
        ({"overrides": ["train.max_itr=5"]}, "did you mean train.max_iter?"),
        ({"overrides": ["train.seed=5"]}, "train.seed cannot be overridden"),
        ({"overrides": ["train.eval_period=0"]}, "train.eval_period=0: make it"),
        ({"overrides": ["train.log_period=4"]}, "make it at least train.log_period=4"),
        (
            {
                "runs": {
                    "a": WIDE,
                    "b": {**WIDE, "overrides": ["dataloader.train.total_batch_size=2"]},
                }
            },
            "a and b cannot be compared: dataloader.train.total_batch_size is 4 and 2",
        ),
    ],
)
def test_a_wrong_study_is_an_error(tmp_path, capsys, changes, words):
    path = write_study(tmp_path, **changes)
    text = error_of(capsys, tool.main, path, "--output", tmp_path / "out")
    assert all(part in text for part in words.split(".*"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["max_iter", "eval_period"])
def test_steps_that_follow_from_the_data_have_to_be_given(tmp_path, capsys, key):
    (tmp_path / "computed.py").write_text(
        "from .config import dataloader, lr_multiplier, model, optimizer, train\n"
        f'train.{key} = dict(_target_="builtins.len", obj="four")\n'
    )
    path = write_study(tmp_path, runs={"wide": {"config": "computed.py"}})
    text = error_of(capsys, tool.main, path, "--output", tmp_path / "out")
    assert f"wide has a train.{key} that is computed from the data: give train.{key}=N." in text


def test_a_name_with_special_characters_can_be_that_of_a_run(tmp_path):
    name = 'Größe "a", b=1'
    path = write_study(tmp_path, seeds=[0], runs={name: WIDE})
    training = tool.read_study(path, str(tmp_path / "out")).trainings[0]
    assert training.cfg.train.output_dir == str(tmp_path / "out" / name / "seed0")


def test_a_value_that_the_model_refuses_is_named(tmp_path, capsys):
    config = str(ROOT / "configs" / "smca_shapes.py")
    runs = {"wide": {"config": config, "overrides": ["model.decoder.beta=-1"]}}
    path = write_study(tmp_path, overrides=[], runs=runs)
    args = [path, "--output", tmp_path / "out", "--report-only"]
    text = error_of(capsys, tool.main, *args)
    assert "model.decoder" in text and "beta=-1" in text


def test_an_unknown_run_is_an_error(finished, capsys):
    text = error_of(capsys, tool.main, finished[0], "--output", finished[1], "--runs", "narow")
    assert "no run narow in the study, did you mean narrow?" in text


def test_no_jobs_are_an_error(finished, capsys):
    assert "--jobs" in error_of(capsys, tool.main, finished[0], "--jobs", 0)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_that_is_missing_or_of_another_kind_is_named(tmp_path, capsys, suffix):
    path = tmp_path / ("study" + suffix)
    assert f"{path} cannot be read" in error_of(capsys, tool.main, path)
    path.write_text("{")
    assert f"{path} is no " in error_of(capsys, tool.main, path)
    path.write_text("[1]")
    assert f"{path} is no " in error_of(capsys, tool.main, path)


def test_a_report_cannot_be_trained(finished, capsys):
    text = error_of(capsys, tool.main, finished[1] / "tiny.json", "--runs", "wide")
    assert "give the study's YAML file" in text


def test_without_pandas_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "pandas.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "benchmarks" / "compare_convergence.py"),
        "x",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("Error: Studies need pandas: run")
    assert "Traceback" not in result.stderr


# The studies of this repository


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder)
    truth, images = folder / "truth.json", folder
    data = [f"data.{split}_json={truth}" for split in ("train", "val")]
    data += [f"data.{split}_images={images}" for split in ("train", "val")]
    return {
        "shapes": tool.read_study(str(CONVERGENCE / "shapes.yaml"), str(folder)),
        "blood_cells": tool.read_study(str(CONVERGENCE / "blood_cells.yaml"), str(folder), data),
    }


@pytest.mark.parametrize("name", ["shapes", "blood_cells"])
def test_main_comparison_has_two_seeds_of_every_variant(studies, name):
    study = studies[name]
    main = study.comparisons["main"]
    assert main == ["DETR", "head-shared", "multi-head", "multi-scale", "conv multi-scale"]
    for run in main:
        assert [t.seed for t in study.trainings if t.name == run] == [0, 1]


@pytest.mark.parametrize("name", ["shapes", "blood_cells"])
def test_every_run_takes_a_step_and_detects(studies, name):
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    truth = {"gt_boxes": [[8.0, 8.0, 40.0, 40.0]], "gt_classes": [0]}
    sizes = {}
    for training in studies[name].trainings:
        if training.name in sizes:
            continue
        model = instantiate(training.cfg.model)
        losses = model.train()([{"image": image, "instances": instances(image, truth)}])
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters()), training.name
        detections = model.eval()([{"image": image}])[0]["instances"]
        assert len(detections) == training.cfg.model.num_queries
        sizes[training.name] = model.neck.strides
    assert sizes["DETR"] == sizes["multi-head"] == [8]
    assert sizes["multi-scale"] == sizes["conv multi-scale"] == [8, 16, 32]


def instances(image, truth):
    boxes, classes = torch.tensor(truth["gt_boxes"]), torch.tensor(truth["gt_classes"])
    return Instances(tuple(image.shape[1:]), gt_boxes=Boxes(boxes), gt_classes=classes)


def test_ablations_differ_in_what_they_are_named_after(studies):
    cfg = {training.name: training.cfg.model for training in studies["shapes"].trainings}
    assert cfg["fixed spread"].decoder.spread == "fixed"
    assert cfg["single spread"].decoder.spread == "single"
    assert cfg["multi-head"].decoder.spread == "independent"
    for pattern in ("IIIII", "III", "MMM"):
        assert cfg[pattern].encoder.pattern == pattern
    assert cfg["multi-scale"].encoder.pattern == "IIMII"
    assert cfg["multi-scale"].decoder.scale_selection
    assert not cfg["no scale selection"].decoder.scale_selection


def test_number_of_classes_follows_the_data(studies):
    for training in studies["blood_cells"].trainings:
        assert instantiate(training.cfg.model.num_classes) == 2


def test_where_the_data_lie_is_not_in_the_report(studies):
    assert "data." not in json.dumps(make_report(studies["blood_cells"])["overrides"])


def test_unusable_yaml_is_one_sentence(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("runs: [a\nb: c: d")
    with pytest.raises(UserError, match="is no YAML file") as error:
        tool.read_study(str(path))
    assert "\n" not in str(error.value)

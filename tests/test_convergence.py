"""Studies of convergence: what they train, go on with, count and refuse."""

import json
import math
import shlex

import pandas as pd
import pytest
import torch
import yaml
from detectron2.config import instantiate
from detectron2.engine import default_argument_parser
from detectron2.utils.events import EventStorage

import convergence as tool
from helpers import ROOT, error_of, write_dataset, write_tiny_config
from measuring import random_batch
from smca import engine
from smca.config import load_config

CONVERGENCE = ROOT / "configs" / "convergence"
WIDE = {"config": "config.py"}


@pytest.fixture(autouse=True)
def poll_often(monkeypatch):
    monkeypatch.setattr(tool, "POLL_SECONDS", 0.01)


def write_study(folder, **changes):
    """Two runs of 6 steps with two seeds each, evaluated after 3 and 6 steps."""
    config = write_tiny_config(folder, max_iter=6, eval_period=3)
    runs = {"wide": WIDE, "narrow": {"config": config, "overrides": ["model.width=4"]}}
    study = {"seeds": [0, 1], "overrides": ["model.dropout=0.2"], "runs": runs, **changes}
    path = folder / "tiny.yaml"
    path.write_text(yaml.dump(study, sort_keys=False))
    return str(path)


def trainings_of(path, output):
    return tool.make_trainings(path, tool.read_study(path), output, [])


def write_metrics(training, rows):
    training.folder.mkdir(parents=True, exist_ok=True)
    (training.folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))


class InThisProcess:
    """Stands for a process: trains where it is launched, which takes no start-up."""

    def __init__(self, training, jobs=1):
        training.folder.mkdir(parents=True, exist_ok=True)
        (training.folder / "command.txt").write_text(shlex.join(training.command))
        args = ["--resume", *training.command]
        self.returncode = engine.run(default_argument_parser().parse_args(args))

    def poll(self):
        return self.returncode


# ---- Training


def test_a_study_trains_what_is_left_reports_it_and_refuses_other_settings(
    tmp_path, monkeypatch, capsys
):
    path, out = write_study(tmp_path), tmp_path / "out"
    monkeypatch.setattr(tool, "launch", InThisProcess)
    assert tool.main([path, "--output", str(out), "--runs", "wide"]) == 0
    assert {p.parent.relative_to(out).as_posix() for p in out.rglob("model_final.pth")} == {
        "wide/seed0",
        "wide/seed1",
    }
    capsys.readouterr()
    assert tool.main([path, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 trainings are finished." in printed
    assert printed.count(": started") == printed.count(": finished") == 2
    assert (out / "tiny_all.png").exists() and (out / "tiny.md").read_text() in printed
    # The table has what the trainings logged.
    aps = [json.loads(line) for line in open(out / "narrow/seed1/metrics.json")]
    rows = trainings_of(path, out)[3].evaluations()
    logged = [row["bbox/AP50"] for row in aps if "bbox/AP50" in row]
    assert rows["AP50"].tolist() == logged and rows["iteration"].tolist() == [3, 6]
    assert 0 < rows["seconds"][0] < rows["seconds"][1]
    # Seeds and overrides reach the training.
    weights = [
        torch.load(out / run / "model_final.pth", weights_only=True)["model"]["class_embed.weight"]
        for run in ("wide/seed0", "wide/seed1", "narrow/seed0")
    ]
    assert not torch.equal(weights[0], weights[1]) and weights[2].shape != weights[0].shape

    text = error_of(capsys, tool.main, path, "--output", out, "optimizer.lr=0.5")
    assert "wide/seed0 holds a training with other settings" in text


TRAINING = """
import os, signal, sys
if "model.width=4" in sys.argv:
    sys.exit("Error: The loss became nan.")
folder = sys.argv[-1].split('"')[1]
assert "--resume" in sys.argv and os.environ["OMP_NUM_THREADS"] == "1"
with open(folder + "/metrics.json", "w") as file:
    file.write('{"iteration": 6, "bbox/AP": 1.0, "bbox/AP50": 2.0}')
"""


def test_one_failure_leaves_the_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "train_net.py").write_text(TRAINING)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    path, out = write_study(tmp_path, seeds=[0]), tmp_path / "out"
    assert tool.main([path, "--output", str(out), "--jobs", "20"]) == 1
    printed = capsys.readouterr().out
    assert f"{out}/narrow/seed0: failed, see console.txt there" in printed
    assert f"{out}/wide/seed0: finished" in printed
    assert (out / "narrow/seed0/console.txt").read_text() == "Error: The loss became nan.\n"
    assert "| wide " in printed and "| narrow " not in printed


# ---- The report


def test_steps_are_counted_and_a_disturbed_step_is_not_the_pace(tmp_path):
    training = trainings_of(write_study(tmp_path), tmp_path / "out")[0]
    assert training.evaluations().empty and not training.is_finished()
    rows = [{"iteration": n, "time": 9.0 if n % 2 else 0.5} for n in range(2, 6)]
    rows += [{"iteration": n, "bbox/AP": float("nan"), "bbox/AP50": 1.0} for n in (2, 6)]
    write_metrics(training, rows)
    found = training.evaluations()
    assert found["iteration"].tolist() == [3, 6] and found["AP"].tolist() == [0, 0]
    assert found["seconds"].tolist() == pytest.approx([1.5, 3.0])
    assert training.is_finished()


def evaluations(name, seed, ap, ap50, pace):
    steps = [100 * (n + 1) for n in range(len(ap))]
    seconds = [pace * step for step in steps]
    rows = pd.DataFrame({"iteration": steps, "seconds": seconds, "AP": ap, "AP50": ap50})
    return rows.assign(name=name, seed=seed, max_iter=400)


ROWS = pd.concat(
    [
        evaluations("DETR", 0, [0.0, 5, 10], [0.0, 10, 20], math.nan),
        evaluations("SMCA", 0, [0.0, 10, 20], [1.0, 30, 50], 0.6),
        evaluations("SMCA", 1, [1.0, 20, 30], [3.0, 40, 60], 0.8),
    ]
)


def test_table_has_mean_and_range_and_the_steps_to_an_ap():
    detr, smca = tool.make_table(ROWS, ["DETR", "SMCA"], 15).to_dict("records")
    assert smca == {
        "run": "SMCA",
        "seeds": "2",
        "steps": "300",
        "AP": "25.0 (20.0 to 30.0)",
        "AP50": "55.0 (50.0 to 60.0)",
        "AP, half": "15.0 (10.0 to 20.0)",  # 200 of 400 steps
        "s/step": "0.700",
        "steps to AP 15": "200",
        "minutes to AP 15": f"{200 * 0.7 / 60:.1f}",
    }
    assert (detr["AP"], detr["s/step"], detr["steps to AP 15"]) == ("10.0", "-", "-")


@pytest.mark.parametrize(
    ("better", "worse", "here", "difference", "verdict"),
    [
        # Variances 1 of three seeds: sqrt(1 / 3 + 1 / 3).
        ([30, 31, 32], [10, 11, 12], "31.0 over 11.0", "+20.0 ± 0.8", "yes"),
        # t = 2.5 of 4 degrees of freedom: the chance is 7 %, though more than two standard errors.
        ([12, 13, 14], [10, 11, 12], "13.0 over 11.0", "+2.0 ± 0.8", "undecided"),
        ([30, None], [10, 11], "30.0 over 10.5", "+19.5", "undecided"),
        ([None], [10, 11], "not trained", "-", "undecided"),
    ],
)
def test_a_claim_is_decided_where_its_difference_is_no_chance(
    tmp_path, better, worse, here, difference, verdict
):
    trainings = []
    for name, finals in (("A", better), ("B", worse)):
        for seed, ap in enumerate(finals):
            trainings.append(tool.Training(name, seed, tmp_path / f"{name}{seed}", [], 10, None))
            if ap is not None:
                write_metrics(trainings[-1], [{"iteration": 10, "bbox/AP": ap, "bbox/AP50": ap}])
    claims = {"A over B": tool.ClaimSpec(["A", "B"], [43.7, 41.0])}
    (row,) = tool.make_claims(claims, trainings).to_dict("records")
    assert (row["claim"], row["published"]) == ("A over B", "43.7 over 41.0")
    assert (row["here"], row["difference"], row["verdict"]) == (here, difference, verdict)


# ---- What cannot be used


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seed": [0]}, "tiny.yaml is no study: Key 'seed' not in 'Study'"),
        ({"runs": {"wide": {**WIDE, "stop_at_ap": "a"}}}, "full_key: runs.wide.stop_at_ap"),
        ({"comparisons": {"main": ["wde"]}}, "tiny.yaml has no run wde, did you mean wide?"),
    ],
)
def test_a_wrong_study_is_one_sentence(tmp_path, capsys, changes, words):
    path = write_study(tmp_path, **changes)
    assert words in error_of(capsys, tool.main, path, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- The studies of this repository


def test_every_run_of_the_projects_studies_takes_a_step_and_detects(tmp_path):
    write_dataset(tmp_path)
    own = [f"data.{split}_json={tmp_path}/truth.json" for split in ("train", "val")]
    own += [f"data.{split}_images={tmp_path}" for split in ("train", "val")]
    models = {}
    for path in sorted(CONVERGENCE.glob("*.yaml")):
        # The data of one are the user's.
        opts = own if path.stem.endswith("blood_cells") else []
        study = tool.read_study(str(path))
        trainings = tool.make_trainings(str(path), study, tmp_path / "out", opts)
        for training in {training.name: training for training in trainings}.values():
            model = load_config(training.command[1], training.command[2:]).model
            models[str(model)] = model
    assert len(models) > 5
    for model in map(instantiate, models.values()):
        batch = random_batch(1, (64, 96), num_classes=2)
        with EventStorage():  # which Faster R-CNN logs into
            sum(model.train()(batch).values()).backward()
        detections = model.eval()(batch)[0]["instances"]
        assert len(detections.pred_boxes) == len(detections.scores)

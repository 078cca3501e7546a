"""What ``kill -9`` leaves is what the output folder holds at that moment. The folder is copied
before each of its files is replaced, and each copy is resumed. (Real kills are in
test_reliability_checkpoints.py and test_reliability_processes.py.)"""

import os
import shutil

import pytest
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.events import get_event_storage

from helpers import arguments, assert_same_bits, close_logs, metrics_of, write_tiny_config
from reliability_cases import files, load
from smca.engine import main

# In the order in which a run of 4 iterations writes them, with checkpoints and evaluations after
# every second one.
WRITTEN = ["config.yaml", "model_0000001.pth", "last_checkpoint", "model_best.pth"]
WRITTEN += ["model_0000003.pth", "last_checkpoint", "model_final.pth", "last_checkpoint"]
WRITTEN += ["model_best.pth"]


class IterationEvaluator(DatasetEvaluator):
    """Each evaluation is better than the one before."""

    def evaluate(self):
        return {"bbox": {"AP": get_event_storage().iter}}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A config and the folder of its run, beside which are the copies before_0, before_1, ..."""
    folder = tmp_path_factory.mktemp("kill")
    config = write_tiny_config(folder, max_iter=4, early_stopping=3)
    with open(config, "a") as file:
        file.write("from test_reliability_kill import IterationEvaluator\n")
        file.write("dataloader['evaluator'] = L(IterationEvaluator)()\n")
    run, replace, written = folder / "run", os.replace, []

    def copy_and_replace(source, target):
        if os.path.dirname(target) == str(run):
            shutil.copytree(run, folder / f"before_{len(written)}")
            written.append(os.path.basename(target))
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", copy_and_replace)
        main(arguments("--config-file", config))
    close_logs()
    assert written == WRITTEN
    return config, run


@pytest.mark.parametrize("moment", range(len(WRITTEN)))
def test_a_run_that_is_killed_before_a_write_ends_like_one_that_is_not(unbroken, moment):
    config, run = unbroken
    resumed = run.parent / f"before_{moment}"
    main(arguments("--config-file", config, "--resume", f"train.output_dir={resumed}"))
    close_logs()

    def compared(folder):
        return {name for name in files(folder) if not name.startswith("events.out")}

    assert compared(resumed) == compared(run)
    for name in sorted(compared(run)):
        if name.endswith(".pth"):
            assert_same_bits(load(resumed / name), load(run / name), name)
    assert (resumed / "last_checkpoint").read_text() == "model_final.pth"
    assert metrics_of(resumed, "bbox/AP") == metrics_of(run, "bbox/AP")
    assert metrics_of(resumed, "iteration").keys() == set(range(5))

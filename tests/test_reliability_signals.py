"""Signals: what a scheduler, systemd or ctrl-C sends, to all processes of a training."""

import os
import signal
import time

import torch

from helpers import TinyDetector, assert_same_bits, metrics_of, write_tiny_config
from reliability_cases import Job, files, iteration_of, load
from smca.data.loader import _SeededMapDataset

WORKERS = ["dataloader.train.num_workers=2", "dataloader.test.num_workers=1"]


# Files are written when the training ends, and by nothing else.
RARELY = {"period": 1000, "max_to_keep": 5}


def test_a_run_that_was_stopped_by_a_signal_ends_with_the_bits_of_an_unbroken_one(tmp_path):
    def signal_group_in_step_5():
        original = TinyDetector.forward
        calls = iter(range(100))

        def forward(self, batch):
            if self.training and next(calls) == 5:
                os.killpg(0, signal.SIGINT)
            return original(self, batch)

        TinyDetector.forward = forward

    config = write_tiny_config(tmp_path, max_iter=30, eval_period=0, checkpointer=RARELY)
    unbroken = Job(tmp_path, config, f"train.output_dir={tmp_path}/unbroken")
    job = Job(tmp_path, config, *WORKERS, prepare=signal_group_in_step_5)
    assert job.wait() == 130, job.output
    assert iteration_of(tmp_path / "run" / "model_0000005.pth") == 5
    assert max(metrics_of(tmp_path / "run", "total_loss")) == 5
    assert not (tmp_path / "run" / "model_final.pth").exists()
    assert Job(tmp_path, config, "--resume", *WORKERS).wait() == 0
    assert unbroken.wait() == 0
    final, expected = (load(tmp_path / x / "model_final.pth") for x in ("run", "unbroken"))
    assert_same_bits(final["model"], expected["model"])


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(tmp_path):
    def sleep_in_evaluation():
        original = TinyDetector.detect

        def detect(self, *args):
            print("evaluating", flush=True)
            time.sleep(3600)
            return original(self, *args)

        TinyDetector.detect = detect

    config = write_tiny_config(tmp_path, max_iter=9, eval_period=3)
    job = Job(tmp_path, config, *WORKERS, prepare=sleep_in_evaluation)
    job.wait_for("evaluating")
    job.signal_group(signal.SIGTERM)
    assert job.wait() == 143
    assert iteration_of(tmp_path / "run" / "model_0000002.pth") == 2
    assert metrics_of(tmp_path / "run", "bbox/AP") == {}
    # Nor is it lost.
    assert Job(tmp_path, config, "--resume", "train.max_iter=6").wait() == 0
    assert list(metrics_of(tmp_path / "run", "bbox/AP")) == [2, 6]
    assert load(tmp_path / "run" / "model_best.pth")["best"]["iteration"] in (2, 6)


def test_a_signal_before_the_first_batch_does_not_wait_for_it(tmp_path):
    def sleep_in_loading():
        def sleep(self, key):
            print("loading", flush=True)
            time.sleep(3600)

        _SeededMapDataset.__getitem__ = sleep
        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds for workers to end

    config = write_tiny_config(tmp_path, eval_period=0)
    worker = "dataloader.train.num_workers=1"
    job = Job(tmp_path, config, worker, prepare=sleep_in_loading)
    job.wait_for("loading")
    job.signal_group(signal.SIGTERM)
    assert job.wait() == 143
    assert "and nothing is saved" in job.output


def test_signals_in_the_middle_of_a_file_wait_until_it_is_whole(tmp_path):
    def signal_twice_in_save():
        original = torch.save

        def save(data, file):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.2)
            os.kill(os.getpid(), signal.SIGTERM)
            original(data, file)

        torch.save = save

    config = write_tiny_config(tmp_path, max_iter=9, eval_period=0)
    job = Job(tmp_path, config, prepare=signal_twice_in_save)
    assert job.wait() == 143
    checkpoints = {name for name in files(tmp_path / "run") if name.endswith(".pth")}
    assert "model_0000001.pth" in checkpoints
    assert all(load(tmp_path / "run" / name) for name in checkpoints)
    assert not [name for name in files(tmp_path / "run") if name.endswith(".tmp")]

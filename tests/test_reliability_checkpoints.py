"""Checkpoints: written whole, found again, kept apart from other runs', and without code."""

import argparse
import os
import pickle
import resource
import signal

import pytest
import torch

from helpers import TinyDetector, write_tiny_config
from reliability_cases import files, iteration_of, train
from smca.checkpoint import SMCACheckpointer
from smca.engine import Trainer
from smca.errors import CheckpointError


def fail_at(iteration):
    def prepare():
        original = Trainer._forward_backward

        def fail(self, *args):
            if self.iter == iteration:
                raise RuntimeError("the first error")
            return original(self, *args)

        Trainer._forward_backward = fail

    return prepare


def test_a_full_disk_in_the_rescue_hides_no_error_and_leaves_no_partial_file(tmp_path):
    def prepare():
        # A limit of the system for every file, of 1 MB; the model's checkpoint has 3.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        fail_at(2)()

    config = write_tiny_config(
        tmp_path, eval_period=0, checkpointer={"period": 9, "max_to_keep": 5}
    )
    code, output = train(tmp_path, config, "model.width=8192", prepare=prepare)
    assert code == 1
    assert "RuntimeError: the first error" in output
    assert "The state could not be saved: The checkpoint file" in output
    assert not [x for x in files(tmp_path / "run") if "model_" in x or "last_checkpoint" in x]


def test_a_process_killed_while_it_writes_leaves_the_file_before(tmp_path):
    def die_in_second_save():
        saves, original = [], torch.save

        def save(data, file):
            saves.append(file)
            if len(saves) == 2:
                file.write(b"half a checkpoint")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            original(data, file)

        torch.save = save

    config = write_tiny_config(tmp_path, max_iter=6, eval_period=0)
    assert train(tmp_path, config, prepare=die_in_second_save)[0] == -signal.SIGKILL
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not (tmp_path / "run" / "model_0000003.pth").exists()
    for name in ("nonfinite_0000001.json", "config.yaml"):
        (tmp_path / "run" / f"{name}.ab_1cd2e.tmp").touch()
    assert train(tmp_path, config, "--resume")[0] == 0
    assert not [name for name in files(tmp_path / "run") if name.endswith(".tmp")]


def test_resume_takes_the_newest_file_that_can_be_read_and_says_so(tmp_path):
    config, run = write_tiny_config(tmp_path, max_iter=6, eval_period=3), tmp_path / "run"
    assert train(tmp_path, config)[0] == 0
    for name in ("model_0000005.pth", "model_best.pth", "model_final.pth"):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])
    (run / "last_checkpoint").write_text("model_0000009.pth")
    code, output = train(tmp_path, config, "--resume", "train.max_iter=8")
    assert code == 0, output
    assert "model_0000005.pth cannot be read" in output
    assert f"Resuming from {run}/model_0000003.pth in its place" in output
    assert "model_best.pth cannot be read" in output
    assert "Resuming at iteration 4" in output
    assert iteration_of(run / "model_final.pth") == 7


def test_as_many_files_are_kept_as_asked_for_whoever_wrote_them(tmp_path):
    config = write_tiny_config(tmp_path, max_iter=20, eval_period=0)
    keep = "train.checkpointer.max_to_keep=2"
    for iteration in (4, 7, 10):
        assert train(tmp_path, config, "--resume", keep, prepare=fail_at(iteration))[0] == 1
        kept = sorted(x for x in files(tmp_path / "run") if x.startswith("model_0"))
        assert len(kept) == 2
        assert kept[-1] == f"model_{iteration - 1:07d}.pth"


def test_a_checkpointer_loads_again_after_an_error(tmp_path):
    checkpointer = SMCACheckpointer(TinyDetector(), str(tmp_path))
    checkpointer.save("good")
    with pytest.raises(CheckpointError, match="wrong.pth"):
        checkpointer.load(str(tmp_path / "wrong.pth"))
    checkpointer.load(str(tmp_path / "good.pth"))


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
def test_a_file_that_would_run_code_is_refused(tmp_path, suffix):
    path, traces = tmp_path / f"model{suffix}", tmp_path / "trace"
    data = {"model": TinyDetector().state_dict(), "__author__": "x", "extra": Touch(traces)}
    if suffix == ".pkl":
        data["model"] = {key: value.numpy() for key, value in data["model"].items()}
        path.write_bytes(pickle.dumps(data))
    else:
        torch.save({**data, "model_state": data["model"]}, path)
    config = write_tiny_config(tmp_path, init_checkpoint=str(path))
    code, output = train(tmp_path, config)
    assert code == 1
    words = "cannot be read" if suffix == ".pyth" else "would run code when it is opened ("
    assert f"Error: The checkpoint {path} {words}" in output
    assert not traces.exists()


def test_a_training_is_resumed_from_more_than_weights(tmp_path):
    state = {"model": TinyDetector().state_dict()}
    torch.save({**state, "trainer": {"iteration": 1}}, tmp_path / "model_0000001.pth")
    torch.save(state, tmp_path / "model_0000003.pth")
    checkpointer = SMCACheckpointer(TinyDetector(), str(tmp_path))
    assert checkpointer.find_resumable()[0].endswith("model_0000001.pth")
    assert checkpointer.find_resumable(need_trainer=False)[0].endswith("model_0000003.pth")


def test_a_pickle_of_the_model_zoo_is_opened_as_detectron2_does(tmp_path, monkeypatch):
    state = {key: value.numpy() for key, value in TinyDetector().backbone.state_dict().items()}
    data = {"model": state, "__author__": "x", "matching_heuristics": True}
    data["extra"] = argparse.Namespace()
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(data))
    with pytest.raises(CheckpointError, match="argparse.Namespace"):
        SMCACheckpointer(TinyDetector()).load(str(path))
    checkpointer = SMCACheckpointer(TinyDetector())
    monkeypatch.setattr(
        checkpointer.path_manager, "get_local_path", lambda name, *args, **kwargs: str(path)
    )
    checkpointer.load("detectron2://ImageNetPretrained/torchvision/R-50.pkl")
    weight = checkpointer.model.backbone["stem"].weight.detach()
    assert (weight.numpy() == state["stem.weight"]).all()

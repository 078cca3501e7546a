"""What commands and settings do where there are GPUs, with a PyTorch that only says there are."""

import os

import pytest
import torch
import torch.distributed as dist

from helpers import ROOT, error_of, write_tiny_config
from smca.cli import train as train_command
from smca.config import amp_dtype
from smca.engine import launch, runs
from smca.errors import ConfigError


class Reached(Exception):
    """What a test wants to know of was called."""


@pytest.fixture
def gpus(monkeypatch):
    """Tells of two GPUs; a list of those that a process chose."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    return chosen


def reached(*args, **kwargs):
    raise Reached(kwargs)


def test_a_training_on_the_second_gpu_makes_it_the_current_one(gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "log_to", reached)
    with pytest.raises(Reached):
        train_command.main(["--config-file", write_tiny_config(tmp_path), "train.device=cuda:1"])
    assert gpus == ["cuda:1"]


def test_several_processes_on_one_gpu_are_refused(gpus, tmp_path, capsys):
    command = ["--config-file", write_tiny_config(tmp_path), "--num-gpus", 2, "train.device=cuda:1"]
    line = error_of(capsys, train_command.main, *command)
    assert "train.device=cuda:1 is one GPU" in line and "CUDA_VISIBLE_DEVICES" in line


@pytest.mark.parametrize(
    "rank, count, visible, gpu",
    [(1, 2, None, "cuda:1"), (1, 1, "0", "cuda:0"), (1, 1, None, None), (2, 2, "0,1", None)],
    ids=["of_its_number", "the_only_one_it_sees", "one_for_two", "two_for_three"],
)
def test_a_process_has_a_gpu_of_its_own(gpus, monkeypatch, rank, count, visible, gpu):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(os, "environ", {"LOCAL_RANK": str(rank)})
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), rank, 3)]))
    monkeypatch.setattr(dist, "init_process_group", reached)
    with pytest.raises(ConfigError if gpu is None else Reached) as found:
        launch._work(None)
    if gpu is None:
        assert "more processes on this machine than GPUs" in str(found.value)
    else:
        assert found.value.args[0]["device_id"] == torch.device(gpu) and gpus == [gpu]


@pytest.mark.parametrize("capability, is_warned", [((7, 5), True), ((8, 0), False)])
def test_a_gpu_without_bfloat16_is_warned_of(monkeypatch, caplog, capability, is_warned):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert amp_dtype("bf16", torch.device("cuda")) == torch.bfloat16
    assert ("Tesla T4 has no bfloat16" in caplog.text) == is_warned
    caplog.clear()
    assert amp_dtype("fp16", torch.device("cuda")) == torch.float16 and not caplog.text


def test_the_slurm_script_asks_for_cores_and_lets_processes_have_them():
    text = (ROOT / "tools" / "slurm_train.sh").read_text()
    assert "#SBATCH --cpus-per-gpu=" in text and "--cpu-bind=none" in text


def test_attention_is_not_left_to_cudnn():
    assert not torch.backends.cuda.cudnn_sdp_enabled()

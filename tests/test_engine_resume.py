import os

import pytest
import torch

from helpers import arguments, assert_same_bits, metrics_of, write_tiny_config
from smca.engine import Trainer, main
from smca.errors import CheckpointError, ConfigError


def train(config, folder, *overrides, resume=False):
    flags = ["--config-file", config] + ["--resume"] * resume
    main(arguments(*flags, f"train.output_dir={folder}", *overrides))
    return torch.load(os.path.join(folder, "model_final.pth"), weights_only=True)


def interrupt_at(monkeypatch, iteration, error):
    """Let the training fail once, after the forward pass of an iteration."""
    original = Trainer._forward_backward

    def fail(self, data, micro_batch):
        losses = original(self, data, micro_batch)
        if self.iter == iteration and error:
            raise error.pop()
        return losses

    monkeypatch.setattr(Trainer, "_forward_backward", fail)


def test_a_stopped_and_resumed_run_ends_with_the_bits_of_an_unbroken_one(tmp_path, monkeypatch):
    # No evaluation on the way; the interruption does not fall on a checkpoint's period.
    overrides = ["train.checkpointer.period=5", "train.amp.enabled=True", "train.amp.dtype=fp16"]
    overrides += ["train.accumulate=2", "dataloader.train.num_workers=2"]
    config = write_tiny_config(tmp_path, max_iter=6, eval_period=0)
    unbroken = train(config, tmp_path / "unbroken", *overrides)

    interrupt_at(monkeypatch, 3, [KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "resumed", *overrides)
    assert (tmp_path / "resumed" / "last_checkpoint").read_text() == "model_0000002.pth"
    torch.manual_seed(99)  # whatever a new process begins with
    resumed = train(config, tmp_path / "resumed", *overrides, resume=True)

    assert unbroken["trainer"]["iteration"] == 5
    assert_same_bits(resumed, unbroken)


def test_a_random_seed_is_kept_by_the_resumed_run(tmp_path, monkeypatch):
    config = write_tiny_config(tmp_path, seed=-1, eval_period=0)
    interrupt_at(monkeypatch, 2, [OSError("an image is gone")])
    with pytest.raises(OSError):
        train(config, tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "model_0000001.pth", weights_only=True)
    seed = checkpoint["trainer"]["seed"]
    assert seed >= 0
    resumed = train(config, tmp_path / "run", resume=True)
    assert resumed["trainer"]["seed"] == seed
    assert_same_bits(resumed["model"], train(config, tmp_path / "b", f"train.seed={seed}")["model"])


def test_another_rate_on_resume_is_the_rate_of_what_follows(tmp_path):
    """It is what to do after a loss that is not finite, and config.yaml says it."""
    config = write_tiny_config(tmp_path, eval_period=0, max_iter=2)
    schedule = "lr_multiplier.milestones=[8,9]"
    overrides = ["optimizer.lr=0.004", "optimizer.weight_decay=0.5", schedule]
    train(config, tmp_path / "run")
    before = (tmp_path / "run" / "log.txt").read_text()
    resumed = train(config, tmp_path / "run", *overrides, "train.max_iter=3", resume=True)
    group = resumed["trainer"]["optimizer"]["param_groups"][0]
    assert group["initial_lr"] == 0.004 and group["weight_decay"] == 0.5
    assert metrics_of(tmp_path / "run", "lr")[2] == 0.004
    log = (tmp_path / "run" / "log.txt").read_text()[len(before) :]
    assert log.count("lr was 0.01 when the checkpoint was written and is 0.004 now") == 1
    assert log.count("weight_decay was 0.01") == 1 and log.count("not exactly") == 2


def test_other_groups_of_parameters_on_resume_are_named(tmp_path):
    config = write_tiny_config(tmp_path, eval_period=0, max_iter=2)
    factor = "+optimizer.params.lr_factor_func._target_=smca.solver.backbone_lr_factor"
    train(config, tmp_path / "run", factor, "+optimizer.params.lr_factor_func.factor=0.1")
    with pytest.raises(
        CheckpointError, match=r"groups of parameters \(optimizer.params\) are not"
    ) as error:
        train(config, tmp_path / "run", "train.max_iter=3", resume=True)
    assert "cut short" not in str(error.value)


def test_an_average_may_begin_with_the_resumed_run(tmp_path):
    config = write_tiny_config(tmp_path, eval_period=0, max_iter=2)
    first = train(config, tmp_path / "run", "train.model_ema.enabled=False")
    assert "model_ema" not in first
    decay, weight = 0.9, "class_embed.weight"
    resumed = train(config, tmp_path / "run", "train.max_iter=3", resume=True)
    expected = decay * first["model"][weight] + (1 - decay) * resumed["model"][weight]
    torch.testing.assert_close(resumed["model_ema"][weight], expected)
    with pytest.raises(ConfigError, match="averages its weights: go on with train.model_ema.ena"):
        train(config, tmp_path / "run", "train.model_ema.enabled=False", resume=True)

import copy

import pytest
import torch
from detectron2.utils import comm

from helpers import MeanLoss
from smca.checkpoint import SMCACheckpointer
from smca.engine.hooks import EmergencyCheckpointer, ModelEMA
from smca.engine.trainer import Trainer
from smca.errors import NonFiniteError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MeanLoss()


def batches(num=8, size=4):
    return list(torch.randn(num, size, 3, generator=torch.Generator().manual_seed(1)))


def train(model, data, num_iters, **kwargs):
    trainer = Trainer(model, data, torch.optim.SGD(model.parameters(), lr=0.1), **kwargs)
    trainer.train(0, num_iters)
    return trainer


def gradients(model, batch, scale=1.0):
    model = copy.deepcopy(model)
    (scale * model(batch)["loss"]).backward()
    return [p.grad for p in model.parameters()]


def test_clipping_in_float16_measures_the_unscaled_gradient(model):
    norm = torch.cat([g.flatten() for g in gradients(model, batches(1)[0])]).norm().item()
    trainer = train(model, batches(1), 1, clip_grad_norm=0.1, amp_dtype=torch.float16)
    assert trainer.storage.latest()["grad_norm"][0] == pytest.approx(norm, rel=1e-2)
    assert trainer.storage.latest()["grad_scale"][0] > 1


def test_an_overflow_in_float16_skips_the_step_and_lowers_the_scale(model):
    before = copy.deepcopy(model)
    trainer = Trainer(
        model,
        batches(1),
        torch.optim.SGD(model.parameters(), lr=0.1),
        amp_dtype=torch.float16,
    )
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    trainer.train(0, 1)
    assert trainer.grad_scaler.get_scale() == 2.0**39
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(model, value):
    data = batches(1)
    data[0][0, 0] = value
    before = copy.deepcopy(model)
    with pytest.raises(NonFiniteError, match="loss became nan or infinite.*iteration 0"):
        train(model, data, 1)
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


def test_buffers_are_averaged_like_weights(model):
    model.register_buffer("statistic", torch.zeros(1))
    ema = ModelEMA(model, decay=0.75)
    for value in (1.0, 5.0):
        model.statistic.fill_(value)
        ema.after_step()
    assert ema.model.statistic.item() == 0.75 * 1.0 + 0.25 * 5.0


def test_processes_draw_different_numbers(model, monkeypatch):
    drawn = []
    for rank in (0, 1, 0):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        train(model, batches(1), 1)
        drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[2] != drawn[1]


def test_an_update_that_breaks_off_is_not_saved(model, tmp_path):
    class Breaking(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            if trainer.iter == 1:
                raise OSError("half of the weights are new")

    checkpointer = SMCACheckpointer(model, str(tmp_path))
    trainer = Trainer(model, batches(3), Breaking(model.parameters(), lr=0.1))
    trainer.register_hooks([EmergencyCheckpointer(checkpointer)])
    with pytest.raises(OSError):
        trainer.train(0, 3)
    assert not checkpointer.has_checkpoint()


def test_the_metrics_of_long_ago_are_not_kept(model):
    assert train(model, batches(1), 1).storage.history("total_loss")._max_length == 1000

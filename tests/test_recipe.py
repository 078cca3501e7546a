"""The training recipe's steps against plain PyTorch: rates of the parts, clipping, AdamW."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import HookBase, hooks
from detectron2.structures import Boxes, Instances

from smca import model_zoo
from smca.engine import Trainer
from smca.solver import step_schedule

LR, BACKBONE_LR, WEIGHT_DECAY, MAX_NORM = 1e-4, 1e-5, 1e-4, 0.1
SMALL = [
    "model.backbone.depth=18",
    "model.backbone.num_blocks=[1,1,1,1]",
    "model.backbone.width=16",
    "model.embed_dim=16",
    "model.num_queries=5",
    "model.num_classes=3",
    "model.dropout=0.0",
    "model.encoder.ffn_dim=24",
    "model.decoder.ffn_dim=24",
]


def split_parameters(model):
    """The official recipe's two groups: everything else, and the backbone."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    backbone = [p for name, p in trained if name.startswith("backbone.")]
    return [p for name, p in trained if not name.startswith("backbone.")], backbone


def make_batches(count):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        batch = []
        for height, width in ((64, 96), (48, 80)):
            image = torch.randint(0, 256, (3, height, width), generator=generator)
            corner, size = torch.rand(2, 3, 2, generator=generator) * 0.4 + 0.05
            instances = Instances((height, width))
            boxes = torch.cat([corner, corner + size], 1)
            instances.gt_boxes = Boxes(boxes * torch.tensor([width, height] * 2))
            instances.gt_classes = torch.randint(0, 3, (3,), generator=generator)
            batch.append({"image": image.to(torch.uint8), "instances": instances})
        batches.append(batch)
    return batches


def plain_adamw_step(model, moments, step, rates):
    """Clipping and one AdamW step, written out. `moments` is changed in place."""
    groups = split_parameters(model)
    parameters = [p for group in groups for p in group]
    norm = sum((p.grad.double() ** 2).sum() for p in parameters).sqrt().item()
    clip = min(1.0, MAX_NORM / (norm + 1e-6))
    with torch.no_grad():
        for group, rate in zip(groups, rates):
            for p in group:
                first, second = moments.setdefault(p, [torch.zeros_like(p), torch.zeros_like(p)])
                gradient = p.grad * clip
                first.copy_(0.9 * first + 0.1 * gradient)
                second.copy_(0.999 * second + 0.001 * gradient**2)
                p -= rate * WEIGHT_DECAY * p
                unbiased = second / (1 - 0.999**step)
                p -= rate * first / (1 - 0.9**step) / (unbiased.sqrt() + 1e-8)
    return norm


class Recorder(HookBase):
    """What each step was taken with."""

    def __init__(self):
        self.rates, self.norms = [], []

    def after_step(self):
        groups = self.trainer.optimizer.param_groups
        self.rates.append(sorted((group["lr"] for group in groups), reverse=True))
        self.norms.append(self.trainer.storage.latest()["grad_norm"][0])


@pytest.fixture(scope="module")
def trained():
    """Ten steps of ours and ten of the formula, from the same weights, on the same batches."""
    # Five epochs of two batches; the rate drops after the third.
    max_iter, schedule = step_schedule(epochs=5, drop_epoch=3, batch_size=2, num_images=5)
    assert max_iter == 10
    config = LazyConfig.apply_overrides(model_zoo.get_config("smca_r50_50ep"), SMALL)
    torch.manual_seed(0)
    ours, plain = instantiate(config.model).train(), instantiate(config.model).train()
    plain.load_state_dict(ours.state_dict())
    start = {name: value.clone() for name, value in ours.state_dict().items()}
    batches = make_batches(max_iter)

    config.optimizer.params.model = ours
    optimizer, recorder = instantiate(config.optimizer), Recorder()
    trainer = Trainer(ours, batches, optimizer, clip_grad_norm=config.train.clip_grad_norm)
    # Recorded before the schedule moves on to the next iteration.
    trainer.register_hooks([recorder, hooks.LRScheduler(scheduler=instantiate(schedule))])
    trainer.train(0, max_iter)

    moments, norms, rates = {}, [], []
    for step, batch in enumerate(batches, start=1):
        drop = 0.1 if (step - 1) // 2 >= 3 else 1.0
        rates.append([LR * drop, BACKBONE_LR * drop])
        plain.zero_grad()
        sum(plain(batch).values()).backward()
        norms.append(plain_adamw_step(plain, moments, step, rates[-1]))
    return start, ours, recorder, plain, rates, norms


def test_steps_are_taken_with_the_recipes_rates(trained):
    _, _, recorder, _, rates, _ = trained
    for got, expected in zip(recorder.rates, rates, strict=True):
        assert got == pytest.approx(expected)


def test_gradient_norms_are_those_of_plain_pytorch_and_above_the_bound(trained):
    _, _, recorder, _, _, norms = trained
    assert recorder.norms == pytest.approx(norms, rel=1e-4)
    assert min(norms) > MAX_NORM


def test_ten_steps_are_those_of_plain_pytorch(trained):
    start, ours, _, plain, _, _ = trained
    plain_weights = dict(plain.named_parameters())
    for name, value in ours.named_parameters():
        update, expected = value - start[name], plain_weights[name] - start[name]
        # Next to nothing but rounding of the weights.
        bound = 1e-3 * expected.abs().max() + 2e-8
        assert (update - expected).abs().max() <= bound, name
        assert value.requires_grad == bool(expected.any()), name

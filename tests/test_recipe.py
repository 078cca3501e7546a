"""The training recipe against plain PyTorch: groups, learning rates, clipped AdamW steps."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import HookBase, hooks
from detectron2.structures import Boxes, Instances

from smca import model_zoo
from smca.engine import Trainer
from smca.solver import step_schedule

LR, BACKBONE_LR, WEIGHT_DECAY, MAX_NORM = 1e-4, 1e-5, 1e-4, 0.1
COCO_IMAGES = 118287
# Epochs, epochs until the rate is divided by 10, images a batch.
SCHEDULES = {
    "smca_single_scale_r50_50ep": (50, 40, 16),
    "smca_single_scale_r50_108ep": (108, 80, 16),
    "smca_single_scale_r50_250ep": (250, 200, 16),
    "detr_r50_50ep": (50, 40, 16),
    "smca_r50_50ep": (50, 40, 8),
    "smca_r50_108ep": (108, 80, 8),
    "smca_r101_50ep": (50, 40, 8),
    "smca_conv_r50_50ep": (50, 40, 8),
    "smca_conv_r101_50ep": (50, 40, 8),
    "ablations/multi_head": (50, 40, 16),
    "ablations/multi_scale_IIMII": (50, 40, 8),
}
SMALL = [
    "model.backbone.depth=18",
    "model.backbone.num_blocks=[1,1,1,1]",
    "model.embed_dim=16",
    "model.num_queries=5",
    "model.num_classes=3",
    "model.dropout=0.0",
    "model.encoder.ffn_dim=24",
    "model.decoder.ffn_dim=24",
]


def build_optimizer(config, model):
    config.optimizer.params.model = model
    return instantiate(config.optimizer)


def split_parameters(model):
    """The official recipe's two groups: everything else, and the backbone."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    backbone = [p for name, p in trained if name.startswith("backbone.")]
    return [p for name, p in trained if not name.startswith("backbone.")], backbone


# ------------------------------------------------------------------------------------------ groups


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_groups_with_the_recipes_rates(name):
    config = model_zoo.get_config(name)
    with torch.device("meta"):
        model = instantiate(config.model)
    optimizer = build_optimizer(config, model)
    assert type(optimizer) is torch.optim.AdamW
    groups = sorted(optimizer.param_groups, key=lambda group: -group["lr"])
    assert [group["lr"] for group in groups] == pytest.approx([LR, BACKBONE_LR])
    for group, expected in zip(groups, split_parameters(model)):
        assert {id(p) for p in group["params"]} == {id(p) for p in expected}
        assert len(group["params"]) == len(expected) > 0
        assert group["weight_decay"] == WEIGHT_DECAY
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
        assert not group["amsgrad"]


@pytest.mark.parametrize("name", ["smca_r50_50ep", "smca_conv_r101_50ep"])
def test_stem_and_first_stage_are_not_trained(name):
    with torch.device("meta"):
        model = instantiate(model_zoo.get_config(name).model)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    buffers = {n for n, _ in model.named_buffers()}
    names = frozen | buffers
    assert all(n.startswith("backbone.") for n in frozen)
    assert any(n.startswith("backbone.stem.") for n in names)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.startswith(("backbone.stem.", "backbone.res2.")) for n in trained)
    for stage in ("res3", "res4", "res5"):
        assert any(n.startswith(f"backbone.{stage}.") for n in trained)


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_are_clipped_at_the_recipes_norm(name):
    config = model_zoo.get_config(name)
    assert (config.train.clip_grad_norm, config.train.accumulate) == (MAX_NORM, 1)


# ------------------------------------------------------------------------------------ learning rate


def official_rates(epochs, drop_epoch):
    """The rate of each epoch, from PyTorch's own scheduler, stepped after each."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, drop_epoch)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_of_every_epoch(name):
    epochs, drop_epoch, batch_size = SCHEDULES[name]
    config = model_zoo.get_config(name)
    length = COCO_IMAGES // batch_size
    assert config.dataloader.train.total_batch_size == batch_size
    assert config.train.max_iter == epochs * length
    multiplier = instantiate(config.lr_multiplier)

    def rate(iteration):
        return config.optimizer.lr * multiplier(iteration / config.train.max_iter)

    expected = official_rates(epochs, drop_epoch)
    for epoch in range(epochs):
        for iteration in (0, 1, length // 2, length - 2, length - 1):
            assert rate(epoch * length + iteration) == pytest.approx(expected[epoch])


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_drops_with_the_first_iteration_of_its_epoch(name):
    epochs, drop_epoch, batch_size = SCHEDULES[name]
    config = model_zoo.get_config(name)
    multiplier = instantiate(config.lr_multiplier)
    drop = drop_epoch * (COCO_IMAGES // batch_size)
    # Exactly there: all of the thousand iterations around.
    for iteration in range(drop - 500, drop + 500):
        expected = 1.0 if iteration < drop else 0.1
        assert multiplier(iteration / config.train.max_iter) == expected


# ------------------------------------------------------------------------------------------- steps


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

    optimizer, recorder = build_optimizer(config, ours), Recorder()
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

"""Following a run: pictures at evaluations, hooks and writers."""

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage, EventWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import (
    arguments,
    error_of,
    make_smca,
    write_smca_config,
    write_tiny_config,
)
from smca.config import load_config
from smca.engine import main, run
from smca.engine.pictures import EvaluationPictures


def test_tensorboard_gets_detections_at_each_evaluation(tmp_path):
    config = write_tiny_config(tmp_path, num_pictures=2, max_iter=4, eval_period=2)
    main(arguments("--config-file", config, "train.model_ema.enabled=False"))
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["pictures/detections"]  # this detector has no maps
    pictures = events.Images("pictures/detections")
    assert [picture.step for picture in pictures] == [1, 4]
    assert pictures[0].width > 400


@pytest.mark.usefixtures("few_shapes")
def test_a_model_with_modulation_has_weight_maps_too(tmp_path):
    config = write_smca_config(tmp_path)
    cfg, model = load_config(config, ["train.num_pictures=1"]), make_smca(config).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with EventStorage() as storage:
        EvaluationPictures(cfg).put(model, storage)
        names = [name for name, _, _ in storage._vis_data]
        image = storage._vis_data[1][1]
    assert names == ["pictures/detections", "pictures/weight_maps"]
    assert image.shape[0] == 3 and image.dtype == "uint8" and image.std() > 10
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.usefixtures("few_shapes")
def test_a_picture_that_fails_ends_no_training(tmp_path, caplog):
    cfg = load_config(write_smca_config(tmp_path), ["train.num_pictures=1"])
    pictures = EvaluationPictures(cfg)
    with EventStorage() as storage:
        for _ in range(2):
            pictures.put(torch.nn.Linear(1, 1), storage)
    assert caplog.text.count("There will be no pictures of this training") == 1


@pytest.mark.parametrize("value", ["[wandb]", "wandb"])
def test_a_writer_that_is_no_call_is_named(tmp_path, capsys, value):
    config = write_tiny_config(tmp_path)

    def train_net(words):
        return run(arguments(*words))

    text = error_of(capsys, train_net, "--config-file", config, f"train.writers={value}")
    assert "train.writers has to be a list of calls" in text


class CountingHook(HookBase):
    def after_train(self):
        print(f"It took {self.trainer.iter} iterations")


class CountingWriter(EventWriter):
    def write(self):
        print("It is written")


def test_hooks_and_writers_of_ones_own_are_lines_of_a_config(tmp_path, capsys):
    hook, writer = (f"{{_target_: {__name__}.Counting{kind}}}" for kind in ("Hook", "Writer"))
    words = ["--config-file", write_tiny_config(tmp_path, max_iter=2, eval_period=0)]
    main(arguments(*words, f"train.hooks=[{hook}]", f"train.writers=[{writer}]"))
    output = capsys.readouterr().out
    assert "It took 2 iterations" in output and "It is written" in output

"""Numbers and names that go wrong, other settings at a resume, errors in the data."""

import os
import textwrap

from helpers import TinyDetector, write_tiny_config
from reliability_cases import iteration_of, load, train
from smca.data.loader import _SeededMapDataset
from smca.engine import Trainer
from smca.errors import DatasetError


def test_gradients_that_never_become_finite_in_float16_end_the_training(tmp_path):
    def prepare():
        original = TinyDetector.losses

        def losses(self, *args):
            # The loss is finite, and its gradient is not.
            losses = original(self, *args)
            zero = (self.class_embed.weight * 0).sum()
            return {**losses, "loss_sqrt": zero.sqrt()}

        TinyDetector.losses = losses

    config = write_tiny_config(tmp_path, max_iter=200, eval_period=0)
    fp16 = ["train.amp.enabled=True", "train.amp.dtype=fp16"]
    code, output = train(tmp_path, config, *fp16, prepare=prepare)
    assert code == 1
    assert "Error: The norm of the gradient became nan at iteration 30" in output


def test_a_gradient_that_is_not_finite_is_reported_with_its_images(tmp_path):
    def prepare():
        original = TinyDetector.__init__

        def init(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.calls = 0
            self.bbox_embed.weight.register_hook(self.spoil)

        def spoil(self, gradient):
            self.calls += 1
            return gradient * float("inf") if self.calls == 4 else gradient

        TinyDetector.__init__, TinyDetector.spoil = init, spoil

    config = write_tiny_config(tmp_path, eval_period=0, max_iter=6)
    code, output = train(tmp_path, config, prepare=prepare)
    assert code == 1
    assert "at iteration 3: lower the learning rate" in output
    assert f"--resume continues from {tmp_path}/run/model_0000001.pth" in output
    images = output.splitlines()[-1].partition("the boxes of: ")[2].split(", ")
    assert len(images) == 4 and all(os.path.isfile(image) for image in images)


def test_a_misspelled_metric_is_said_at_the_first_evaluation(tmp_path):
    config = write_tiny_config(tmp_path, max_iter=4, eval_period=2)
    _, output = train(tmp_path, config, "train.best_metric=bbox/APP")
    assert output.count("train.best_metric=bbox/APP is none of the evaluation's") == 1
    assert "There are: bbox/AP, bbox/AP-round" in output
    assert output.index("best_metric") < output.index(" iter: 2 ")


def recorded(path):
    """`prepare` that notes the images of each step."""

    def prepare():
        original = Trainer._forward_backward

        def record(self, data, micro_batch):
            with open(path, "a") as file:
                file.writelines(f"{os.path.basename(x['file_name'])}\n" for x in data)
            return original(self, data, micro_batch)

        Trainer._forward_backward = record

    return prepare


def test_another_batch_size_goes_on_where_the_data_were_left(tmp_path):
    overrides = ["dataloader.train.total_batch_size=2", "train.accumulate=3"]
    config = write_tiny_config(tmp_path, max_iter=3, eval_period=0)
    prepare = recorded(tmp_path / "seen")
    assert train(tmp_path, config, prepare=prepare)[0] == 0
    overrides.append("train.max_iter=5")
    assert train(tmp_path, config, "--resume", *overrides, prepare=prepare)[0] == 0
    seen = (tmp_path / "seen").read_text().split()
    for start in range(0, len(seen) - 7, 8):  # each pass has each of the 8 images
        assert len(set(seen[start : start + 8])) == 8
    assert len(seen) == load(tmp_path / "run" / "model_final.pth")["trainer"]["sample"]


def test_detectron2_s_own_loader_trains_with_a_warning_that_its_data_start_over(tmp_path):
    config = write_tiny_config(tmp_path, max_iter=2, eval_period=0)
    with open(config, "a") as file:
        file.write(
            textwrap.dedent(
                """
                from detectron2.data import build_detection_train_loader

                dataloader["train"] = L(build_detection_train_loader)(
                    dataset=L(get_detection_dataset_dicts)(names=name, filter_empty=False),
                    mapper=dataloader["train"].mapper,
                    total_batch_size=4,
                    num_workers=1,
                )
                """
            )
        )
    assert train(tmp_path, config)[0] == 0
    code, output = train(tmp_path, config, "--resume", "train.max_iter=4")
    assert code == 0, output
    assert "The data start over" in output
    assert iteration_of(tmp_path / "run" / "model_final.pth") == 3


def test_an_error_in_the_data_is_printed_whole_and_the_run_can_go_on(tmp_path):
    def prepare():
        original = _SeededMapDataset.__getitem__

        def fail(self, key):
            try:
                if key[0] >= 8:
                    raise DatasetError("the first reason")
            except DatasetError as error:
                raise DatasetError("2 problems in a.json:\n  image 1\n  image 2") from error
            return original(self, key)

        _SeededMapDataset.__getitem__ = fail

    config = write_tiny_config(tmp_path, eval_period=0, log_period=20)
    # With worker processes, the loader is ahead of the training.
    workers = "dataloader.train.num_workers=1"
    code, output = train(tmp_path, config, workers, prepare=prepare)
    assert code == 1
    assert output.endswith("Error: 2 problems in a.json:\n  image 1\n  image 2\n")
    assert "Traceback" not in output
    assert iteration_of(tmp_path / "run" / "model_0000001.pth") == 1

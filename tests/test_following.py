"""Following a run: pictures at evaluations, and the services that a setting turns on."""

import json
import sys

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage, EventWriter
from omegaconf import OmegaConf
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
from smca.engine.writers import _TrackingWriter, build_writers
from smca.errors import ConfigError


def metrics_of(folder):
    """{iteration: values} as metrics.json has them."""
    metrics = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        row = json.loads(line)
        metrics.setdefault(row["iteration"], {}).update(row)
    return metrics


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


def test_mlflow_has_the_values_of_the_metrics_file(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = write_tiny_config(tmp_path, num_pictures=1)
    command = ["--config-file", config, "train.writers=[mlflow]"]
    main(arguments(*command, "train.max_iter=2"))
    main(arguments("--resume", *command))
    run_id = json.loads((tmp_path / "run" / "tracking.json").read_text())["mlflow"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    (only,) = client.search_runs([client.get_experiment_by_name("smca").experiment_id])
    assert only.info.run_id == run_id and only.info.status == "FINISHED"
    rows = metrics_of(tmp_path / "run")
    for name in ("total_loss", "bbox/AP"):
        expected = {i: row[name] for i, row in rows.items() if name in row}
        sent = {m.step: m.value for m in client.get_metric_history(run_id, name)}
        assert sent == pytest.approx(expected) and len(sent) > 1
    names = [x.path for path in (None, "pictures") for x in client.list_artifacts(run_id, path)]
    assert "config.yaml" in names and "pictures/detections_0000002.png" in names


def test_wandb_has_the_values_in_a_file_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = write_tiny_config(tmp_path, num_pictures=1)
    main(arguments("--config-file", config, "train.writers=[wandb]", "train.max_iter=2"))
    run_id = json.loads((tmp_path / "run" / "tracking.json").read_text())["wandb"]
    (file,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    content = file.read_bytes()
    value = metrics_of(tmp_path / "run")[1]["total_loss"]
    assert b"total_loss" in content and b"bbox/AP" in content and repr(value).encode() in content
    (image,) = file.parent.glob("files/media/images/pictures/*.png")
    assert image.stat().st_size > 1000


class RecordingWriter(_TrackingWriter):
    """A service (any module) that keeps what it is sent."""

    name = "json"

    def _start(self, folder, run_id):
        self.sent = []
        return "1"

    def _send(self, iteration, values, pictures):
        self.sent.append((iteration, [*values, *pictures]))


def test_pictures_are_sent_with_their_step_before_later_ones(tmp_path):
    """Weights & Biases drops what belongs to a step before the last one that it was sent."""
    writer = RecordingWriter(str(tmp_path))
    with EventStorage() as storage:
        for step in range(8):
            storage.put_scalar("loss", 1.0)
            if step == 2:
                storage.put_scalar("AP", 1.0)
            if step % 3 == 2:
                storage.put_image("picture", torch.zeros(3, 4, 4))
            if step % 4 == 3:
                writer.write()
                storage.clear_images()
            storage.step()
    expected = [(2, ["AP", "picture"]), (3, ["loss"]), (5, ["picture"]), (7, ["loss"])]
    assert writer.sent == expected


class FailingWriter(_TrackingWriter):
    """A service (any module) that starts, and is gone when there are values to send."""

    name = "json"

    def _start(self, folder, run_id):
        return "1"

    def _send(self, iteration, values, pictures):
        raise ConnectionError("the network is gone")


def test_a_service_that_fails_ends_no_training(tmp_path, caplog):
    writer = FailingWriter(str(tmp_path))
    with EventStorage() as storage:
        for _ in range(3):
            storage.put_scalar("total_loss", 1.0)
            writer.write()
            storage.step()
        writer.close()
    assert caplog.text.count("Nothing more is sent to json: the network is gone") == 1


def test_a_service_that_cannot_start_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(FailingWriter, "_start", lambda *args: [][0])
    with pytest.raises(ConfigError, match="has json, which cannot start a run: list index out of"):
        FailingWriter(str(tmp_path))


@pytest.mark.parametrize("value", ["[wandbb]", "wandb", "[1]"])
def test_a_writer_that_does_not_exist_is_named(tmp_path, capsys, value):
    config = write_tiny_config(tmp_path)

    def train_net(words):
        return run(arguments(*words))

    text = error_of(capsys, train_net, "--config-file", config, f"train.writers={value}")
    assert "train.writers has to be a list of wandb and mlflow, or of calls" in text


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


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_writer_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"train.writers has {name}, which is not installed: pip"):
        build_writers(OmegaConf.create({"writers": [name], "output_dir": str(tmp_path)}))

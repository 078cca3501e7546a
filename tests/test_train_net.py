import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter
from torch import nn

from helpers import (
    ROOT,
    TinyDetector,
    arguments,
    close_logs,
    error_of,
    state_of,
    write_dataset,
    write_tiny_config,
)
from smca.checkpoint import SMCACheckpointer, files
from smca.checkpoint.files import load_tensors
from smca.cli import train
from smca.config import load_config
from smca.engine import Trainer, main
from smca.errors import CheckpointError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A config, the folder of a finished run and its results. Tests only read them."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_tiny_config(folder)
    results = main(arguments("--config-file", config))
    close_logs()
    before = state_of(folder)
    yield config, folder / "run", results
    assert state_of(folder) == before


@pytest.fixture
def copied(trained, tmp_path):
    """The same with a folder to write into, which the config has for its output."""
    config, folder, results = trained
    shutil.copytree(folder, tmp_path / "run")
    text = Path(config).read_text().replace(str(folder), str(tmp_path / "run"))
    (tmp_path / "config.py").write_text(text)
    return str(tmp_path / "config.py"), tmp_path / "run", results


# What a run leaves behind


def test_checkpoint_fits_the_saved_config_and_tells_where_it_comes_from(trained):
    _, folder, _ = trained
    checkpoint = torch.load(folder / "model_final.pth", weights_only=True)
    cfg = LazyConfig.load(str(folder / "config.yaml"))
    instantiate(cfg.model).load_state_dict(checkpoint["model"])
    assert checkpoint["smca"]["config"] == "config.py"
    assert checkpoint["smca"]["class_names"] == ["round", "square"]
    assert checkpoint["smca"]["version"]
    assert set(checkpoint["model"]) == set(checkpoint["model_ema"])
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


# Command lines


@pytest.mark.parametrize("words", [[], ["--resume"]])
def test_evaluation_alone_repeats_the_results_of_the_training(copied, words):
    config, folder, results = copied
    if not words:
        words = [f"train.init_checkpoint={folder}/model_final.pth"]
    before = state_of(folder)
    again = main(arguments("--config-file", config, "--eval-only", *words))
    assert again.keys() == results.keys()
    for task in results:
        assert again[task] == pytest.approx(results[task], nan_ok=True)
    log, after = str(folder / "log_eval.txt"), state_of(folder)
    assert after == {**before, log: after[log]} and "bbox" in Path(log).read_text()


def test_resume_of_a_finished_run_trains_no_further(copied, monkeypatch):
    config, folder, results = copied
    before, read = load_tensors(str(folder / "model_final.pth"))["model"], []
    monkeypatch.setattr(files, "load_tensors", lambda path: read.append(path) or load_tensors(path))
    again = main(arguments("--config-file", config, "--resume"))
    assert read == [str(folder / "model_final.pth")]  # once
    after = load_tensors(str(folder / "model_final.pth"))["model"]
    assert again["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
    words = f"The training in {folder} is finished, with 4 iterations: it is only evaluated. To go"
    assert words in (folder / "log.txt").read_text()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_resume_that_fails_leaves_the_run_s_config(copied, capsys):
    config, folder, _ = copied
    override, words = "model.width=4", "is the checkpoint of another architecture"
    before = (folder / "config.yaml").read_bytes()
    assert words in error_of(capsys, train.main, "--config-file", config, "--resume", override)
    assert (folder / "config.yaml").read_bytes() == before
    close_logs()
    main(arguments("--config-file", config, "--resume", "train.log_period=3"))
    assert LazyConfig.load(str(folder / "config.yaml")).train.log_period == 3
    assert f"Full config saved to {folder}/config.yaml" in (folder / "log.txt").read_text()


def test_fast_dev_run_takes_every_path_and_leaves_the_run_alone(copied):
    config, folder, _ = copied
    before = state_of(folder)
    results = main(
        arguments("--config-file", config, "train.fast_dev_run=True", "train.max_iter=10000")
    )
    assert set(results) == {"bbox", "ema/bbox"}
    checkpoint = torch.load(folder / "fast_dev_run" / "model_final.pth", weights_only=True)
    assert checkpoint["trainer"]["iteration"] == 2
    after = state_of(folder)
    assert {path: after[path] for path in before} == before


# Your own data


def test_a_wrong_path_is_named_before_there_is_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # paths below it exist, and other settings are none
    paths = {"train_json": "~/cut.json", "train_images": "~", "val_images": "~"}
    settings = [f"data.{key}='{path}'" for key, path in paths.items()]
    words = ["--config-file", "custom_small", f"train.output_dir={tmp_path / 'run'}", *settings]
    (tmp_path / "cut.json").write_text("{")
    assert train.main([*words, "data.val_json=nowhere.json"]) == 1
    error = "Error: data.val_json=nowhere.json does not exist: correct the path."
    assert capsys.readouterr().err.splitlines()[-1] == error
    assert not (tmp_path / "run").exists()
    assert train.main([*words, "data.val_json=~/cut.json", "+data.tag=mine"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path}/cut.json " in error and "JSON" in error


CUSTOM_COCO = ROOT / "configs" / "custom_coco.py"
SMALL = ["model.backbone.depth=18", "model.backbone.norm=GN", "model.embed_dim=32"]
SMALL += ["+model.backbone.width=32"]
SMALL += ["model.encoder.pattern=I", "model.encoder.ffn_dim=32", "model.decoder.ffn_dim=32"]
SMALL += ["model.decoder.num_layers=1", "train.init_checkpoint="]
SMALL += ["dataloader.train.mapper.augmentations.short_sides=[32]", "train.device=cpu"]
SMALL += ["dataloader.train.mapper.augmentations_with_crop=null", "train.seed=0"]
SMALL += ["dataloader.test.mapper.augmentations.short_sides=32", "train.max_iter=2"]
SMALL += ["dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]


def test_two_files_train_together(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_dataset(tmp_path / name)
    a, b = f"{tmp_path}/a", f"{tmp_path}/b"
    data = [f"data.train_json=[{a}/truth.json,{b}/truth.json]", f"data.train_images=[{a},{b}]"]
    data += [f"data.val_json={a}/truth.json", f"data.val_images={a}"]
    original, seen, loads, parsed = Trainer._forward_backward, [], json.loads, []

    def record(self, data, micro_batch):
        seen.extend(x["file_name"] for x in data)
        return original(self, data, micro_batch)

    def parse(content, **kwargs):
        parsed.append(content)
        return loads(content, **kwargs)

    monkeypatch.setattr(Trainer, "_forward_backward", record)
    monkeypatch.setattr(json, "loads", parse)
    out = f"train.output_dir={tmp_path}"
    results = main(arguments("--config-file", CUSTOM_COCO, *SMALL, out, *data))
    assert sorted(seen) == sorted(str(path) for path in tmp_path.glob("[ab]/*.png"))
    # Each file is read once, also the first, on which the model is evaluated too.
    assert len([content for content in parsed if isinstance(content, bytes)]) == 2
    assert "AP" in results["bbox"]
    checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert checkpoint["smca"]["class_names"] == ["round", "square"]
    cfg = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert instantiate(cfg.model.num_classes) == 2 and len(cfg.data.train_json) == 2


NAMES = ["${round}", "???"]  # which a config would compute, or miss


def reordered(file):
    """The data of `own` with the second class before the first, and large ids."""
    data = json.loads(file.read_text())
    for image in data["images"]:
        image["id"] += 2**60
    for annotation in data["annotations"]:
        annotation["image_id"] += 2**60
        annotation["category_id"] = {1: 2**60, 2: 5}[annotation["category_id"]]
    data["categories"] = [{"id": key, "name": name} for key, name in zip((2**60, 5), NAMES)]
    return json.dumps(data)


def detections_of(folder, ids):
    """Image and class of each, by name; `ids` are those of `NAMES`."""
    found = json.loads((folder / "coco_instances_results.json").read_text())
    names = dict(zip(ids, NAMES))
    return [(d["image_id"] % 2**60, names[d["category_id"]]) for d in found]


@pytest.fixture
def own(tmp_path):
    """Overrides of a training on own data that is finished, and the file of these data."""
    write_dataset(tmp_path / "data")
    file = tmp_path / "data" / "truth.json"
    file.write_text(file.read_text().replace("round", NAMES[0]).replace("square", NAMES[1]))
    data = [f"data.{split}_json={file}" for split in ("train", "val")]
    data += [f"data.{split}_images={tmp_path}/data" for split in ("train", "val")]
    overrides = [*SMALL, f"train.output_dir={tmp_path}/run", *data]
    overrides.append(f"dataloader.evaluator.output_dir={tmp_path}")
    main(arguments("--config-file", CUSTOM_COCO, *overrides))
    close_logs()
    return overrides, file


def test_an_evaluation_needs_the_test_file_alone_whose_classes_go_by_name(own, tmp_path, capsys):
    _, file = own
    (tmp_path / "test.json").write_text(reordered(file))
    before = detections_of(tmp_path, [1, 2])
    file.unlink()
    test = [f"data.val_json={tmp_path}/test.json", f"data.val_images={tmp_path}/data"]
    weights = f"train.init_checkpoint={tmp_path}/run/model_final.pth"
    # With the config of the training, whose files are gone, and with the one that knows none.
    for config in (tmp_path / "run" / "config.yaml", CUSTOM_COCO):
        options = SMALL if config == CUSTOM_COCO else []
        command = ["--config-file", config, "--eval-only", *options, *test, weights]
        out = [f"train.output_dir={tmp_path}/out", f"dataloader.evaluator.output_dir={tmp_path}"]
        main(arguments(*command, *out))
        assert detections_of(tmp_path, [2**60, 5]) == before
        close_logs()
    test_file = tmp_path / "test.json"
    test_file.write_text(test_file.read_text().replace(NAMES[1], "long"))
    words = "test.json and the model must have the same categories, but only the first has ['long']"
    assert words in error_of(capsys, train.main, *command, *out)


def test_a_resumed_training_keeps_its_classes_and_what_followed_from_its_data(own, tmp_path):
    overrides, file = own
    data = json.loads(reordered(file))
    more = [{**data["annotations"][0], "id": n} for n in range(100, 160)]
    data["annotations"] += more
    file.write_text(json.dumps(data))
    before = detections_of(tmp_path, [1, 2])
    command = ["--config-file", CUSTOM_COCO, "--resume", *overrides]
    main(arguments(*command))
    assert detections_of(tmp_path, [2**60, 5]) == before
    close_logs()
    main(arguments(*command, "train.max_iter=3"))
    provenance = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["smca"]
    assert provenance["class_names"] == NAMES
    assert provenance["category_ids"] == [2**60, 5]
    assert provenance["fitted"] == {"model.num_queries": 40}


@pytest.mark.parametrize("words", [["--eval-only"], ["--resume"]])
def test_data_that_go_by_other_names_are_refused(copied, capsys, words):
    config, folder, _ = copied
    path = folder / "model_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["smca"]["class_names"].reverse()
    torch.save(checkpoint, path)
    command = ["--config-file", config, *words, f"train.init_checkpoint={path}"]
    text = error_of(capsys, train.main, *command)
    assert "model_final.pth has the classes ['square', 'round'], data set" in text


# Configs and overrides that cannot be used


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.max_itr=5", "train.max_itr, did you mean train.max_iter?"),
        ("model.nonsense=1", "no key model.nonsense"),
        ("lr=1", "The config has no key lr: there are optimizer.lr."),
        ("train.max_iter.foo=1", "no key train.max_iter.foo"),
        ("train.amp.dtype=fp17", "train.amp.dtype has to be bf16 or fp16, it cannot be 'fp17'"),
        ("train.amp.enabled=no", "train.amp.enabled has to be true or false, it cannot be 'no'"),
        ("train.max_iter=0", "train.max_iter has to be a whole number of at least 1"),
        ("train.max_iter=true", "train.max_iter has to be a whole number of at least 1"),
        ("train.max_iter=1e3", "train.max_iter has to be a whole number of at least 1"),
        ("train.amp=True", "train.amp has to be a section, it cannot be True"),
        ("train.writers=[wandb]", "train.writers has to be a list of sections"),
        ("train.device=cuda:99", "train.device=cuda:99 cannot be used"),
        ("dataloader.train.dataset.names=a,b", "needs brackets, dataloader.train.dataset.names=[a"),
        ("max_iter", "Override 'max_iter' cannot be read"),
        ("~train.max_iter", "Override '~train.max_iter' is not possible"),
        ("--resume", "has to stand before"),
        ("dataloader.train.total_batch_size=0", "total_batch_size=0 must be a positive"),
        ("dataloader.train.dataset.names=coco_nowhere", "coco_nowhere"),
        ("model.num_classes=1", "has 2 classes, the model 1: set model.num_classes=2, or data"),
        ("train.init_checkpoint=nowhere.pth", "nowhere.pth does not exist"),
        ("optimizer.params=abc", "optimizer.params has to be a list of sections, it cannot be"),
        ("optimizer.params=null", "The config's optimizer cannot be built"),
        ("dataloader.evaluator=abc", "dataloader.evaluator has to be a section, it cannot be 'a"),
        ("dataloader.test.mapper=3", "dataloader.test.mapper has to be a section, it cannot be 3"),
        ("dataloader.test.dataset.names=3", "Data set '3' is not registered"),
        ("dataloader=null", "does not have the sections dataloader: start"),
    ],
)
def test_a_wrong_override_is_named(trained, tmp_path, capsys, override, words):
    out = f"train.output_dir={tmp_path}"
    assert words in error_of(capsys, train.main, "--config-file", trained[0], out, override)


def test_a_folder_that_another_training_writes_into_is_refused(trained, tmp_path, capsys):
    tmp_path = tmp_path / "ü"
    tmp_path.mkdir()
    code = f"import fcntl, sys; file = open({str(tmp_path / 'log.txt')!r}, 'w'); "
    code += "fcntl.lockf(file, fcntl.LOCK_EX); print('locked', flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    command = ["--config-file", trained[0], f"train.output_dir={tmp_path}"]
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        words = error_of(capsys, train.main, *command)
        other.communicate()
    assert f"train.output_dir={tmp_path} belongs to a training that is running" in words
    assert train.main([*command, "train.max_iter=1"]) == 0
    assert (tmp_path / "model_final.pth").is_file()


def test_early_stopping_without_evaluations_is_an_error(trained, tmp_path, capsys):
    config = ["--config-file", trained[0], f"train.output_dir={tmp_path}/out"]
    wrong = ["train.early_stopping=3", "train.eval_period=0"]
    assert "set train.eval_period to" in error_of(capsys, train.main, *config, *wrong)
    assert not (tmp_path / "out").exists()
    # What asks for no training takes them: a run of that kind can be used.
    assert load_config(trained[0], wrong).train.early_stopping == 3


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "config.py does not exist"),
        ("train = dict(\n", "config.py cannot be loaded"),
        ("MODEL:\n  DEVICE: cpu\n", "config.yaml is no config for this command, it does not have"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(tmp_path, capsys, text, words):
    path = tmp_path / words.split()[0]
    if text is not None:
        path.write_text(text)
    assert words in error_of(capsys, train.main, "--config-file", path)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--config-file"),
        (["--config-file", "x/custom_smal.py"], "does not exist, did you mean custom_small?"),
        (["--config-file", "CONFIG", "--num-gpus", 0], "--num-gpus"),
        (["--config-file", "CONFIG", "--num-machines", 2], "use torchrun --nnodes or Slurm"),
        (["--config-file", "CONFIG", "--eval-only", "OUT"], "train.init_checkpoint=FILE"),
        (["--config-file", "CONFIG", "OUT", "FOLDER"], "run is a folder: name a checkpoint in it"),
        (["--config-file", "CONFIG", "--eval-only", "OUT", "FOLDER"], "in it, such as model_best"),
        (["--config-file", "custom_small", "--eval-only", "OUT", "GONE"], "no.pth does not exist"),
        (["--config-file", "CONFIG"], "run holds a training: continue it with --resume"),
        (["--config-file", "CONFIG", "BELOW_A_FILE"], "config.py/run cannot be written"),
        (["--config-file", "CONFIG", "--eval-only", "BELOW_A_FILE"], "config.py/run cannot be wri"),
    ],
)
def test_what_a_command_lacks_or_cannot_use_is_named(trained, tmp_path, capsys, words, message):
    config, folder, _ = trained
    known = {"CONFIG": config, "OUT": f"train.output_dir={tmp_path}"}
    known.update(FOLDER=f"train.init_checkpoint={folder}", GONE="train.init_checkpoint=no.pth")
    known.update(BELOW_A_FILE=f"train.output_dir={config}/run")
    words = [known.get(word, word) for word in words]
    assert message in error_of(capsys, train.main, *words)


# Checkpoints


def save(path, weights, **others):
    torch.save({"model": weights, **others}, path)
    return str(path)


def load(model, path, **kwargs):
    SMCACheckpointer(model, **kwargs).load(str(path))
    return model


BACKBONE = {f"backbone.{key}": x for key, x in TinyDetector().backbone.state_dict().items()}
UNKNOWN = {f"decoder.{n}": torch.zeros(1) for n in range(6)}
LACKING = {key: x for key, x in TinyDetector().state_dict().items() if key != "bbox_embed.weight"}


@pytest.mark.parametrize(
    "state, need_detector, words",
    [
        (TinyDetector(width=16).state_dict(), False, r"architecture.*\(16, .* \(8, 3, 3, 3\)"),
        (
            {**LACKING, **UNKNOWN},
            False,
            r"config's, in bbox_embed, decoder \(bbox_embed.weight is not in the file and 6 more\)",
        ),
        (nn.Linear(2, 2).state_dict(), False, "No weight in .*a.pth"),
        (
            TinyDetector(num_classes=80).state_dict(),
            True,
            r"class_embed \(class_embed.weight is \(80, 8\) in the file, \(2, 8\) here and 1",
        ),
        (BACKBONE, True, "a backbone only"),
        (
            {"backbone.stem.weight": BACKBONE["backbone.stem.weight"]},
            False,
            r"another backbone: 5 missing \(backbone.norm.bias",
        ),
        (
            {**BACKBONE, "backbone.res6.weight": torch.zeros(1)},
            False,
            r"another backbone: 1 unexpected \(backbone.res6.weight\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, state, need_detector, words):
    path = save(tmp_path / "a.pth", state)
    with pytest.raises(CheckpointError, match=words):
        load(TinyDetector(), path, need_detector=need_detector)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, suffix):
    path = tmp_path / ("a" + suffix)
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(CheckpointError, match=f"a{suffix} cannot be read"):
        load(TinyDetector(), path)


def test_a_checkpoint_that_cannot_be_downloaded_is_named(monkeypatch):
    def refuse(path, *args, **kwargs):
        raise OSError("no route")

    loader = SMCACheckpointer(TinyDetector())
    monkeypatch.setattr(loader.path_manager, "get_local_path", refuse)
    name = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
    with pytest.raises(CheckpointError, match="R-50.pkl cannot be downloaded: give a local copy"):
        loader.load(name)


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.bottom_up."])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_weights_of_a_backbone_load_whatever_their_prefix(tmp_path, prefix, suffix):
    source, model = TinyDetector().backbone, TinyDetector()
    head = model.class_embed.weight.clone()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    if prefix:
        state["roi_heads.fc.weight"] = torch.zeros(5, 5)
    path = tmp_path / ("backbone" + suffix)
    if suffix == ".pth":
        save(path, state)
    else:
        state = {key: value.numpy() for key, value in state.items()}
        data = {"model": state, "__author__": "torchvision", "matching_heuristics": not prefix}
        path.write_bytes(pickle.dumps(data))
    load(model, path)
    for key, value in source.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[key], value)
    assert torch.equal(model.class_embed.weight, head)


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


def test_resuming_from_a_checkpoint_that_is_gone_is_an_error(tmp_path, capsys):
    config = write_tiny_config(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000009.pth")
    text = error_of(capsys, train.main, "--config-file", config, "--resume")
    assert "model_0000009.pth does not exist" in text

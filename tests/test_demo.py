import json
import os
import re
import struct
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import demo
import draw
import run_demo
from helpers import (
    CLASS_NAMES,
    ROOT,
    error_of,
    full_disk,
    make_image,
    make_smca,
    write_image,
    write_smca_config,
    write_weights,
)
from smca.cli import check_data, evaluate
from smca.cli.predict import find_images, read_frames
from smca.data import SHAPE_CLASSES, register_shapes
from smca.errors import UserError, exit_code
from smca.inference import Detections, Predictor

CATEGORY_IDS = [7, 2**70, "b-2"]  # of the classes in the data set's JSON


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A config and its weights, which say the classes' names."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_smca_config(folder)
    provenance = {"config": "tiny_smca.py", "class_names": CLASS_NAMES, "num_classes": 3}
    provenance["category_ids"] = CATEGORY_IDS
    return config, write_weights(folder, config, smca=provenance)


def run(trained, *args):
    config, weights = trained
    return demo.main(["--config-file", config, "--weights", weights, *map(str, args)])


def read_json(folder):
    return json.loads((folder / demo.JSON_NAME).read_text())


def size_of(path):
    with Image.open(path) as image:
        image.load()
        return image.size


# Images


def expected_results(config, image):
    """What the model itself says about an image, resized as the config's evaluation does."""
    height, width = image.shape[:2]
    factor = min(96 / min(height, width), 160 / max(height, width))
    size = (int(width * factor + 0.5), int(height * factor + 0.5))
    resized = np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(resized.transpose(2, 0, 1))
    with torch.no_grad():
        (output,) = make_smca(config)([{"image": pixels, "height": height, "width": width}])
    ids = dict(enumerate(CATEGORY_IDS))
    return Detections(output["instances"], image, CLASS_NAMES, ids).to_coco()


def assert_same_results(results, expected, pixels, score):
    """But for so many pixels and so much score."""
    for result, row in zip(results, expected, strict=True):
        row.update(bbox=pytest.approx(row["bbox"], abs=pixels))
        row.update(score=pytest.approx(row["score"], abs=score))
        assert result == {**result, **row}


def test_results_are_the_models_own_on_the_resized_image(trained, tmp_path):
    image = write_image(tmp_path / "a.png", 60, 130)
    expected = expected_results(trained[0], image)
    threshold = (expected[2]["score"] + expected[3]["score"]) / 2
    out = tmp_path / "out"
    args = ("--output", out, "--confidence-threshold", threshold)
    args += ("--opts", "model.max_detections=5")
    assert run(trained, "--input", tmp_path / "a.png", *args) == 0
    results = read_json(out)
    assert {result["file_name"] for result in results} == {str(tmp_path / "a.png")}
    assert_same_results(results, expected[:3], pixels=1e-2, score=1e-4)


def test_a_folder_a_pattern_and_files_can_be_given(tmp_path):
    for name in ("a.png", "b.png", "c.bmp"):
        write_image(tmp_path / name)
    for name in ("b.pdf", "notes.txt", "d.palm", "._a.png"):
        (tmp_path / name).write_text("no image")
    for given, names in (
        (["."], ["a.png", "b.png", "c.bmp"]),
        (["*.png"], ["a.png", "b.png"]),
        (["c.bmp", "a.png", "*.bmp"], ["c.bmp", "a.png"]),
    ):
        paths = find_images([f"{tmp_path}/{name}" for name in given])
        assert [os.path.basename(path) for path in paths] == names
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no image in the folder .*empty itself: .*empty/\*\*/"):
        find_images([f"{tmp_path}/empty"])
    with pytest.raises(UserError, match="film.MP4 is a video: give it as --video-input"):
        find_images(["film.MP4"])


def test_images_of_one_name_have_different_files():
    paths = ["x/a.png", "y/a.png", "z/a.tif"]
    assert demo.output_paths(paths, "out") == ["out/a.png", "out/a_2.png", "out/a_3.png"]


def test_images_may_have_any_name(trained, tmp_path, capsys):
    names = ["a %20#?c.png", "q'\".png", "[1].png", "two\nlines.png", os.fsdecode(b"\xff.png")]
    (tmp_path / "in").mkdir()
    for name in names:
        write_image(tmp_path / "a.png")
        (tmp_path / "a.png").rename(tmp_path / "in" / name)
    out = tmp_path / "out"
    paths = [tmp_path / "in" / name for name in names]
    assert run(trained, "--input", *paths, "--output", out, "--confidence-threshold", 1) == 0
    assert sorted(os.listdir(out)) == sorted([*names, demo.JSON_NAME])
    printed = capsys.readouterr().out
    assert all(name.encode("utf-8", "backslashreplace").decode() in printed for name in names)
    assert printed.endswith("after a short training: lower --confidence-threshold.\n")


def test_broken_images_are_skipped_and_told(trained, tmp_path, capsys):
    for name in ("a.png", "z.png"):
        write_image(tmp_path / name)
    (tmp_path / "m.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    (tmp_path / "n.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "o.png").mkdir()
    out = tmp_path / "out"
    assert run(trained, "--input", tmp_path, "--output", out, "--confidence-threshold", 0) == 1
    *skipped, count = capsys.readouterr().err.splitlines()
    for line, name in zip(skipped, ("m.png", "n.png"), strict=True):
        assert line.startswith("Skipped: ") and name in line
    assert count == "2 of 4 images could not be read."
    assert sorted(os.listdir(out)) == ["a.png", demo.JSON_NAME, "z.png"]
    assert {result["image_id"] for result in read_json(out)} == {0, 3}


# Models and names


def test_weights_find_the_config_of_their_name_in_the_package(tmp_path):
    from detectron2.config import LazyConfig, instantiate

    model = instantiate(LazyConfig.load(str(ROOT / "configs" / "smca_shapes.py")).model)
    path = tmp_path / "model.pth"
    overrides = ["dataloader.test.mapper.augmentations.max_size=150"]
    metadata = {"config": "smca_shapes.py", "overrides": overrides}
    torch.save({"model": model.state_dict(), "smca": metadata}, path)
    predictor = Predictor(path)
    cfg = predictor.cfg
    assert cfg.dataloader.test.mapper.augmentations.max_size == 150
    assert cfg.train.output_dir == "output/smca_shapes"
    # Names and ids are those of the config's data set.
    assert predictor.class_names == list(SHAPE_CLASSES)
    assert predictor.category_ids == {i: i + 1 for i in range(len(SHAPE_CLASSES))}


# What is missing or wrong


def test_results_so_far_are_kept_when_the_disk_is_full(trained, tmp_path, monkeypatch, capsys):
    for index in range(4):
        write_image(tmp_path / f"{index}.png")
    save, out = Image.Image.save, tmp_path / "out"

    def fail(self, path, *args, **kwargs):
        if path == str(out / "2.png"):
            full_disk()
        return save(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", fail)
    args = ("--input", tmp_path, "--output", out, "--confidence-threshold", 0)
    assert run(trained, *args) == 1
    assert {row["image_id"] for row in read_json(out)} == {0, 1}
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("Error")]
    assert "out/2.png cannot be written: No space left" in line


def test_missing_files_and_wrong_outputs_are_named(trained, tmp_path, capsys):
    config, weights = trained
    image = tmp_path / "a.png"
    write_image(image)
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([config, weights, "--input", image, "--output", tmp_path], f"is the folder of {image}"),
        ([config, weights, "--input", image, "--output", image / "c"], "cannot be written"),
        ([config, weights, "--input", image, "--output", "x.png"], "x.png has to be a folder"),
        ([config, weights, "--input", "model.a=5"], "overrides go behind --opts, at the end"),
        ([config, weights, "--input", "nowhere.png"], "nowhere.png does not exist"),
        ([config, weights, "--input", tmp_path / "*.gif"], "*.gif does not exist"),
        ([config, weights, "--input", tmp_path / "empty"], "no image in the folder"),
        (["nowhere.py", weights, "--input", image], "nowhere.py does not exist"),
        ([config, "nowhere.pth", "--input", image], "nowhere.pth does not exist"),
        ([config, "", "--input", image], "add --weights"),
        (["", image, "--input", image], "a.png cannot be read, perhaps it was cut short or is of"),
        (["", "nowhere.pth", "--input", image], "nowhere.pth does not exist"),
        (["", "", "--input", image], "add --config-file, --weights or both"),
    ):
        config_file, file, *rest = arguments
        model = ["--config-file", config_file, "--weights", file]
        out = ["--output", tmp_path / "out"]  # where none is given
        assert words in error_of(capsys, demo.main, *model, *out, *rest)
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_say_their_config_need_one(trained, tmp_path, capsys):
    write_image(tmp_path / "a.png")
    for provenance, words in (
        ({}, "does not say which config it belongs to: add --config-file"),
        ({"smca": {"config": "mine.py"}}, "the config mine.py, which is neither"),
    ):
        weights = write_weights(tmp_path, trained[0], **provenance)
        args = ["--weights", weights, "--input", tmp_path / "a.png"]
        assert words in error_of(capsys, demo.main, *args)


@pytest.mark.parametrize(
    "tool, given",
    [
        (draw, ["--confidence-threshold", "5"]),
        (demo, ["--confidence-threshold", "high"]),
        (draw, ["--num-images", "0"]),
        (draw, ["--num-detections", "-1"]),
        (evaluate, ["--max-images", "0"]),
        (evaluate, ["--num-worst", "-1"]),
        (check_data, ["--num-images", "0"]),
        (check_data, ["--num-examples", "few"]),
    ],
)
def test_an_option_s_value_out_of_range_is_named_before_anything_is_read(capsys, tool, given):
    with pytest.raises(SystemExit):
        tool.get_parser().parse_args(given)
    (error,) = capsys.readouterr().err.splitlines()
    assert f"argument {given[0]}: has to be " in error and f", not {given[1]} (see" in error


def test_images_may_be_urls():
    urls = ["https://example.com/photos/a.png?size=2/3", "https://example.com/"]
    assert find_images(urls) == urls
    assert demo.output_paths(urls, "out") == ["out/a.png", "out/example.png"]


# Video


@pytest.fixture
def video(tmp_path):
    import cv2

    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (500, 480))
    for seed in range(5):
        writer.write(np.repeat(np.repeat(make_image(96, 100, seed), 5, 0), 5, 1))
    writer.release()
    return path


def test_a_video_becomes_an_mp4_and_its_detections_are_those_of_its_frames(
    trained, tmp_path, video
):
    import cv2

    out = tmp_path / "out"
    assert run(trained, "--video-input", video, "--output", out, "--confidence-threshold", 0) == 0
    drawn = cv2.VideoCapture(str(out / "film.mp4"))
    assert drawn.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    assert [drawn.read()[1].shape for _ in range(5)] == [(480, 500, 3)] * 5
    assert not drawn.read()[0]
    images = [result["image_id"] for result in read_json(out)]
    assert images == np.repeat(range(5), 6).tolist()
    _, frame = cv2.VideoCapture(str(video)).read()
    expected = expected_results(trained[0], frame[:, :, ::-1].copy())
    results = [result for result in read_json(out) if result["image_id"] == 0]
    assert_same_results(results, expected, pixels=0.5, score=1e-3)


def break_frames(path, *numbers):
    """Overwrite frames of an AVI file with zeros."""
    data, start, number = bytearray(path.read_bytes()), path.read_bytes().find(b"movi"), 0
    while (start := data.find(b"00dc", start)) >= 0:
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        if number in numbers:
            data[start + 8 : start + 8 + size] = bytes(size)
        number, start = number + 1, start + 8 + size
    path.write_bytes(data)


@pytest.mark.parametrize(
    "broken, kept, words",
    [
        ((0, 2), [1, 3, 4], "2 of 5 frames could not be decoded and were left out."),
        ((3, 4), [0, 1, 2], "film.avi ends after 3 of 5 frames: it may be cut off."),
    ],
)
def test_a_video_goes_on_after_broken_frames_and_says_what_is_missing(
    trained, tmp_path, video, capsys, broken, kept, words
):
    import cv2

    break_frames(video, *broken)
    frames = read_frames(cv2.VideoCapture(str(video)), None)  # as if it did not say its length
    assert [number for number, _ in frames] == kept
    out = tmp_path / "out"
    args = ("--output", out, "--confidence-threshold", 0)
    assert run(trained, "--video-input", video, *args) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "frames" in line] == [words.replace("film.avi", str(video))]
    assert sorted({row["image_id"] for row in read_json(out)}) == kept
    drawn = cv2.VideoCapture(str(out / "film.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == len(kept)


def test_videos_that_cannot_be_read_or_written_are_named(trained, tmp_path, video, capsys):
    (tmp_path / "notes.mp4").write_text("no video")
    (tmp_path / "taken" / "film.mp4").mkdir(parents=True)
    model = ["--config-file", trained[0], "--weights", trained[1]]
    for name, output, words in (
        ("gone.mp4", "out", "gone.mp4 does not exist"),
        ("notes.mp4", "out", "notes.mp4 is no video"),
        ("film.avi", "film.mp4", "film.mp4 has to be a folder"),
        ("film.avi", "", "is the folder of"),
        ("film.avi", "notes.mp4/out", "out cannot be written: Not a directory"),
        ("film.avi", "taken", "OpenCV cannot write"),
    ):
        args = ["--video-input", tmp_path / name, "--output", tmp_path / output]
        code = demo.main([str(arg) for arg in (*model, *args)])
        assert code == 1 and words in capsys.readouterr().err


def test_a_video_on_a_full_disk_is_an_error(trained, tmp_path, video, capsys, monkeypatch):
    import cv2

    writer = mock.Mock(wraps=cv2.VideoWriter(str(tmp_path / "cut.mp4"), 0, 10, (500, 480)))
    monkeypatch.setattr(cv2, "VideoWriter", lambda *args: writer)
    writer.isOpened.return_value = True  # OpenCV says nothing when it cannot write
    args = ("--video-input", video, "--output", tmp_path / "out", "--confidence-threshold", 0)
    assert run(trained, *args) == 1
    assert "film.mp4 could not be written in full: is the disk" in capsys.readouterr().err
    assert len(read_json(tmp_path / "out")) == 30


def test_a_video_of_a_phone_held_upright_is_seen_upright(trained, tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "film.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (500, 480))
    writer.write(np.zeros((480, 500, 3), dtype=np.uint8))
    writer.release()
    matrix = struct.pack(">5i", 2**16, 0, 0, 0, 2**16)
    quarter_turn = struct.pack(">5i", 0, 2**16, 0, -(2**16), 0)
    before, _, after = path.read_bytes().rpartition(matrix)  # the track's, not the file's
    path.write_bytes(before + quarter_turn + after)
    assert run(trained, "--video-input", path, "--output", tmp_path / "out") == 0
    _, frame = cv2.VideoCapture(str(tmp_path / "out" / "film.mp4")).read()
    assert frame.shape == (500, 480, 3)


# The demo run


def test_demo_run_trains_evaluates_draws_and_tells_where(tmp_path):
    register_shapes(num_train=2, num_val=2, prefix=str(tmp_path))
    args = [
        *("--output-dir", str(tmp_path / "run"), "train.fast_dev_run=True", "train.device=cpu"),
        *("model.embed_dim=32", "dataloader.train.total_batch_size=2"),
        f"dataloader.train.dataset.names='{tmp_path}_train'",
        f"dataloader.test.dataset.names='{tmp_path}_val'",
    ]
    text = run_demo.run(run_demo.get_parser().parse_args(args))
    assert re.search(r"^bbox: AP \S+, AP50 \S+$", text, flags=re.MULTILINE)
    written = re.findall(r"^  (/.*)$", text, flags=re.MULTILINE)
    names = {os.path.basename(path) for path in written}
    assert {"model_final.pth", "validation.png", "gaussians.png", "curves.png"} <= names
    assert all(os.path.exists(path) for path in written)
    assert len(os.listdir(tmp_path / "run" / "fast_dev_run" / "examples")) == 2
    assert re.search(r"smca-predict --weights \S+/model_best.pth", text)


def test_the_demos_folder_is_that_of_its_option(tmp_path, capsys):
    def main(words):
        return exit_code(run_demo.run, run_demo.get_parser().parse_args(words))

    words = ["--output-dir", tmp_path / "run", f"train.output_dir={tmp_path}/mine"]
    assert "it follows from --output-dir" in error_of(capsys, main, *words)


def test_a_pipe_that_nobody_reads_any_more_is_no_error():
    code = "import sys; from smca.errors import exit_code as run; sys.exit(run(print, 'x' * 10**6))"
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    command.stdout.close()
    assert command.wait() == 141 and b"Error" not in command.stderr.read()

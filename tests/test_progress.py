"""Progress bars of the command lines: with an end in sight, on a terminal alone."""

import io
import sys

import pytest
from detectron2.config import LazyConfig

from helpers import make_image, write_image, write_smca_config, write_weights
from smca.cli import evaluate, predict


class Terminal(io.StringIO):
    """What tqdm takes for one."""

    def isatty(self):
        return True


def bars(text):
    """Each state of each bar, such as " 50%|####     | 1/2 [00:00<00:00,  3.11image/s]"."""
    return [part for part in text.split("\r") if "%|" in part]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny detector of the embedded data beside its config."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_smca_config(folder)
    LazyConfig.save(LazyConfig.load(config), str(folder / "config.yaml"))
    return write_weights(folder, config, iteration=0)


def demo(weights, folder):
    (folder / "images").mkdir()
    for name in ("a.png", "b.png"):
        write_image(folder / "images" / name)
    return predict.main(
        ["--weights", weights, "--input", str(folder / "images"), "--output", str(folder / "out")]
    )


def film(weights, folder):
    cv2 = pytest.importorskip("cv2")
    fourcc = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(folder / "a.mp4"), fourcc, 10, (120, 90))
    for seed in range(2):
        writer.write(make_image(seed=seed))
    writer.release()
    words = ["--weights", weights, "--video-input", str(folder / "a.mp4")]
    return predict.main([*words, "--output", str(folder / "out")])


def report(weights, folder):
    words = ["--weights", weights, "--output", str(folder), "--max-images", "2"]
    evaluate.run(evaluate.get_parser().parse_intermixed_args(words))


COMMANDS = {
    "demo": (demo, "2/2"),
    "video": (film, "2/2"),
    "evaluate": (report, "2/2"),
}


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_goes_to_its_end_on_a_terminal_and_is_not_there_without(
    trained, tmp_path, monkeypatch, name, is_terminal
):
    stream = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    command, end = COMMANDS[name]
    command(trained, tmp_path)
    found = bars(stream.getvalue())
    if is_terminal:
        assert end in found[-1] and "<00:00" in found[-1]  # what is left
    else:
        assert not found

"""Detect objects in images or a video: ``smca-predict``, in a checkout ``demo.py``."""

import argparse
import contextlib
import glob
import importlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from smca.checkpoint.files import write_atomically
from smca.errors import UserError, command_line, counted, exit_code, writing
from smca.inference import add_predictor_arguments, add_threshold, make_folder, predictor_of
from smca.inference.images import is_url

_DESCRIPTION = """\
Detect objects in images or a video, and write them drawn and as COCO-style JSON:

    %(prog)s --weights output/demo/model_best.pth --input a.jpg b.png
    %(prog)s --config-file CONFIG --weights FILE --input 'photos/*.jpg' --output results
    %(prog)s --config-file CONFIG --weights FILE --video-input film.mp4 --opts train.device=cpu

In instances_predictions.json, boxes are [x, y, width, height] in pixels of the image; category_id
is that of the training data's own JSON. For a checkpoint that does not say it, and whose config
names no data set that is known here, it is the class index.
"""
JSON_NAME = "instances_predictions.json"
_WRITABLE = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}
_MAX_BROKEN = 100  # frames in a row, after which a video of unknown length is over


def get_parser() -> argparse.ArgumentParser:
    parser = command_line(_DESCRIPTION)
    add_predictor_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    text = "images or their URLs, folders, glob patterns"
    source.add_argument("--input", nargs="+", metavar="PATH", help=text)
    source.add_argument("--video-input", metavar="FILE", help="a video that OpenCV reads")
    parser.add_argument("--output", default="output/predictions", metavar="DIR")
    add_threshold(parser, "lowest score of a detection, in [0, 1]; default: %(default)s")
    text = "overrides, the last option: key=value"
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help=text)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; gives the exit code, 1 if something could not be read."""
    return exit_code(run, get_parser().parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """The command's work; gives its exit code."""
    if Path(args.output).suffix.lower() in (*_WRITABLE, ".mp4"):
        raise UserError(f"--output {args.output} has to be a folder.")
    return run_on_video(args) if args.video_input else run_on_images(args)


def run_on_images(args: argparse.Namespace) -> int:
    """Detect, draw and write; images that cannot be read are skipped. Gives the exit code."""
    # What is wrong with the files should not take the time to build a model.
    paths = find_images(args.input)
    outputs = output_paths(paths, args.output)
    predictor = predictor_of(args)
    make_folder(args.output)
    num_failed = 0
    progress = tqdm(zip(paths, outputs), total=len(paths), unit="image", disable=None)
    with results_in(args.output) as results:
        for image_id, (path, output) in enumerate(progress):
            try:
                detections = predictor(path, threshold=args.confidence_threshold)
            except UserError as error:
                tqdm.write(f"Skipped: {error}", file=sys.stderr)
                num_failed += 1
                continue
            with writing(output):
                detections.draw().save(output)
            results += detections.to_coco(file_name=path, image_id=image_id)
            tqdm.write(f"{path}: {counted(len(detections), 'detection')}, drawn in {output}")
    if not results and num_failed < len(paths):
        least = f"No score is {args.confidence_threshold} or more"
        print(f"{least}, as after a short training: lower --confidence-threshold.")
    if num_failed:
        print(f"{num_failed} of {len(paths)} images could not be read.", file=sys.stderr)
    return 1 if num_failed else 0


def find_images(patterns: Sequence[str]) -> List[str]:
    """Files and URLs that are named by files, URLs, folders or glob patterns, in the order given;
    those of a folder or pattern by name."""
    known = Image.registered_extensions().items()
    image_suffixes = {suffix for suffix, kind in known if kind in Image.OPEN}  # PDF is not
    paths: List[str] = []
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        if Path(pattern).suffix.lower() in _VIDEOS:
            raise UserError(f"{pattern} is a video: give it as --video-input.")
        if is_url(pattern) or os.path.isfile(pattern):
            found = [pattern]
        elif os.path.isdir(pattern):
            # A broken link is named when it cannot be read.
            files = (path for path in Path(pattern).iterdir() if not path.is_dir())
            # A Mac writes hidden files beside the images of other disks.
            found = sorted(str(path) for path in files if not path.name.startswith("."))
            found = [path for path in found if Path(path).suffix.lower() in image_suffixes]
            if not found:
                raise UserError(
                    f"There is no image in the folder {pattern} itself: for those of its folders, "
                    f"give a pattern, '{pattern}/**/*.jpg'."
                )
        else:
            found = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
            if not found:
                advice = "overrides go behind --opts, at the end"
                advice = advice if "=" in pattern else "give an image or a folder"
                raise UserError(f"The input {pattern} does not exist: {advice}.")
        paths += found
    return list(dict.fromkeys(paths))


def output_paths(paths: Sequence[str], folder: str) -> List[str]:
    """A file in the folder for each drawn image, with the image's name, made unique, and its type
    if that can be written, else .png.

    Raises:
        UserError: the folder is one of the images', whose files are not to be overwritten.
    """
    names: Dict[str, str] = {}  # of the drawn images, and of their sources
    for path in paths:
        refuse_folder_of(path, folder)
        source = Path(path.partition("?")[0] if is_url(path) else path)
        suffix = source.suffix if source.suffix.lower() in _WRITABLE else ".png"
        numbers = ("", *(f"_{number}" for number in range(2, len(paths) + 2)))
        candidates = (f"{source.stem}{number}{suffix}" for number in numbers)
        names[next(name for name in candidates if name not in names)] = path
    return [os.path.join(folder, name) for name in names]


def refuse_folder_of(path: str, folder: str) -> None:
    """Raise if the output would lie beside an input."""
    if os.path.realpath(os.path.dirname(path)) == os.path.realpath(folder) and not is_url(path):
        raise UserError(f"--output {folder} is the folder of {path}: give another one.")


def run_on_video(args: argparse.Namespace) -> int:
    """The same for a video's frames; `image_id` counts them, those that cannot be decoded
    included."""
    cv2: Any = importlib.import_module("cv2")  # its types are those of one version
    if not os.path.isfile(args.video_input):
        raise UserError(f"The video {args.video_input} does not exist, or is no file.")
    video = cv2.VideoCapture(args.video_input)
    # Some files do not say how many frames they have.
    num_frames = max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT))) or None
    frames = read_frames(video, num_frames)
    first = next(frames, None)
    if first is None:
        raise UserError(f"{args.video_input} is no video that OpenCV can read, or has no frames.")
    refuse_folder_of(args.video_input, args.output)
    output = os.path.join(args.output, f"{Path(args.video_input).stem}.mp4")
    predictor = predictor_of(args)
    make_folder(args.output)
    frames_per_second = video.get(cv2.CAP_PROP_FPS)
    if not 0 < frames_per_second < 1000:  # which some files do not say
        frames_per_second = 25.0
    writer: Any = None  # its size is that of the first drawn frame
    num_drawn = 0
    progress = tqdm(total=num_frames, unit="frame", disable=None)
    with contextlib.ExitStack() as stack:
        results = stack.enter_context(results_in(args.output))
        stack.callback(video.release)
        stack.callback(progress.close)
        for index, frame in itertools.chain([first], frames):
            image = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            detections = predictor(image, threshold=args.confidence_threshold)
            drawn = np.asarray(detections.draw())
            height, width = (max(2, side // 2 * 2) for side in drawn.shape[:2])
            drawn = drawn[:height, :width]  # codecs refuse odd numbers
            if writer is None:
                codec, size = cv2.VideoWriter_fourcc(*"mp4v"), drawn.shape[1::-1]
                writer = cv2.VideoWriter(output, codec, frames_per_second, size)
                if not writer.isOpened():
                    raise UserError(f"OpenCV cannot write {output}: is the folder writable?")
                stack.callback(writer.release)  # or nothing can play what there is
            writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
            results += detections.to_coco(file_name=args.video_input, image_id=index)
            num_drawn += 1
            progress.update()
    if int(cv2.VideoCapture(output).get(cv2.CAP_PROP_FRAME_COUNT)) != num_drawn:
        # OpenCV does not say so when it writes.
        raise UserError(f"{output} could not be written in full: is the disk full?")
    found = f"{counted(num_drawn, 'frame')}, {counted(len(results), 'detection')}"
    print(f"{args.video_input}: {found}, drawn in {output}")
    seen = index + 1
    is_cut = num_frames is not None and seen < num_frames
    if num_drawn < seen:
        broken = f"{seen - num_drawn} of {seen} frames"
        print(f"{broken} could not be decoded and were left out.", file=sys.stderr)
    if is_cut:
        ends = f"{args.video_input} ends after {seen} of {num_frames} frames"
        print(f"{ends}: it may be cut off.", file=sys.stderr)
    return 1 if is_cut or num_drawn < seen else 0


def read_frames(video: Any, num_frames: Optional[int]) -> Iterator[Tuple[int, np.ndarray]]:
    """The frames of a `cv2.VideoCapture` that can be decoded, with their numbers from 0.
    `num_frames` is None if the file does not say how many there are."""
    number = num_failed = 0  # of frames, and in a row
    while True:
        is_readable, frame = video.read()
        num_failed = 0 if is_readable else num_failed + 1
        number += 1
        if is_readable:
            yield number - 1, frame
        elif num_failed > _MAX_BROKEN if num_frames is None else number >= num_frames:
            return


@contextlib.contextmanager
def results_in(folder: str) -> Iterator[List[Dict[str, Any]]]:
    """A list for the results, which are written as JSON into the folder at the end, also if an
    error ends the work."""
    path = os.path.join(folder, JSON_NAME)
    results: List[Dict[str, Any]] = []
    try:
        yield results
    finally:
        with writing(path):
            write_atomically(path, json.dumps(results, indent=1).encode())
        print(f"{counted(len(results), 'detection')} in {path}")

#!/usr/bin/env python
"""
Detect objects in images or a video, and write them drawn and as COCO-style JSON:

    demo.py --weights output/demo/model_final.pth --input a.jpg b.png
    demo.py --config-file CONFIG --weights FILE --input 'photos/*.jpg' --output results
    demo.py --config-file CONFIG --weights FILE --video-input film.mp4 --opts train.device=cpu

In instances_predictions.json, boxes are [x, y, width, height] in pixels of the image; category_id
is that of the data set's own JSON where the config's data set is known here, else the class index.
"""

import argparse
import glob
import json
import os
import sys
from pathlib import Path

from detectron2.structures import BoxMode
from PIL import Image

from smca.analysis import draw_instances
from smca.data import read_image
from smca.data.errors import DatasetError
from smca.errors import UserError, exit_code
from smca.inference import load_predictor

JSON_NAME = "instances_predictions.json"
_WRITABLE = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_VIDEO_SUFFIX = ".mp4"


def get_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="LazyConfig (.py, .yaml) or yacs (.yaml); not needed where the weights say it",
    )
    parser.add_argument("--weights", metavar="FILE", help="checkpoint of a trained detector")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="images, folders, glob patterns")
    source.add_argument("--video-input", metavar="FILE", help="a video that OpenCV reads")
    parser.add_argument(
        "--output",
        default=os.path.join("output", "predictions"),
        metavar="PATH",
        help="a folder, or for a single image or a video a file; default: %(default)s",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="lowest score of a detection, in [0, 1]; default: %(default)s",
    )
    parser.add_argument("--device", help="auto, cpu, cuda, ...; default: as the config says")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="overrides, the last option: key=value (of a yacs config: KEY VALUE)",
    )
    return parser


def main(argv=None):
    """
    Returns:
        int: the exit code, 1 if something could not be read.
    """
    return exit_code(run, get_parser().parse_args(argv))


def run(args):
    if not 0 <= args.confidence_threshold <= 1:
        raise UserError(
            f"--confidence-threshold {args.confidence_threshold:g} has to be in [0, 1]."
        )
    # What is wrong with the files should not take the time to build a model.
    if args.video_input:
        return run_on_video(args)
    return run_on_images(args)


# Images


def run_on_images(args):
    paths = find_images(args.input)
    outputs = output_paths(paths, args.output)
    predictor, _ = load_predictor(args.config_file, args.weights, args.opts, args.device)
    os.makedirs(os.path.dirname(outputs[0]) or ".", exist_ok=True)
    results, num_failed = [], 0
    for image_id, (path, output) in enumerate(zip(paths, outputs)):
        try:
            image = read_image(path)
        except DatasetError as error:
            print(f"Skipped: {error}", file=sys.stderr)
            num_failed += 1
            continue
        detections = confident(predictor(image), args.confidence_threshold)
        drawn = draw_instances(image, detections, predictor.class_names)
        Image.fromarray(drawn).save(output)
        results += to_coco(detections, predictor, file_name=path, image_id=image_id)
        print(f"{path}: {len(detections)} detections, drawn in {output}")
    json_file = os.path.join(os.path.dirname(outputs[0]), JSON_NAME)
    write_json(results, json_file)
    if num_failed:
        print(f"{num_failed} of {len(paths)} images could not be read.", file=sys.stderr)
    return 1 if num_failed else 0


def find_images(patterns):
    """
    Returns:
        list[str]: files in the order given, those of a folder or pattern by name.

    Raises:
        UserError: nothing is there.
    """
    image_suffixes = set(Image.registered_extensions())
    paths = []
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        if os.path.isfile(pattern):
            found = [pattern]
        elif os.path.isdir(pattern):
            found = sorted(str(path) for path in Path(pattern).iterdir() if path.is_file())
            found = [path for path in found if Path(path).suffix.lower() in image_suffixes]
            if not found:
                raise UserError(f"There is no image in the folder {pattern}.")
        else:
            found = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
            if not found:
                raise UserError(f"The input {pattern} does not exist: give an image or a folder.")
        paths += found
    return list(dict.fromkeys(paths))


def output_paths(paths, output):
    """
    Returns:
        list[str]: one file for each image: `output` itself, or a file in that folder with the
        image's name, made unique, and its type if that can be written, else .png.

    Raises:
        UserError: there are several images for one file, or an image would be overwritten.
    """
    if Path(output).suffix.lower() in _WRITABLE and not os.path.isdir(output):
        if len(paths) > 1:
            raise UserError(f"--output {output} is a file: give a folder for {len(paths)} images.")
        outputs = [output]
    else:
        outputs, taken = [], set()
        for path in paths:
            name = Path(path)
            suffix = name.suffix if name.suffix.lower() in _WRITABLE else ".png"
            candidate, number = name.stem + suffix, 1
            while candidate in taken:
                number += 1
                candidate = f"{name.stem}_{number}{suffix}"
            taken.add(candidate)
            outputs.append(os.path.join(output, candidate))
    sources = {os.path.realpath(path) for path in paths}
    for path in outputs:
        if os.path.realpath(path) in sources:
            raise UserError(f"--output would overwrite the input {path}: give another folder.")
    return outputs


# Video


def run_on_video(args):
    cv2 = import_cv2()
    if not os.path.isfile(args.video_input):
        raise UserError(f"The video {args.video_input} does not exist.")
    video = cv2.VideoCapture(args.video_input)
    is_readable, frame = video.read()
    if not is_readable:
        raise UserError(f"{args.video_input} is no video that OpenCV can read.")
    output = video_output_path(args.video_input, args.output)
    predictor, _ = load_predictor(args.config_file, args.weights, args.opts, args.device)
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
    frames_per_second = video.get(cv2.CAP_PROP_FPS)
    if not 0 < frames_per_second < 1000:  # which some files do not say
        frames_per_second = 25.0
    writer, results, index = None, [], 0
    while is_readable:
        image = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        detections = confident(predictor(image), args.confidence_threshold)
        drawn = even_sized(draw_instances(image, detections, predictor.class_names))
        if writer is None:
            codec, size = cv2.VideoWriter_fourcc(*"mp4v"), drawn.shape[1::-1]
            writer = cv2.VideoWriter(output, codec, frames_per_second, size)
            if not writer.isOpened():
                raise UserError(f"OpenCV cannot write {output}: is the folder writable?")
        writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
        results += to_coco(detections, predictor, file_name=args.video_input, image_id=index)
        index += 1
        is_readable, frame = video.read()
    writer.release()
    video.release()
    write_json(results, os.path.join(os.path.dirname(output), JSON_NAME))
    print(f"{args.video_input}: {index} frames, {len(results)} detections, drawn in {output}")
    return 0


def import_cv2():
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "Videos need OpenCV: run pip install opencv-python-headless (or install the extra "
            "'video' of this package)."
        ) from error
    return cv2


def video_output_path(path, output):
    if Path(output).suffix.lower() != _VIDEO_SUFFIX:
        if Path(output).suffix.lower() in _WRITABLE:
            raise UserError(f"--output {output} has to be a folder or a {_VIDEO_SUFFIX} file.")
        output = os.path.join(output, Path(path).stem + _VIDEO_SUFFIX)
    if os.path.realpath(output) == os.path.realpath(path):
        raise UserError(f"--output would overwrite the input {path}: give another folder.")
    return output


def even_sized(image):
    """Without the last row or column where their number is odd, which video codecs refuse."""
    height, width = image.shape[:2]
    return image[: max(2, height // 2 * 2), : max(2, width // 2 * 2)]


# Results


def confident(detections, threshold):
    return detections[detections.scores >= threshold]


def to_coco(detections, predictor, **image):
    """
    Returns:
        list[dict]: COCO-style results, with the given keys of the image in each.
    """
    boxes = detections.pred_boxes.tensor
    boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    return [
        {
            **image,
            "category_id": predictor.category_ids.get(index, index),
            "category_name": predictor.class_name(index),
            "bbox": box,
            "score": score,
        }
        for box, score, index in zip(
            boxes, detections.scores.tolist(), detections.pred_classes.tolist()
        )
    ]


def write_json(results, path):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    print(f"{len(results)} detections in {path}")


if __name__ == "__main__":
    sys.exit(main())

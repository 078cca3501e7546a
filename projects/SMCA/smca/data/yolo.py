"""YOLO folders as data sets in COCO's format."""

import functools
import math
import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Union

import yaml

from smca.errors import DatasetError

from .coco_checks import FAULT, SOURCE, Record, existing
from .convert import Content, convert, files_below, plain, read_list, read_text, size_record
from .mapper import PathLike

OneOrMore = Union[str, List[str]]


def yolo_images(data_yaml: PathLike, split: str) -> OneOrMore:
    """The image folder of a split ("train", "val", or another key) of a YOLO data set, of which
    `data_yaml` is the file; a list where the file has one. Images that a text file lists are below
    its folder."""
    return _of_each_path(data_yaml, split, _folder_of)


def _folder_of(path: str) -> str:
    return os.path.dirname(path) if os.path.isfile(path) else path


def _of_each_path(data_yaml: PathLike, split: str, function: Callable[[str], str]) -> OneOrMore:
    """What a function gives for the folder of a split or for the text file that lists its images,
    or for each of several."""
    file = Path(data_yaml).expanduser().absolute()
    content = _read_yaml(file)
    # CVAT's keys are Train and Validation.
    splits = {key.lower(): value for key, value in content.items()}
    splits["val"] = splits.get("val", splits.get("validation"))
    folders = splits.get(split)
    if not folders or isinstance(folders, dict):
        raise DatasetError(f"{file} has no '{split}': add the folder of its images, or a list.")
    root = file.parent / str(content.get("path") or "")
    if isinstance(folders, str):
        return function(_yolo_path(file, root, folders))
    return [function(_yolo_path(file, root, str(folder))) for folder in folders]


def _read_yaml(file: Path) -> Dict[str, Any]:
    existing(file, os.path.isfile, "file")
    try:
        # All values stay the texts that they are: a class may be called "no" or "null".
        content = yaml.load(read_text(file), Loader=yaml.BaseLoader)  # noqa: S506
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{file} cannot be read as YAML ({reason}): correct it.") from error
    if not isinstance(content, dict) or not content.get("names"):
        raise DatasetError(f"{file} has no 'names': add the names of the classes.")
    names = content["names"]
    if isinstance(names, dict):
        names = [names.get(str(number)) for number in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DatasetError(
            f"{file} has 'names' that are no list of names: write [dog, cat], or number them from "
            "0 without gaps."
        )
    if len(set(names)) < len(names):
        raise DatasetError(f"{file} has a name twice in 'names': give each class its own.")
    if content.get("nc", str(len(names))) != str(len(names)):
        raise DatasetError(
            f"{file} has nc {content['nc']}, but {len(names)} 'names': make them agree."
        )
    return {**content, "names": names}


def _yolo_path(file: Path, root: Path, folder: str) -> str:
    # Exports write ../train/images for what lies beside the file, or C:\data\train\images.
    folder = folder.replace("\\", "/")
    parts = [] if folder.startswith("/") else folder.split("/")
    shorter = ["/".join(parts[start:]) for start in range(1, len(parts) - 1)]
    beside = [folder, folder.removeprefix("../"), *shorter]
    candidates = [root / folder, *(file.parent / path for path in beside)]
    for candidate in candidates:
        if candidate.exists():
            return os.path.abspath(candidate)
    raise DatasetError(f"The image folder {candidates[0]} of {file} does not exist: correct it.")


def _yolo_labels(path: str) -> str:
    """``path`` with ``labels`` in place of its last folder named ``images``."""
    parts = path.split(os.sep)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return os.sep.join(parts)


def coco_from_yolo(data_yaml: PathLike, split: str) -> OneOrMore:
    """Convert a split of a YOLO data set, see `yolo_images`. An image without a label file has no
    objects. Boxes are relative to the upright image.

    Returns:
        The COCO JSON, or a list with one for each path of the split. It has the categories
        1, 2, ... in the order of ``names``.
    """
    file = Path(data_yaml).expanduser().absolute()
    content = _read_yaml(file)
    names, shape = content["names"], content.get("kpt_shape", ["0"])
    try:
        num_keypoint_values = math.prod(map(int, shape))
    except (TypeError, ValueError) as error:
        raise DatasetError(
            f"{file} has kpt_shape {shape}: write the number of keypoints and of their values, "
            "[17, 3], or remove it."
        ) from error
    read = functools.partial(_read_yolo, names=names, num_keypoint_values=num_keypoint_values)

    def convert_one(path: str) -> str:
        images, lines = _folder_of(path), None
        if images != path:
            listed = (line.replace("\\", "/") for line in read_list(Path(path)))
            lines = [os.path.relpath(os.path.join(images, line), images) for line in listed]
        labels = _yolo_labels(images)
        stems = functools.partial(_stems, images=images, labels=labels)
        # The folder of labels need not exist.
        files = {**files_below(images, ".txt"), **files_below(labels, ".txt")}
        files = {path: each for path, each in files.items() if Path(path).name != "classes.txt"}
        if lines is not None:  # its folder may have any other text, such as a training's log
            images_below = [path for path in files_below(images) if path not in files]
            known = {plain(stem) for path in images_below for stem in stems(path)}
            files = {p: each for p, each in files.items() if plain(os.path.splitext(p)[0]) in known}
        return convert(images, labels, files, stems, lines, read, names, num_keypoint_values)

    return _of_each_path(file, split, convert_one)


def _stems(image: str, images: str, labels: str) -> Iterable[str]:
    """Where an image's label file may be, without suffix."""
    folder, name = os.path.split(os.path.splitext(image)[0])
    below = os.path.join(labels, os.path.relpath(folder, images))
    return [os.path.normpath(f"{each}/{name}") for each in (_yolo_labels(folder), below, folder)]


def _read_yolo(
    image: str, label: Optional[str], names: Sequence[str], num_keypoint_values: int
) -> Content:
    record = size_record(image)
    if label is None or FAULT in record:
        return record, []
    record[SOURCE] = label
    try:
        lines = read_text(label).splitlines()
    except (OSError, ValueError) as error:
        return record, [{SOURCE: label, FAULT: f"cannot be read ({error}); correct it."}]
    objects = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found = _yolo_object(line, names, num_keypoint_values, record)
            objects.append({SOURCE: f"{label} line {number}", **found})
    return record, objects


def _yolo_object(
    line: str, names: Sequence[str], num_keypoint_values: int, image: Record
) -> Record:
    """An object's name and its box in pixels, or what is wrong with its line."""
    text = f"is '{line.strip()[:60]}', "
    fault = (
        "which has to be the number of a class and 4 numbers of a box, or the points of a polygon, "
        "relative to the image, from 0 to 1 (keypoints need kpt_shape in data.yaml); correct or "
        "remove it."
    )
    try:
        label, *values = map(float, line.split())
    except ValueError:
        return {FAULT: text + fault}
    if not label.is_integer() or not 0 <= label < len(names):
        return {
            FAULT: f"{text}but the classes are numbered from 0 to {len(names) - 1}; correct the "
            "line, or add the class to 'names'."
        }
    bounds = [math.nan]
    if len(values) in (4, 5, 4 + num_keypoint_values):  # the fifth: a score or a track
        x, y, width, height = values[:4]
        bounds = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    elif len(values) >= 6:  # a polygon, with a score if the number is odd
        xs, ys = values[: len(values) // 2 * 2 : 2], values[1::2]
        bounds = [min(xs), min(ys), max(xs), max(ys)]
        if -1 < min(bounds) and max(bounds) < 2:  # a rotated box may reach beyond the image
            bounds = [min(max(value, 0.0), 1.0) for value in bounds]
    # Six numbers may be a box with a score and a track as well, which is no coordinate.
    if not all(map(math.isfinite, values)) or not max(map(abs, bounds)) < 2:
        return {FAULT: text + fault}
    left, top, right, bottom = bounds
    scale_x, scale_y = image["width"], image["height"]
    box = [left * scale_x, top * scale_y, (right - left) * scale_x, (bottom - top) * scale_y]
    return {"name": names[int(label)], "bbox": box}

"""What makes a data set in COCO's format unusable: every rule, with the sentence that says it."""

import json
import logging
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from .errors import DatasetError
from .mapper import check_image

__all__ = [
    "Problem",
    "category_problems",
    "decode_all",
    "existing",
    "file_problems",
    "raise_problems",
    "read_coco",
    "record_problems",
]

logger = logging.getLogger(__name__)

PathLike = Union[str, Path]
Record = Dict[str, Any]  # an image, category or annotation of the JSON
Rule = Tuple[str, str]  # (kind, predicate of the sentence) of what is wrong

# Boxes drawn by hand or rounded often end a pixel beyond the image; they are clipped.
_BORDER_TOLERANCE = 2  # pixels
_NUM_PROBLEMS_SHOWN = 5

# Keys that a record must have, and their types.
_IMAGE_KEYS = {"id": int, "file_name": str, "height": int, "width": int}
_CATEGORY_KEYS = {"id": int, "name": str}
_ANNOTATION_KEYS = {"image_id": int, "category_id": int, "bbox": list}
_TYPE_NAMES = {int: "a whole number", str: "a text", list: "a list"}


class Problem(NamedTuple):
    """Something that makes a data set unusable.

    Attributes:
        kind: the rule that is broken, the same text for all that break it.
        message: one sentence that names the image, category or annotation and says what to do.
        record: of the JSON, or the whole list where it is empty.
    """

    kind: str
    message: str
    record: Any


def existing(path: Optional[PathLike], exists: Callable[[str], bool], kind: str) -> str:
    """Absolute path of something that exists."""
    if not path:
        raise DatasetError(f"The data set has no {kind}: give its path in the config.")
    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if not exists(path):
        raise DatasetError(f"The {kind} {path} does not exist: correct the path.")
    return path


def read_coco(json_file: PathLike) -> Dict[str, Any]:
    """A COCO JSON.

    Returns:
        Its content, with the lists ``images``, ``annotations`` and ``categories``,
        whose records :func:`record_problems` checks.

    Raises:
        DatasetError: it is missing, not JSON or lacks one of the lists.
    """
    json_file = existing(json_file, os.path.isfile, "annotation file")
    try:
        with open(json_file, encoding="utf-8") as file:
            data = json.load(file)
    except ValueError as error:  # not JSON, or not UTF-8
        raise DatasetError(
            f"{json_file} is not a JSON file ({error}): write it again, it may be cut off."
        ) from error
    keys = ("images", "annotations", "categories")
    if not isinstance(data, dict):
        raise DatasetError(
            f"{json_file} is not in COCO's format: it must hold an object with the keys "
            "'images', 'annotations' and 'categories'."
        )
    missing = [key for key in keys if not isinstance(data.get(key), list)]
    if missing:
        raise DatasetError(
            f"{json_file} is not in COCO's format: it lacks the list "
            + " and the list ".join(f"'{key}'" for key in missing)
            + "; add it."
        )
    return data


def record_problems(data: Mapping[str, Any]) -> List[Problem]:
    """All that is wrong with the records; files apart.

    Args:
        data: as of `read_coco`.
    """
    images, categories = data["images"], data["categories"]
    valid_images = [image for image in images if not _record_problem(image, _IMAGE_KEYS)]
    return [
        *category_problems(categories),
        *_image_problems(images),
        *_annotation_problems(data["annotations"], valid_images, categories),
    ]


def raise_problems(json_file: PathLike, problems: Sequence[Problem]) -> None:
    """
    Raises:
        DatasetError: there are problems; says how many, and the first ones.
    """
    if not problems:
        return
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    shown = "".join(f"\n  {problem.message}" for problem in problems[:_NUM_PROBLEMS_SHOWN])
    more = "\n  ..." if len(problems) > _NUM_PROBLEMS_SHOWN else ""
    raise DatasetError(f"{count} in {json_file}:{shown}{more}")


def _record_problem(record: Any, keys: Mapping[str, type]) -> Optional[Rule]:
    """What is wrong with the keys of an image, category or annotation, as (kind, predicate), or
    None."""
    if not isinstance(record, dict):
        text = f"is {json.dumps(record)[:40]}, not an object; correct or remove it."
        return "not an object", text
    for key, type_ in keys.items():
        if key not in record:
            return f"no '{key}'", f"has no '{key}'; add it."
        if not isinstance(record[key], type_):
            name = _TYPE_NAMES[type_]
            text = f"has {key} {record[key]!r}, which must be {name}; correct it."
            return f"{key} is not {name}", text
    return None


def _label(kind: str, index: int, record: Any) -> str:
    """How messages name a record: by its id, and by its index in the file where it has none."""
    if not isinstance(record, dict) or "id" not in record:
        return f"{kind} at index {index}"
    if isinstance(record.get("file_name"), str):
        return f"{kind} {record['id']} ('{record['file_name']}')"
    if "image_id" in record:
        return f"{kind} {record['id']} (of image {record['image_id']})"
    return f"{kind} {record['id']}"


def _list_problems(kind: str, records: Sequence[Any], keys: Mapping[str, type]) -> List[Problem]:
    """Missing keys, wrong types and repeated ids."""
    problems, seen = [], set()
    for index, record in enumerate(records):
        problem = _record_problem(record, keys)
        if problem is None and record.get("id") is not None:  # annotations can do without
            if not isinstance(record["id"], int):
                text = "has an id that is not a whole number; correct it."
                problem = "id is not a whole number", text
            elif record["id"] in seen:
                problem = "repeated id", f"has the id of an earlier {kind}; make ids unique."
            else:
                seen.add(record["id"])
        if problem is not None:
            problems.append(_problem(kind, index, record, *problem))
    return problems


def _problem(kind: str, index: int, record: Any, rule: str, text: str) -> Problem:
    return Problem(f"{kind}: {rule}", f"{_label(kind, index, record)} {text}", record)


def category_problems(categories: Sequence[Any]) -> List[Problem]:
    """What is wrong with the categories."""
    if not categories:
        text = "'categories' is empty; add the classes."
        return [Problem("no categories", text, categories)]
    problems, seen = _list_problems("category", categories, _CATEGORY_KEYS), set()
    for index, category in enumerate(categories):
        if _record_problem(category, _CATEGORY_KEYS) is None:
            if category["name"] in seen:  # results are listed by name
                text = f"has the name '{category['name']}' of an earlier one; make names unique."
                problems.append(_problem("category", index, category, "repeated name", text))
            seen.add(category["name"])
    return problems


def _image_problems(images: Sequence[Any]) -> List[Problem]:
    if not images:
        return [Problem("no images", "'images' is empty; add the images.", images)]
    problems = _list_problems("image", images, _IMAGE_KEYS)
    for index, image in enumerate(images):
        if _record_problem(image, _IMAGE_KEYS) is None and min(image["height"], image["width"]) < 1:
            size = f"{image['width']} x {image['height']}"
            text = f"has the size {size}; correct it."
            problems.append(_problem("image", index, image, "size is not positive", text))
    return problems


def _annotation_problems(
    annotations: Sequence[Any], images: Sequence[Record], categories: Sequence[Any]
) -> List[Problem]:
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    category_ids = {c["id"] for c in categories if not _record_problem(c, _CATEGORY_KEYS)}
    problems = _list_problems("annotation", annotations, _ANNOTATION_KEYS)
    for index, annotation in enumerate(annotations):
        if _record_problem(annotation, _ANNOTATION_KEYS) is not None:
            continue
        if annotation["image_id"] not in sizes:
            text = "has an image_id that no image has; correct or remove it."
            problem: Optional[Rule] = ("unknown image_id", text)
        elif annotation["category_id"] not in category_ids:
            text = (
                f"has category_id {annotation['category_id']}, which no category has; add the "
                "category, or correct or remove the annotation."
            )
            problem = "unknown category_id", text
        elif annotation.get("ignore"):
            text = "has 'ignore' set, which is not supported; use 'iscrowd' or remove it."
            problem = "'ignore' is set", text
        elif annotation.get("iscrowd") not in (None, 0, 1):
            text = f"has iscrowd {annotation['iscrowd']!r}, which must be 0 or 1; correct it."
            problem = "iscrowd is not 0 or 1", text
        elif not _is_number(annotation.get("area", 0)) and annotation["area"] is not None:
            text = f"has area {annotation['area']!r}, which must be a number; correct or remove it."
            problem = "area is not a number", text
        else:
            problem = _box_problem(annotation["bbox"], *sizes[annotation["image_id"]])
        if problem is not None:
            problems.append(_problem("annotation", index, annotation, *problem))
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _box_problem(bbox: Sequence[Any], height: int, width: int) -> Optional[Rule]:
    """What is wrong with an [x, y, width, height] box in an image of that size, as (kind,
    predicate), or None."""
    if len(bbox) != 4 or not all(map(_is_number, bbox)):
        text = f"has bbox {bbox}, which must be 4 numbers; correct or remove it."
        return "bbox is not 4 numbers", text
    if not all(math.isfinite(v) for v in bbox):
        text = f"has bbox {bbox}, which is not finite; correct or remove it."
        return "bbox is not finite", text
    x, y, box_width, box_height = bbox
    if box_width <= 0 or box_height <= 0:
        text = f"has bbox {bbox}, whose width or height is not positive; correct or remove it."
        return "bbox without area", text
    tolerance = _BORDER_TOLERANCE
    within = (
        min(x, y) >= -tolerance
        and x + box_width <= width + tolerance
        and y + box_height <= height + tolerance
    )
    overlaps = x < width and y < height and x + box_width > 0 and y + box_height > 0
    if not (within and overlaps):
        text = (
            f"has bbox {bbox}, which lies outside its image of {width} x {height} pixels; "
            "correct or remove it."
        )
        return "bbox outside the image", text
    return None


def file_problems(images: Collection[Record], image_root: PathLike) -> Iterator[Optional[Problem]]:
    """Decode all images in a few threads.

    Args:
        images: of a COCO JSON, without problems of their own.
        image_root: the folder that ``file_name`` is relative to.

    Yields:
        For each image its problem, or None.
    """

    def problem(image: Record) -> Optional[Problem]:
        path = os.path.join(image_root, image["file_name"])
        try:
            check_image(path, image["height"], image["width"])
        except DatasetError as error:
            is_there = os.path.isfile(path)
            rule = "file unreadable or of another size" if is_there else "file missing"
            return Problem(f"image: {rule}", f"image {image['id']}: {error}", image)
        return None

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        yield from pool.map(problem, images)


def decode_all(
    images: Collection[Record], json_file: PathLike, image_root: PathLike
) -> List[Problem]:
    """The problems of all image files of a JSON."""
    start = time.perf_counter()
    problems = [found for found in file_problems(images, image_root) if found is not None]
    seconds = time.perf_counter() - start
    logger.info("Checked the %d images of %s in %.1f s.", len(images), json_file, seconds)
    return problems

"""What makes a data set in COCO's format unusable: every rule, with the sentence that says it."""

import functools
import json
import logging
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
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
    Set,
    Tuple,
    Union,
)

from .errors import DatasetError
from .mapper import PathLike, check_image

__all__ = [
    "FAULT",
    "REMARKS",
    "SOURCE",
    "WRITTEN",
    "Problem",
    "category_problems",
    "decode_all",
    "existing",
    "file_problems",
    "forget_files",
    "raise_problems",
    "read_coco",
    "record_problems",
    "remarks_on",
    "source_of",
    "written_id",
]

logger = logging.getLogger(__name__)

Record = Dict[str, Any]  # an image, category or annotation of the JSON
Rule = Tuple[str, str]  # (kind, predicate of the sentence) of what is wrong

# Boxes drawn by hand or rounded often end a pixel beyond the image; they are clipped.
_BORDER_TOLERANCE = 2  # pixels
_NUM_PROBLEMS_SHOWN = 5

# Keys that the conversion of other formats adds: of an image or annotation, the file and line that
# it comes from and what is wrong there; of "info", the folder of the labels and remarks on it.
SOURCE, FAULT, REMARKS = "smca_source", "smca_fault", "smca_remarks"
# In a record whose numbers are texts or floats in the file: these, by their keys.
WRITTEN = "smca_written"

_LFS_POINTER = b"version https://git-lfs"
_COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ")  # gzip, zip, bzip2, xz
_HUGE = 1e15  # a number of pixels that is as good as infinite
_MAX_AREA = 1e10  # in square pixels; pycocotools evaluates no larger objects

# Keys that a record must have, and their types.
_ID = (int, str)
_IMAGE_KEYS = {"id": _ID, "file_name": str, "height": int, "width": int}
_CATEGORY_KEYS = {"id": _ID, "name": str}
_ANNOTATION_KEYS = {"image_id": _ID, "category_id": _ID, "bbox": list}
_TYPE_NAMES = {
    int: "a whole number",
    str: "a text",
    list: "a list",
    _ID: "a whole number or a text",
}
_NUMBERS = {
    "images": ("id", "height", "width"),
    "annotations": ("image_id", "category_id"),
    "categories": ("id",),
}


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
        found = "is a folder" if os.path.isdir(path) else "is a file"
        what = found if os.path.exists(path) else "does not exist"
        raise DatasetError(f"The {kind} {path} {what}: correct the path.")
    return path


@functools.lru_cache(maxsize=4)
def _parse(json_file: str, mtime_ns: int, size: int) -> Any:
    """`mtime_ns` and `size` make a changed file another key of the cache."""
    with open(json_file, "rb") as file:
        data = json.loads(file.read())  # UTF-8, -16 or -32, with a byte order mark or without
    for kind, keys in _NUMBERS.items():
        records = data.get(kind) if isinstance(data, dict) else None
        for record in records if isinstance(records, list) else ():
            for key in keys if isinstance(record, dict) else ():
                value = record.get(key)
                if isinstance(value, (str, float)):
                    record[key] = _whole_number(value)
                    record[WRITTEN] = {**record.get(WRITTEN, {}), key: value}
    return data


def _whole_number(value: Union[str, float]) -> Union[str, float]:
    """A whole number that is written as "7", "007" or 7.0; any other value as it is."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    return int(value) if re.fullmatch(r"[+-]?[0-9]{1,99}", value) else value


def written_id(record: Record) -> Union[int, str]:
    """The id of an image or category as its file has it; of a float, the whole number."""
    written = record.get(WRITTEN, {}).get("id")
    return written if isinstance(written, str) else record["id"]


def _why_unreadable(error: Exception) -> str:
    content = getattr(error, "object", b"") or getattr(error, "doc", "").encode()
    if isinstance(error, OSError):
        return f"cannot be opened ({error.strerror}): correct its permissions."
    if content.startswith(_COMPRESSED):
        return "is a compressed file: unpack it."
    if content.startswith(_LFS_POINTER):
        return "is only a pointer of Git LFS: run git lfs pull."
    if isinstance(error, UnicodeDecodeError):
        return f"is not a JSON file in UTF-8 ({error}): write it again with this encoding."
    return f"is not a JSON file ({error}): export it again, it may be cut off."


def forget_files() -> None:
    """Free the memory of the files that :func:`read_coco` has read."""
    _parse.cache_clear()


def read_coco(json_file: PathLike) -> Dict[str, Any]:
    """A COCO JSON, read once as long as it does not change (until :func:`forget_files`).

    Returns:
        Its content, which callers do not change, with the lists ``images``, ``annotations`` and
        ``categories``, whose records :func:`record_problems` checks. Ids and sizes that are whole
        numbers written as texts or floats ("007", 7.0) are numbers; other texts stay ids.

    Raises:
        DatasetError: it is missing, not JSON or lacks one of the lists.
    """
    json_file = existing(json_file, os.path.isfile, "annotation file")
    try:
        status = os.stat(json_file)
        data = _parse(json_file, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{json_file} {_why_unreadable(error)}") from error
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
    images, annotations, categories = (data[key] for key in ("images", "annotations", "categories"))
    return [
        *category_problems(categories),
        *_image_problems(images),
        *_annotation_problems(annotations, images, categories),
        *_crowd_problems(annotations),
    ]


def source_of(data: Mapping[str, Any], json_file: PathLike) -> str:
    """What messages call a COCO JSON: its path, or that of the folder it was converted from."""
    info = data.get("info")
    return str(info.get(SOURCE, json_file)) if isinstance(info, dict) else str(json_file)


def remarks_on(data: Mapping[str, Any], json_file: PathLike) -> List[str]:
    """What does not keep a COCO JSON from being used, but has to be said: what its conversion left
    out, and that it has no objects."""
    info = data.get("info")
    found = list(info.get(REMARKS, [])) if isinstance(info, dict) else []
    if not data["annotations"]:
        found.append(
            f"{source_of(data, json_file)} has no objects: there is nothing to train on, and as "
            "validation data it gives no AP and no model_best.pth. Add its annotations."
        )
    return found


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


def _record_problem(record: Any, keys: Mapping[str, Any]) -> Optional[Rule]:
    """What is wrong with the keys of an image, category or annotation, as (kind, predicate), or
    None."""
    if not isinstance(record, dict):
        text = f"is {json.dumps(record)[:40]}, not an object; correct or remove it."
        return "not an object", text
    if FAULT in record:
        return "cannot be read", record[FAULT]
    for key, type_ in keys.items():
        if key not in record:
            return f"no '{key}'", f"has no '{key}'; add it."
        if not isinstance(record[key], type_) or isinstance(record[key], bool):
            name = _TYPE_NAMES[type_]
            text = f"has {key} {record[key]!r}, which must be {name}; correct it."
            return f"{key} is not {name}", text
    return None


def _label(kind: str, index: int, record: Any) -> str:
    """How messages name a record: by the label file that it comes from, by its id, or by its index
    in the file where it has none."""
    if isinstance(record, dict) and SOURCE in record:
        return str(record[SOURCE])
    if not isinstance(record, dict) or "id" not in record:
        return f"{kind} at index {index}"
    if isinstance(record.get("file_name"), str):
        return f"{kind} {written_id(record)} ('{record['file_name']}')"
    if "image_id" in record:
        return f"{kind} {record['id']} (of image {record['image_id']})"
    return f"{kind} {written_id(record)}"


def _list_problems(kind: str, records: Sequence[Any], keys: Mapping[str, Any]) -> List[Problem]:
    """Missing keys, wrong types and repeated ids."""
    problems, seen = [], set()
    for index, record in enumerate(records):
        problem = _record_problem(record, keys)
        # Annotations can do without an id, and one that is no number is not used.
        if problem is None and isinstance(record.get("id"), keys.get("id", int)):
            if record["id"] in seen:
                problem = "repeated id", f"has the id of an earlier {kind}; make ids unique."
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
            name = category["name"]
            if name in seen:  # results are listed by name
                text = f"has the name '{name}' of an earlier one; make names unique."
                problems.append(_problem("category", index, category, "repeated name", text))
            if name != name.encode("utf-8", "replace").decode():
                text = f"has the name {name!r}, which is no Unicode text; correct it."
                problems.append(_problem("category", index, category, "name is no text", text))
            seen.add(name)
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
    annotations: Sequence[Any], images: Sequence[Any], categories: Sequence[Any]
) -> List[Problem]:
    # Where a record itself is at fault, its annotations may be good.
    image_ids, category_ids = _ids(images), _ids(categories)
    sizes = {
        image["id"]: (image["height"], image["width"])
        for image in images
        if _record_problem(image, _IMAGE_KEYS) is None
    }
    problems = _list_problems("annotation", annotations, _ANNOTATION_KEYS)
    relative = []  # indices of boxes that seem to be so
    for index, annotation in enumerate(annotations):
        if _record_problem(annotation, _ANNOTATION_KEYS) is not None:
            continue
        problem = _reference_problem(annotation, image_ids, category_ids)
        size = sizes.get(annotation["image_id"])
        problem = problem or _box_problem(annotation["bbox"], size) or _number_problem(annotation)
        if problem is not None:
            problems.append(_problem("annotation", index, annotation, *problem))
        elif max(map(abs, annotation["bbox"])) <= 1 < max(size or (2, 2)):
            relative.append(index)
    # A pixel in the corner is no fault by itself.
    boxes = [annotations[index]["bbox"] for index in relative]
    if len(boxes) == len(annotations) or any(value % 1 for box in boxes for value in box):
        for index, box in zip(relative, boxes):
            text = (
                f"has bbox {box}, relative to its image; multiply x and width by the width of the "
                "image in pixels, y and height by its height."
            )
            rule = "bbox from 0 to 1"
            problems.append(_problem("annotation", index, annotations[index], rule, text))
    return problems


def _ids(records: Sequence[Any]) -> Optional[Set[Union[int, str]]]:
    """None where a record has no valid id, so that it may be any."""
    ids = {r["id"] for r in records if isinstance(r, dict) and isinstance(r.get("id"), _ID)}
    return ids if len(ids) == len(records) else None


def _reference_problem(
    annotation: Record,
    image_ids: Optional[Set[Union[int, str]]],
    category_ids: Optional[Set[Union[int, str]]],
) -> Optional[Rule]:
    if image_ids is not None and annotation["image_id"] not in image_ids:
        return "unknown image_id", "has an image_id that no image has; correct or remove it."
    if category_ids is not None and annotation["category_id"] not in category_ids:
        text = (
            f"has category_id {annotation['category_id']}, which no category has; add the "
            "category, or correct or remove the annotation."
        )
        return "unknown category_id", text
    return None


def _number_problem(annotation: Record) -> Optional[Rule]:
    """What is wrong with the numbers that are not of the box."""
    area = annotation.get("area")
    if annotation.get("ignore"):
        text = "has 'ignore' set, which is not supported; use 'iscrowd' or remove it."
        return "'ignore' is set", text
    if annotation.get("iscrowd") not in (None, 0, 1):
        text = f"has iscrowd {annotation['iscrowd']!r}, which must be 0 or 1; correct it."
        return "iscrowd is not 0 or 1", text
    if area is not None and not _is_number(area):
        text = f"has area {area!r}, which must be a number; correct or remove it."
        return "area is not a number", text
    if area is not None and not 0 <= area <= _MAX_AREA:  # nor is it NaN
        text = f"has area {area}, which must be from 0 to {_MAX_AREA:g}; correct or remove it."
        return "area is negative, too large or not finite", text
    return None


def _crowd_problems(annotations: Sequence[Any]) -> List[Problem]:
    if not annotations or not all(
        isinstance(a, dict) and a.get("iscrowd") == 1 for a in annotations
    ):
        return []
    text = (
        f"all {len(annotations)} annotations have iscrowd 1, which marks crowds: they are neither "
        "trained on nor evaluated; set it to 0 for single objects."
    )
    return [Problem("all annotations are crowds", text, annotations)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _box_problem(bbox: Sequence[Any], size: Optional[Tuple[int, int]]) -> Optional[Rule]:
    """What is wrong with an [x, y, width, height] box in an image of that (height, width), as
    (kind, predicate), or None."""
    if len(bbox) != 4 or not all(map(_is_number, bbox)):
        text = f"has bbox {bbox}, which must be 4 numbers; correct or remove it."
        return "bbox is not 4 numbers", text
    if not all(abs(v) < _HUGE for v in bbox):
        text = f"has bbox {bbox}, which is not finite; correct or remove it."
        return "bbox is not finite", text
    x, y, box_width, box_height = bbox
    if box_width <= 0 or box_height <= 0:
        text = f"has bbox {bbox}, whose width or height is not positive; correct or remove it."
        return "bbox without area", text
    if size is None or min(size) < 1:
        return None
    height, width = size
    tolerance = _BORDER_TOLERANCE
    within = (
        min(x, y) >= -tolerance
        and x + box_width <= width + tolerance
        and y + box_height <= height + tolerance
    )
    overlaps = x < width and y < height and x + box_width > 0 and y + box_height > 0
    if not (within and overlaps):
        form = "[x, y, width, height]"
        if x < box_width <= width and y < box_height <= height:
            form += ", not [x1, y1, x2, y2]"
        text = (
            f"has bbox {bbox}, which lies outside its image of {width} x {height} pixels; "
            f"correct it ({form}) or remove it."
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
            name = image.get(SOURCE) or f"image {written_id(image)}"
            hint = "" if is_there else _path_hint(image["file_name"])
            return Problem(f"image: {rule}", f"{name}: {error}{hint}", image)
        return None

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        yield from pool.map(problem, images)


def _path_hint(file_name: str) -> str:
    if "://" in file_name:
        return " (file_name is a URL: download the images, and write their paths.)"
    return " (Write file_name with / in place of \\.)" if "\\" in file_name else ""


def decode_all(
    images: Collection[Record], json_file: PathLike, image_root: PathLike
) -> List[Problem]:
    """The problems of all image files of a JSON."""
    start = time.perf_counter()
    problems = [found for found in file_problems(images, image_root) if found is not None]
    seconds = time.perf_counter() - start
    logger.info("Checked the %d images of %s in %.1f s.", len(images), json_file, seconds)
    return problems

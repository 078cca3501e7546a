"""Reading COCO JSONs, and what makes them unusable: every rule, with the sentence that says it."""

import functools
import json
import os
import re
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
    "existing",
    "file_problems",
    "forget_files",
    "in_threads",
    "raise_problems",
    "read_coco",
    "record_problems",
    "remarks_on",
    "source_of",
    "written_id",
]

Record = Dict[str, Any]  # an image, category or annotation of the JSON
Rule = Tuple[str, str]  # what is wrong: its kind, and the predicate of the sentence

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


def in_threads(function: Callable[..., Any], *items: Collection[Any]) -> Iterator[Any]:
    """`map` in a few threads."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, *items)


@functools.lru_cache(maxsize=16)
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
    if not isinstance(data, dict):
        raise DatasetError(
            f"{json_file} is not in COCO's format: it must hold an object with the keys "
            "'images', 'annotations' and 'categories'."
        )
    missing = [f"the list '{key}'" for key in _NUMBERS if not isinstance(data.get(key), list)]
    if missing:
        text = f"{json_file} is not in COCO's format: it lacks {' and '.join(missing)}; add it."
        raise DatasetError(text)
    return data


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


def record_problems(data: Mapping[str, Any]) -> List[Problem]:
    """All that is wrong with the records of a JSON from :func:`read_coco`; files are not read."""
    images, annotations, categories = (data[key] for key in ("images", "annotations", "categories"))
    problems = category_problems(categories) + _image_problems(images)
    problems += _annotation_problems(annotations, images, categories)
    if annotations and all(isinstance(a, dict) and a.get("iscrowd") == 1 for a in annotations):
        text = (
            f"all {len(annotations)} annotations have iscrowd 1, which marks crowds: they are "
            "neither trained on nor evaluated; set it to 0 for single objects."
        )
        problems.append(Problem("all annotations are crowds", text, annotations))
    return problems


def _problems(
    kind: str,
    records: Sequence[Any],
    keys: Mapping[str, Any],
    rule: Callable[[Record], Optional[Rule]],
) -> List[Problem]:
    """Missing keys, wrong types, repeated ids, and what `rule` says of a record with good keys."""
    problems, ids = [], set()
    for index, record in enumerate(records):
        found = _key_problem(record, keys)
        # Annotations can do without an id, and one that is no number is not used.
        if found is None and isinstance(record.get("id"), keys.get("id", int)):
            if record["id"] in ids:
                found = "repeated id", f"has the id of an earlier {kind}; make ids unique."
            ids.add(record["id"])
        found = found or rule(record)
        if found is not None:
            message = f"{_label(kind, index, record)} {found[1]}"
            problems.append(Problem(f"{kind}: {found[0]}", message, record))
    return problems


def _key_problem(record: Any, keys: Mapping[str, Any]) -> Optional[Rule]:
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
    more = ""
    if isinstance(record.get("file_name"), str):
        more = f" ('{record['file_name']}')"
    elif "image_id" in record:
        more = f" (of image {record['image_id']})"
    return f"{kind} {written_id(record)}{more}"


def category_problems(categories: Sequence[Any]) -> List[Problem]:
    """What is wrong with the categories."""
    names = set()

    def rule(category: Record) -> Optional[Rule]:
        name = category["name"]
        if name in names:  # results are listed by name
            return "repeated name", f"has the name '{name}' of an earlier one; make names unique."
        names.add(name)
        if name != name.encode("utf-8", "replace").decode():
            return (
                "name is no text",
                f"has the name {name!r}, which is no Unicode text; correct it.",
            )
        return None

    if not categories:
        text = "'categories' is empty; add the classes."
        return [Problem("no categories", text, categories)]
    return _problems("category", categories, _CATEGORY_KEYS, rule)


def _image_problems(images: Sequence[Any]) -> List[Problem]:
    def rule(image: Record) -> Optional[Rule]:
        if min(image["height"], image["width"]) >= 1:
            return None
        size = f"{image['width']} x {image['height']}"
        return "size is not positive", f"has the size {size}; correct it."

    if not images:
        return [Problem("no images", "'images' is empty; add the images.", images)]
    return _problems("image", images, _IMAGE_KEYS, rule)


def _annotation_problems(
    annotations: Sequence[Any], images: Sequence[Any], categories: Sequence[Any]
) -> List[Problem]:
    image_ids, category_ids = _ids(images), _ids(categories)
    sizes = {
        image["id"]: (image["height"], image["width"])
        for image in images
        if _key_problem(image, _IMAGE_KEYS) is None
    }
    relative = []  # annotations whose boxes seem to be so

    def rule(annotation: Record) -> Optional[Rule]:
        if image_ids is not None and annotation["image_id"] not in image_ids:
            return "unknown image_id", "has an image_id that no image has; correct or remove it."
        if category_ids is not None and annotation["category_id"] not in category_ids:
            text = (
                f"has category_id {annotation['category_id']}, which no category has; add the "
                "category, or correct or remove the annotation."
            )
            return "unknown category_id", text
        size = sizes.get(annotation["image_id"])
        found = _box_problem(annotation["bbox"], size) or _number_problem(annotation)
        if found is None and max(map(abs, annotation["bbox"])) <= 1 < max(size or (2, 2)):
            relative.append(annotation)
        return found

    problems = _problems("annotation", annotations, _ANNOTATION_KEYS, rule)
    # A pixel in the corner is no fault by itself.
    if len(relative) == len(annotations) or any(v % 1 for each in relative for v in each["bbox"]):
        chosen = set(map(id, relative))
        for index, annotation in enumerate(annotations):
            if id(annotation) in chosen:
                text = (
                    f"{_label('annotation', index, annotation)} has bbox {annotation['bbox']}, "
                    "relative to its image; multiply x and width by the width of the image in "
                    "pixels, y and height by its height."
                )
                problems.append(Problem("annotation: bbox from 0 to 1", text, annotation))
    return problems


def _ids(records: Sequence[Any]) -> Optional[Collection[Union[int, str]]]:
    """None where a record has no valid id, so that it may be any: its annotations may be good."""
    ids = {r["id"] for r in records if isinstance(r, dict) and isinstance(r.get("id"), _ID)}
    return ids if len(ids) == len(records) else None


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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _box_problem(bbox: Sequence[Any], size: Optional[Tuple[int, int]]) -> Optional[Rule]:
    """What is wrong with an [x, y, width, height] box in an image of that (height, width)."""
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
    height, width = size or (0, 0)
    right, bottom, tolerance = x + box_width, y + box_height, _BORDER_TOLERANCE
    is_within = min(x, y) >= -tolerance and right <= width + tolerance
    is_within &= bottom <= height + tolerance
    overlaps = x < width and y < height and right > 0 and bottom > 0
    if min(height, width) < 1 or (is_within and overlaps):
        return None
    form = "[x, y, width, height]"
    if x < box_width <= width and y < box_height <= height:
        form += ", not [x1, y1, x2, y2]"
    text = (
        f"has bbox {bbox}, which lies outside its image of {width} x {height} pixels; correct it "
        f"({form}) or remove it."
    )
    return "bbox outside the image", text


def file_problems(images: Collection[Record], image_root: PathLike) -> Iterator[Optional[Problem]]:
    """Decode all images in a few threads.

    Args:
        images: of a COCO JSON, without problems of their own.
        image_root: the folder that ``file_name`` is relative to.

    Yields:
        For each image its problem, or None.
    """

    def problem(image: Record) -> Optional[Problem]:
        path, hint = os.path.join(image_root, image["file_name"]), ""
        try:
            check_image(path, image["height"], image["width"])
        except DatasetError as error:
            rule = "file unreadable or of another size"
            if not os.path.isfile(path):
                rule = "file missing"
                if "://" in image["file_name"]:
                    hint = " (file_name is a URL: download the images, and write their paths.)"
                elif "\\" in image["file_name"]:
                    hint = " (Write file_name with / in place of \\.)"
            name = image.get(SOURCE) or f"image {written_id(image)}"
            return Problem(f"image: {rule}", f"{name}: {error}{hint}", image)
        return None

    return in_threads(problem, images)

"""Reading COCO JSONs, and what makes them unusable: every rule, with the sentence that says it."""

import contextlib
import functools
import json
import os
import re
import reprlib
import unicodedata
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

from smca.errors import DatasetError, counted

from .mapper import PathLike, check_image

Record = Dict[str, Any]  # an image, category or annotation of the JSON
# A key, what its value must be, and whether it is so; without the key, the value is None.
Rule = Tuple[str, str, Callable[[Any], bool]]
Fault = Tuple[str, str]  # what is wrong: its kind, and the predicate of the sentence

# Boxes drawn by hand or rounded often end a pixel beyond the image; they are clipped.
_BORDER_TOLERANCE = 2  # pixels
_NUM_PROBLEMS_SHOWN = 5

# Keys that the conversion of other formats adds: of an image or annotation, the file and line that
# it comes from and what is wrong there; of "info", the folder of the labels and remarks on it.
SOURCE, FAULT, REMARKS = "smca_source", "smca_fault", "smca_remarks"
# In a record whose numbers are texts or floats in the file: these, by their keys. In a JSON without
# a category that the file has: True.
WRITTEN = "smca_written"

_HUGE = 1e15  # a number of pixels that is as good as infinite
_MAX_AREA = 1e10  # in square pixels; pycocotools evaluates no larger objects


class Problem(NamedTuple):
    """Something that makes a data set unusable."""

    kind: str  # the rule that is broken, the same text for all that break it
    message: str  # a sentence that names the image, category or annotation and says what to do
    record: Any  # of the JSON, or the whole list where it is empty


def existing(path: Optional[PathLike], exists: Callable[[str], bool], kind: str) -> str:
    """Absolute path of something that exists."""
    if not path:
        raise DatasetError(f"The data set has no {kind}: give its path in the config.")
    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if not exists(path):
        kinds = {"is a folder": os.path.isdir, "is a file": os.path.isfile}
        kinds.update({"is neither a file nor a folder": os.path.exists, "does not exist": bool})
        found = next(words for words, holds in kinds.items() if holds(path))
        raise DatasetError(f"The {kind} {path} {found}: correct the path.")
    return path


def in_threads(function: Callable[..., Any], *items: Collection[Any]) -> Iterator[Any]:
    """`map` in a few threads."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, *items)


# Reading


@functools.lru_cache(maxsize=16)
def _parse(json_file: str, mtime_ns: int, size: int) -> Any:
    """`mtime_ns` and `size` make a changed file another key of the cache."""
    with open(json_file, "rb") as file:
        data = json.loads(file.read())  # UTF-8, -16 or -32, with a byte order mark or without
    for kind, keys in _NUMBERS.items():
        for record in _records(data, kind):
            for key, read in keys.items():
                value = record.get(key)
                number = read(value)
                if number is not value:
                    record[key] = number
                    record[WRITTEN] = {**record.get(WRITTEN, {}), key: value}
    _leave_out_project(data)
    return data


def _records(data: Any, kind: str) -> List[Record]:
    records = data.get(kind) if isinstance(data, dict) else None
    return [r for r in records if isinstance(r, dict)] if isinstance(records, list) else []


def _leave_out_project(data: Any) -> None:
    """Before the classes, Roboflow lists the project as a category without objects. Where it has
    the name of a class, it is left out."""
    for first in _records(data, "categories")[:1]:
        same = [c for c in _records(data, "categories") if c.get("name") == first.get("name")]
        ids = (a.get("category_id") for a in _records(data, "annotations"))
        if first.get("supercategory") == "none" and len(same) > 1 and first.get("id") not in ids:
            kept = [category for category in data["categories"] if category is not first]
            data.update({"categories": kept, WRITTEN: True})


def _whole_number(value: Any) -> Any:
    """A whole number that is written as "7", "007" or 7.0; any other value as it is."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,99}", value)
    return int(value) if is_number else value


def _number(value: Any) -> Any:
    """A number that is written as "7.50", as some exports do, or those of a list; any other value
    as it is."""
    if isinstance(value, list):
        return list(map(_number, value)) if str in map(type, value) else value
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


_NUMBERS: Dict[str, Dict[str, Callable[[Any], Any]]] = {
    "images": {"id": _whole_number, "height": _whole_number, "width": _whole_number},
    "annotations": {
        "image_id": _whole_number,
        "category_id": _whole_number,
        "bbox": _number,
        "area": _number,
        "iscrowd": _whole_number,
        "ignore": _whole_number,
    },
    "categories": {"id": _whole_number},
}


def written_id(record: Record) -> Union[int, str]:
    """The id of an image or category as its file has it; of a float, the whole number."""
    written = record.get(WRITTEN, {}).get("id")
    return written if isinstance(written, str) else record["id"]


def forget_files() -> None:
    """Free the memory of the files that :func:`read_coco` has read."""
    _parse.cache_clear()


def read_coco(json_file: PathLike) -> Dict[str, Any]:
    """The content of a COCO JSON, read once as long as it does not change (until
    :func:`forget_files`), which callers do not change. Ids and sizes that are whole numbers written
    as texts or floats ("007", 7.0) are numbers; other texts stay ids.

    A DatasetError says that it is missing, not JSON or lacks one of the lists ``images``,
    ``annotations`` and ``categories``, whose records :func:`record_problems` checks.
    """
    json_file = existing(json_file, os.path.isfile, "annotation file")
    try:
        status = os.stat(json_file)
        data = _parse(json_file, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"{json_file} cannot be read as JSON in UTF-8 ({error}): unpack it if it is "
            "compressed, run git lfs pull if it is a pointer of Git LFS, or export it again."
        ) from error
    lists = data if isinstance(data, dict) else {}
    missing = [f"'{key}'" for key in _NUMBERS if not isinstance(lists.get(key), list)]
    if missing:
        raise DatasetError(
            f"{json_file} is not in COCO's format, an object with the lists 'images', "
            f"'annotations' and 'categories': add {' and '.join(missing)}."
        )
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
    annotations = data["annotations"]
    crowds = sum(isinstance(a, dict) and a.get("iscrowd") == 1 for a in annotations)
    if 0.1 * len(annotations) < crowds < len(annotations):
        found.append(
            f"{crowds} of the {len(annotations)} annotations of {source_of(data, json_file)} have "
            "iscrowd 1, which marks crowds: they are neither trained on nor evaluated; set it to 0 "
            "for single objects."
        )
    if not annotations:
        found.append(
            f"{source_of(data, json_file)} has no objects: there is nothing to train on, and as "
            "validation data it gives no AP and no model_best.pth. Add its annotations."
        )
    return found


def raise_problems(json_file: PathLike, problems: Sequence[Problem]) -> None:
    """Raise a DatasetError if there are problems; it says how many, and the first ones."""
    if not problems:
        return
    shown = "".join(f"\n  {problem.message}" for problem in problems[:_NUM_PROBLEMS_SHOWN])
    more = "\n  ..." if len(problems) > _NUM_PROBLEMS_SHOWN else ""
    raise DatasetError(f"{counted(len(problems), 'problem')} in {json_file}:{shown}{more}")


# Rules


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value == value.encode("utf-8", "replace").decode()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_box(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))
    return is_list and all(abs(v) < _HUGE for v in value) and min(value[2:]) > 0


def _is_area(value: Any) -> bool:
    return value is None or (_is_number(value) and 0 <= value <= _MAX_AREA)


_ID = "a whole number or a text"
_IMAGE_RULES: List[Rule] = [
    ("id", _ID, _is_id),
    ("file_name", "a text", lambda value: isinstance(value, str)),
    ("height", "a whole number above 0", _is_size),
    ("width", "a whole number above 0", _is_size),
]
_CATEGORY_RULES: List[Rule] = [("id", _ID, _is_id), ("name", "a Unicode text", _is_text)]
_ANNOTATION_RULES: List[Rule] = [
    ("image_id", _ID, _is_id),
    ("category_id", _ID, _is_id),
    ("bbox", "4 finite numbers, of which the width and height are above 0", _is_box),
    ("area", f"a number from 0 to {_MAX_AREA:g}", _is_area),
    ("iscrowd", "0 or 1", lambda value: value in (None, 0, 1)),
    ("ignore", "0, since only 'iscrowd' is supported", lambda value: not value),
]


def record_problems(data: Mapping[str, Any]) -> List[Problem]:
    """All that is wrong with the records of a JSON from :func:`read_coco`; files are not read."""
    images, annotations = data["images"], data["annotations"]
    problems = category_problems(data["categories"])
    problems += _problems("image", images, _IMAGE_RULES, {"id": (int, str)})
    if not images:
        problems.append(Problem("no images", "'images' is empty; add the images.", images))
    problems += _annotation_problems(annotations, images, data["categories"])
    if annotations and all(isinstance(a, dict) and a.get("iscrowd") == 1 for a in annotations):
        text = (
            f"all {len(annotations)} annotations have iscrowd 1, which marks crowds: they are "
            "neither trained on nor evaluated; set it to 0 for single objects."
        )
        problems.append(Problem("all annotations are crowds", text, annotations))
    return problems


def category_problems(categories: Sequence[Any]) -> List[Problem]:
    if not categories:
        return [Problem("no categories", "'categories' is empty; add the classes.", categories)]
    # Results are listed by name.
    return _problems("category", categories, _CATEGORY_RULES, {"id": (int, str), "name": str})


def _annotation_problems(
    annotations: Sequence[Any], images: Sequence[Any], categories: Sequence[Any]
) -> List[Problem]:
    image_ids, category_ids = _ids(images), _ids(categories)
    sizes = {
        image["id"]: (image["height"], image["width"])
        for image in images
        if _fault_of(image, _IMAGE_RULES) is None
    }

    def fault_of(annotation: Record) -> Optional[Fault]:
        if image_ids is not None and annotation["image_id"] not in image_ids:
            return _broken(annotation, "image_id", "the id of an image")
        if category_ids is not None and annotation["category_id"] not in category_ids:
            return _broken(annotation, "category_id", "the id of a category")
        size, bbox = sizes.get(annotation["image_id"]), annotation["bbox"]
        if size is None:
            return None
        hint = _why_outside(bbox, *size)
        if hint is not None:
            return _broken(annotation, "bbox", "inside its image", hint)
        # A pixel in the corner is no fault.
        if max(map(abs, bbox)) <= 1 < max(size) and any(value % 1 for value in bbox):
            return _broken(annotation, "bbox", "in pixels, not relative to its image")
        return None

    # Annotations can do without an id, and one that is no number is not used.
    return _problems("annotation", annotations, _ANNOTATION_RULES, {"id": int}, fault_of)


def _ids(records: Sequence[Any]) -> Optional[Collection[Union[int, str]]]:
    """None where a record has no valid id, so that it may be any: its annotations may be good."""
    ids = {r["id"] for r in records if isinstance(r, dict) and _is_id(r.get("id"))}
    return ids if len(ids) == len(records) else None


def _why_outside(bbox: Sequence[float], height: int, width: int) -> Optional[str]:
    """The image's size and how a box that lies outside may be meant; None for one inside."""
    x, y, box_width, box_height = bbox
    right, bottom, tolerance = x + box_width, y + box_height, _BORDER_TOLERANCE
    is_within = min(x, y) >= -tolerance and right <= width + tolerance
    is_within &= bottom <= height + tolerance
    if is_within and x < width and y < height and right > 0 and bottom > 0:
        return None
    form = ", not [x1, y1, x2, y2]" if x < box_width <= width and y < box_height <= height else ""
    return f" of {width} x {height} pixels ([x, y, width, height]{form})"


def _problems(
    kind: str,
    records: Sequence[Any],
    rules: Sequence[Rule],
    unique: Mapping[str, Any],
    more: Callable[[Record], Optional[Fault]] = lambda record: None,
) -> List[Problem]:
    """The first fault of each record: of its values by the rules, of those whose keys and types are
    `unique`, or by `more`."""
    problems, seen = [], set()
    for index, record in enumerate(records):
        fault = _fault_of(record, rules)
        for key, type_ in unique.items() if fault is None else ():
            if isinstance(record.get(key), type_):
                if (key, record[key]) in seen:
                    fault = fault or _broken(record, key, "unique")
                seen.add((key, record[key]))
        fault = fault or more(record)
        if fault is not None:
            message = f"{_label(kind, index, record)} {fault[1]}"
            problems.append(Problem(f"{kind}: {fault[0]}", message, record))
    return problems


def _fault_of(record: Any, rules: Sequence[Rule]) -> Optional[Fault]:
    if not isinstance(record, dict):
        text = f"is {json.dumps(record)[:40]}, not an object; correct or remove it."
        return "not an object", text
    if FAULT in record:
        return "cannot be read", record[FAULT]
    broken = (_broken(record, key, m) for key, m, holds in rules if not holds(record.get(key)))
    return next(broken, None)


def _broken(record: Record, key: str, must: str, hint: str = "") -> Fault:
    value = f"{key} {reprlib.repr(record[key])}" if key in record else f"no {key}"
    if key == "bbox" and SOURCE in record:  # whose file has other numbers
        x, y, w, h = record[key]
        value = f"a box from ({x:g}, {y:g}) to ({x + w:g}, {y + h:g}), in pixels from 0"
        hint = hint.partition(" (")[0]
    text = f"has {value}, which must be {must}{hint}; correct or remove it."
    return f"{key} is not {must}", text


def _label(kind: str, index: int, record: Any) -> str:
    """How messages name a record: by the label file that it comes from, by its id, or by its index
    in the file where it has none."""
    record = record if isinstance(record, dict) else {}
    if SOURCE in record:
        return str(record[SOURCE])
    if "id" not in record:
        return f"{kind} at index {index}"
    more = ""
    if isinstance(record.get("file_name"), str):
        more = f" ('{record['file_name']}')"
    elif "image_id" in record:
        more = f" (of image {record['image_id']})"
    return f"{kind} {written_id(record)}{more}"


def _where_else(name: str, image_root: PathLike) -> str:
    """How a `file_name` that does not exist may be meant, as a sentence in brackets."""
    if "://" in name:
        return " (file_name is a URL: download the images, and write their paths.)"
    for other, advice in (
        (name.replace("\\", "/"), "Write file_name with / in place of \\."),
        (re.split(r"[\\/]", name)[-1], "It is there without the folder in file_name: remove that."),
        (os.path.join("..", name), "It is there from the folder above: give that one."),
        (unicodedata.normalize("NFC", name), "Its name on the disk is in Unicode's form NFC."),
        (unicodedata.normalize("NFD", name), "Its name on the disk is in Unicode's form NFD."),
    ):
        if other and os.path.isfile(os.path.join(image_root, other)):
            return f" ({advice})"
    return ""


def file_problems(images: Collection[Record], image_root: PathLike) -> Iterator[Optional[Problem]]:
    """Decode images of a COCO JSON, which have no problems of their own, in a few threads; gives
    for each its problem, or None."""

    def problem(image: Record) -> Optional[Problem]:
        path, hint = os.path.join(image_root, image["file_name"]), ""
        try:
            check_image(path, image["height"], image["width"])
        except DatasetError as error:
            rule = "file unreadable or of another size"
            if not os.path.isfile(path):
                rule, hint = "file missing", _where_else(image["file_name"], image_root)
            name = image.get(SOURCE) or f"image {written_id(image)}"
            return Problem(f"image: {rule}", f"{name}: {error}{hint}", image)
        return None

    return in_threads(problem, images)

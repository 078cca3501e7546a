"""Data sets in COCO's format: checked before they are used, registered in Detectron2's catalog."""

import functools
import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n

from .cache import cache_dir, create_once, is_stamped, stamp
from .coco_checks import (
    PathLike,
    Record,
    category_problems,
    conversion_remarks,
    decode_all,
    existing,
    raise_problems,
    read_coco,
    record_problems,
    source_of,
)
from .errors import DatasetError

__all__ = [
    "check_same_categories",
    "class_names",
    "dataset_dicts",
    "num_classes",
    "register_coco",
    "require_dataset",
]

logger = logging.getLogger(__name__)

Paths = Union[PathLike, Sequence[PathLike]]

# Of the data sets registered here: name -> (json file, image folder)
_registered: Dict[str, Tuple[str, str]] = {}


def register_coco(
    json_file: Paths,
    image_root: Paths,
    name: Optional[str] = None,
    check_images: bool = True,
    categories_from: Optional[Paths] = None,
) -> Union[str, List[str]]:
    """Check a COCO-format detection data set and register it in Detectron2's catalogs.

    Of several files, each is a data set of its own, so that image ids need be unique within a
    file only.

    Calling it again with the same files returns the same name without another check, so that
    a config may use it wherever it needs the name.

    Annotations without ``area``, ``iscrowd`` or ``id`` are completed in a copy of the JSON in
    the cache folder; the file itself is never changed.

    Args:
        json_file: one or several; boxes are [x, y, width, height] in
            pixels. Several files must have the same categories.
        image_root: the folder that ``file_name`` is
            relative to; one for all files, or one for each.
        name: the name to register, of a single file; None makes one from the paths.
        check_images: decode every image and compare its size with the JSON's, once: the
            cache folder keeps a note of it, for as long as the files' sizes and times stay.
        categories_from: another COCO JSON, usually
            the training set's, that must have the same categories in the same order.

    Returns:
        The name of the data set; for a list of files, the list of names.

    Raises:
        DatasetError: the data set cannot be used; lists the first problems and their number.
    """
    files, roots = _as_list(json_file), _as_list(image_root)
    if len(roots) not in (1, len(files)):
        raise DatasetError(
            f"There are {len(roots)} image folders for {len(files)} annotation files: give one "
            "folder, or one for each file."
        )
    if name is not None and len(files) > 1:
        raise DatasetError(
            f"'{name}' cannot be the name of {len(files)} annotation files: leave the name out."
        )
    for file in files[1:]:
        check_same_categories(file, files[0])
    if categories_from is not None:
        check_same_categories(files[0], _as_list(categories_from)[0])
    roots = roots * len(files) if len(roots) == 1 else roots
    names = [_register(file, root, name, check_images) for file, root in zip(files, roots)]
    return names if _is_list(json_file) else names[0]


def _register(
    json_file: PathLike, image_root: PathLike, name: Optional[str], check_images: bool
) -> str:
    json_file = existing(json_file, os.path.isfile, "annotation file")
    image_root = existing(image_root, os.path.isdir, "image folder")
    key = (json_file, image_root)
    if name is None:
        name = f"{Path(json_file).stem}_{_short_hash(repr(key))}"
    if name in DatasetCatalog.list():
        if _registered.get(name) == key:
            return name
        raise DatasetError(f"Data set name '{name}' is taken already: choose another name.")

    data = read_coco(json_file)
    _check(data, json_file, image_root, check_images)
    for remark in conversion_remarks(data):
        log_first_n(logging.WARNING, remark, key="message", name=__name__)
    categories = _sorted_by_id(data["categories"])
    DatasetCatalog.register(name, lambda: dataset_dicts(read_coco(json_file), image_root))
    MetadataCatalog.get(name).set(
        json_file=_complete(data, json_file),
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(categories)},
    )
    _registered[name] = key
    return name


def dataset_dicts(data: Mapping[str, Any], image_root: PathLike) -> List[Record]:
    """The images of a COCO JSON in Detectron2's format, by their ids. Of the annotations, only what
    boxes need is read.

    Args:
        data: as of `read_coco`, without problems.
        image_root: the folder that ``file_name`` is relative to.
    """
    categories = _sorted_by_id(data["categories"])
    indices = {category["id"]: index for index, category in enumerate(categories)}
    by_image: Dict[int, List[Record]] = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        by_image[annotation["image_id"]].append(
            {
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": indices[annotation["category_id"]],
                "iscrowd": annotation.get("iscrowd") or 0,
            }
        )
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": by_image[image["id"]],
        }
        for image in _sorted_by_id(data["images"])
    ]


def _sorted_by_id(records: Sequence[Record]) -> List[Record]:
    return sorted(records, key=lambda record: record["id"])


def class_names(json_file: Paths) -> List[str]:
    """Names of the categories in one or several COCO JSONs, in the order of their ids.

    Raises:
        DatasetError: a file is missing or no COCO JSON, or its categories are unusable or not
            those of the first file.
    """
    first, *others = _as_list(json_file)
    for other in others:
        check_same_categories(other, first)
    first = existing(first, os.path.isfile, "annotation file")
    return list(_class_names(first, os.stat(first).st_mtime_ns))


def num_classes(json_file: Paths) -> int:
    """Number of categories in a COCO JSON, or each of several, used or not.

    Raises:
        DatasetError: see :func:`class_names`.
    """
    return len(class_names(json_file))


def require_dataset(names: Union[str, Sequence[str]]) -> None:
    """Make sure that registered data sets are on the disk, at next to no cost. The embedded data
    sets are made if need be.

    Args:
        names: one or several in Detectron2's catalog.

    Raises:
        DatasetError: a name is unknown, or its annotation file or image folder is missing.
    """
    for name in [names] if isinstance(names, str) else names:
        if name not in DatasetCatalog.list():
            raise DatasetError(
                f"Data set '{name}' is not registered: correct dataloader.train.dataset.names or "
                "dataloader.test.dataset.names, or register it first."
            )
        metadata = MetadataCatalog.get(name)
        if metadata.get("make_files") is not None:
            metadata.make_files()
        _require_path(name, metadata.get("json_file"), os.path.isfile, "annotation file")
        _require_path(name, metadata.get("image_root"), os.path.isdir, "image folder")


def _require_path(name: str, path: Optional[str], exists: Callable[[str], bool], kind: str) -> None:
    if path is None or exists(path):  # not every data set has both
        return
    root = os.environ.get("DETECTRON2_DATASETS")
    setting = f"is '{root}'" if root else "is not set, which means ./datasets"
    raise DatasetError(
        f"Data set '{name}' needs the {kind} {os.path.abspath(path)}, which does not exist: put "
        "it there, or set the environment variable DETECTRON2_DATASETS to the folder that has "
        f"it (DETECTRON2_DATASETS {setting})."
    )


def _is_list(paths: Any) -> bool:
    return isinstance(paths, Sequence) and not isinstance(paths, str)


def _as_list(paths: Any) -> List[Any]:
    """At least one, if only None."""
    return (list(paths) if _is_list(paths) else [paths]) or [None]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@functools.lru_cache(maxsize=16)
def _class_names(json_file: str, mtime_ns: int) -> Tuple[str, ...]:
    """`mtime_ns` makes a changed file another key of the cache."""
    data = read_coco(json_file)
    raise_problems(json_file, category_problems(data["categories"]))
    return tuple(category["name"] for category in _sorted_by_id(data["categories"]))


def check_same_categories(json_file: PathLike, reference_file: PathLike) -> None:
    """
    Raises:
        DatasetError: two COCO JSONs do not have the same categories in the order of their ids, or
            those of one are unusable.
    """
    names, reference = class_names(json_file), class_names(reference_file)
    if names == reference:
        return
    only_here = sorted(set(names) - set(reference))
    only_there = sorted(set(reference) - set(names))
    if only_here or only_there:
        differences = f"only the first has {only_here}, only the second {only_there}"
    else:
        differences = f"the order of their ids gives {names} and {reference}"
    raise DatasetError(
        f"{json_file} and {reference_file} must have the same categories, but {differences}: "
        "give both files the same 'categories'."
    )


def _check(data: Dict[str, Any], json_file: str, image_root: str, check_images: bool) -> None:
    raise_problems(source_of(data, json_file), record_problems(data))
    # Where several processes read the same files, one of them need look at the pixels.
    if check_images and comm.is_main_process():
        _check_files(data, json_file, image_root)


def _check_files(data: Mapping[str, Any], json_file: str, image_root: str) -> None:
    """Decode all images, unless that was done and they are as they were."""
    images = data["images"]
    key = _short_hash(repr((json_file, image_root)))
    path = cache_dir() / "checked" / f"{Path(json_file).stem}_{key}"
    state = _state_of_files(images, image_root)
    if is_stamped(path, state):
        return
    raise_problems(source_of(data, json_file), decode_all(images, json_file, image_root))
    stamp(path, state)


def _state_of_files(images: List[Record], image_root: str) -> str:
    """A digest of what decides whether the files can be read: names, sizes and times."""

    def state(image: Record) -> Any:
        try:
            status = os.stat(os.path.join(image_root, image["file_name"]))
        except (OSError, ValueError):  # not there, or no name that a file can have
            return None
        size = (image["height"], image["width"])
        return image["file_name"], size, status.st_size, status.st_mtime_ns

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        states = list(pool.map(state, images))
    return hashlib.sha256(repr(states).encode()).hexdigest()


def _complete(data: Dict[str, Any], json_file: str) -> str:
    """Path of a JSON that Detectron2 and pycocotools read in full: `json_file` itself, or a
    completed copy in the cache folder where it lacks something.
    """
    annotations = data["annotations"]
    if "info" in data and _is_utf_8(json_file) and all(map(_is_complete, annotations)):
        return json_file
    used_ids = {annotation.get("id") for annotation in annotations} - {None}
    next_id = max([0, *used_ids]) + 1
    completed = []
    for annotation in annotations:
        annotation = dict(annotation)
        if not annotation.get("id"):
            annotation["id"] = next_id
            next_id += 1
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        if annotation.get("iscrowd") is None:
            annotation["iscrowd"] = 0
        completed.append(annotation)
    text = json.dumps({"info": {}, **data, "annotations": completed})
    path = cache_dir() / "coco" / f"{Path(json_file).stem}_{_short_hash(text)}.json"
    create_once(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    logger.info("%s lacks keys that the evaluation needs; using %s.", json_file, path)
    return str(path)


def _is_complete(annotation: Record) -> bool:
    # pycocotools takes a match with annotation 0 for no match, so 0 does not count as an id.
    return (
        bool(annotation.get("id"))
        and annotation.get("area") is not None
        and annotation.get("iscrowd") is not None
    )


def _is_utf_8(json_file: str) -> bool:
    """Whether a JSON has that encoding, without a byte order mark."""
    with open(json_file, "rb") as file:
        return json.detect_encoding(file.read(4)) == "utf-8"

"""Data sets in COCO's format: checked before they are used, registered in Detectron2's catalog."""

import functools
import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n

from .cache import cache_dir, create_once, is_stamped, stamp
from .coco_checks import (
    WRITTEN,
    PathLike,
    Record,
    category_problems,
    decode_all,
    existing,
    raise_problems,
    read_coco,
    record_problems,
    remarks_on,
    source_of,
    written_id,
)
from .errors import DatasetError

__all__ = [
    "category_ids",
    "check_same_categories",
    "class_names",
    "dataset_dicts",
    "image_ids",
    "num_classes",
    "num_images",
    "register_coco",
    "require_dataset",
    "sorted_by_id",
]

logger = logging.getLogger(__name__)

Paths = Union[PathLike, Sequence[PathLike]]

_LISTS = ("images", "annotations", "categories")

# Of the data sets registered here: name -> JSON file, image folder, and perhaps classes
_registered: Dict[str, Tuple[Any, ...]] = {}


def register_coco(
    json_file: Paths,
    image_root: Paths,
    name: Optional[str] = None,
    check_images: bool = True,
    categories_from: Optional[Paths] = None,
    classes: Optional[Sequence[str]] = None,
) -> Union[str, List[str]]:
    """Check a COCO-format detection data set and register it in Detectron2's catalogs.

    Of several files, each is a data set of its own, so that image ids need be unique within a
    file only.

    Calling it again with the same files returns the same name without another check, so that
    a config may use it wherever it needs the name.

    Annotations without ``area``, ``iscrowd`` or ``id`` are completed in a copy of the JSON in
    the cache folder; the file itself is never changed. In such a copy, ids that no evaluation
    takes (texts, negative numbers, or those from 2^31 up) become 1, 2, ...: `image_ids` and
    `category_ids` give the file's own.

    Args:
        json_file: one or several; boxes are [x, y, width, height] in
            pixels. Several files must have categories of the same names, which the first one
            orders by their ids.
        image_root: the folder that ``file_name`` is
            relative to; one for all files, or one for each.
        name: the name to register, of a single file; None makes one from the paths.
        check_images: decode every image and compare its size with the JSON's, once: the
            cache folder keeps a note of it, for as long as the files' sizes and times stay.
        categories_from: another COCO JSON, usually the training set's, that must have categories
            of the same names; it orders them.
        classes: names of the classes in a model's order, in place of `categories_from`.

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
    if classes is not None:
        for file in files:
            _check_classes(file, classes, "the model")
    elif categories_from is not None or len(files) > 1:
        reference = _as_list(categories_from or files)[0]
        if categories_from is not None and not os.path.isfile(os.path.expanduser(reference)):
            raise DatasetError(
                f"The annotation file {reference}, whose categories {files[0]} has to have, does "
                "not exist: correct the path. (An evaluation needs it only for a checkpoint that "
                "does not say its classes; dataloader.test.dataset.names.categories_from=null and "
                "model.num_classes=N do without.)"
            )
        for file in files:
            check_same_categories(file, reference)
        classes = class_names(reference)
    roots = roots * len(files) if len(roots) == 1 else roots
    names = [_register(file, root, name, check_images, classes) for file, root in zip(files, roots)]
    return names if _is_list(json_file) else names[0]


def _register(
    json_file: PathLike,
    image_root: PathLike,
    name: Optional[str],
    check_images: bool,
    classes: Optional[Sequence[str]],
) -> str:
    json_file = existing(json_file, os.path.isfile, "annotation file")
    image_root = existing(image_root, os.path.isdir, "image folder")
    key: Tuple[Any, ...] = (json_file, image_root)
    if classes is not None and list(classes) != class_names(json_file):
        key = (*key, tuple(classes))
    if name is None:
        name = f"{Path(json_file).stem}_{_short_hash(repr(key))}"
    if name in DatasetCatalog.list():
        if _registered.get(name) == key:
            return name
        raise DatasetError(f"Data set name '{name}' is taken already: choose another name.")

    data = read_coco(json_file)
    _check(data, json_file, image_root, check_images)
    for remark in remarks_on(data, json_file):
        log_first_n(logging.WARNING, remark, key="message", name=__name__)
    categories = _ordered(data["categories"], classes)
    ids = _Ids.of(data["images"], categories)
    used_file = _complete(data, json_file, ids)
    DatasetCatalog.register(name, lambda: dataset_dicts(read_coco(used_file), image_root))
    MetadataCatalog.get(name).set(
        json_file=used_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={
            ids.categories[category["id"]]: index for index, category in enumerate(categories)
        },
        category_ids=[written_id(category) for category in categories],
        image_ids={
            ids.images[image["id"]]: written_id(image)
            for image in data["images"]
            if ids.images[image["id"]] != written_id(image)
        },
    )
    _registered[name] = key
    return name


def dataset_dicts(
    data: Mapping[str, Any], image_root: PathLike, classes: Optional[Sequence[str]] = None
) -> List[Record]:
    """The images of a COCO JSON in Detectron2's format, by their ids. Of the annotations, only what
    boxes need is read.

    Args:
        data: as of `read_coco`, without problems.
        image_root: the folder that ``file_name`` is relative to.
        classes: names of all categories in the order of their indices; None: that of the ids.
    """
    categories = _ordered(data["categories"], classes)
    indices = {category["id"]: index for index, category in enumerate(categories)}
    by_image: Dict[Any, List[Record]] = {image["id"]: [] for image in data["images"]}
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
        for image in sorted_by_id(data["images"])
    ]


def _ordered(categories: Sequence[Record], classes: Optional[Sequence[str]]) -> List[Record]:
    """Categories by their ids, or by their names in the order of `classes`."""
    if classes is None:
        return sorted_by_id(categories)
    return sorted(categories, key=lambda category: classes.index(category["name"]))


def sorted_by_id(records: Sequence[Record]) -> List[Record]:
    """Images or categories, those whose ids are texts last."""
    return sorted(records, key=lambda record: (isinstance(record["id"], str), record["id"]))


class _Ids(NamedTuple):
    """From the ids in a file to those that Detectron2 and pycocotools take; the order is that of
    the used ones."""

    images: Dict[Any, int]
    categories: Dict[Any, int]

    @classmethod
    def of(cls, images: Sequence[Record], categories: Sequence[Record]) -> "_Ids":
        """`categories` in the order that their used ids are to have."""
        image_ids = [image["id"] for image in sorted_by_id(images)]
        category_ids = [category["id"] for category in categories]
        return cls(
            _numbers(image_ids, all(map(_is_usable_id, image_ids))),
            _numbers(
                category_ids,
                all(map(_is_usable_id, category_ids)) and category_ids == sorted(category_ids),
            ),
        )


def _is_usable_id(value: Any) -> bool:
    # Evaluators keep ids as floats and in types of 32 and of 64 bits, with a sign and without.
    return type(value) is int and 0 <= value < 2**31


def _numbers(ids: Sequence[Any], are_usable: bool) -> Dict[Any, int]:
    return {given: given if are_usable else number for number, given in enumerate(ids, 1)}


def category_ids(dataset: str) -> List[Union[int, str]]:
    """Of a registered data set, for each class index the id that its JSON has; empty where it is
    unknown."""
    metadata = MetadataCatalog.get(dataset)
    indices = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    return metadata.get("category_ids") or sorted(indices, key=lambda key: indices[key])


def image_ids(dataset: str) -> Dict[int, Union[int, str]]:
    """Of a registered data set, from its ``image_id`` to the one that its JSON has, where that is
    another."""
    return MetadataCatalog.get(dataset).get("image_ids") or {}


def class_names(json_file: Paths) -> List[str]:
    """Names of the categories in one or several COCO JSONs, in the order of the first one's ids.

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


def num_images(json_file: Paths) -> int:
    """Number of images in a COCO JSON, or in several together.

    Raises:
        DatasetError: see :func:`read_coco`.
    """
    return sum(len(read_coco(file)["images"]) for file in _as_list(json_file))


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
    return tuple(category["name"] for category in sorted_by_id(data["categories"]))


def check_same_categories(json_file: PathLike, reference_file: PathLike) -> None:
    """
    Raises:
        DatasetError: two COCO JSONs do not have categories of the same names, or those of one are
            unusable.
    """
    _check_classes(json_file, class_names(reference_file), str(reference_file))


def _check_classes(json_file: PathLike, classes: Sequence[str], owner: str) -> None:
    names = class_names(json_file)
    only_here = sorted(set(names) - set(classes))
    only_there = sorted(set(classes) - set(names))
    if only_here or only_there:
        raise DatasetError(
            f"{json_file} and {owner} must have the same categories, but only the first has "
            f"{only_here}, only the second {only_there}: give both the same names in 'categories' "
            "(their ids and their order may differ)."
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


def _complete(data: Dict[str, Any], json_file: str, ids: _Ids) -> str:
    """Path of a JSON that Detectron2 and pycocotools read in full: `json_file` itself, or a
    completed copy in the cache folder where it lacks something or has other ids than `ids`.
    """
    annotations = data["annotations"]
    has_ids = all(given == used for numbers in ids for given, used in numbers.items())
    has_ids &= not any(WRITTEN in record for kind in _LISTS for record in data[kind])
    is_complete = "info" in data and has_ids and all(map(_is_complete, annotations))
    if is_complete and _is_utf_8(json_file):
        return json_file
    completed = []
    for number, annotation in enumerate(annotations, 1):
        annotation = {
            **annotation,
            "id": number,
            "image_id": ids.images[annotation["image_id"]],
            "category_id": ids.categories[annotation["category_id"]],
        }
        if not annotation.get("area"):
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        if annotation.get("iscrowd") is None:
            annotation["iscrowd"] = 0
        completed.append(annotation)
    images = [{**image, "id": ids.images[image["id"]]} for image in data["images"]]
    categories = [{**c, "id": ids.categories[c["id"]]} for c in data["categories"]]
    changed = {"images": images, "categories": categories, "annotations": completed}
    text = json.dumps({"info": {}, **data, **changed})
    path = cache_dir() / "coco" / f"{Path(json_file).stem}_{_short_hash(text)}.json"
    create_once(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    logger.info("%s lacks keys or has ids that no evaluation takes; using %s.", json_file, path)
    return str(path)


def _is_complete(annotation: Record) -> bool:
    # pycocotools takes a match with annotation 0 for no match, so 0 does not count as an id.
    return (
        _is_usable_id(annotation.get("id"))
        and annotation["id"] > 0
        and bool(annotation.get("area"))
        and annotation.get("iscrowd") is not None
    )


def _is_utf_8(json_file: str) -> bool:
    """Whether a JSON has that encoding, without a byte order mark."""
    with open(json_file, "rb") as file:
        return json.detect_encoding(file.read(4)) == "utf-8"

"""Data sets in COCO's format: checked before they are used, registered in Detectron2's catalog."""

import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm

from .cache import cache_dir, create_once
from .errors import DatasetError
from .mapper import check_image

__all__ = ["class_names", "num_classes", "register_coco", "require_dataset"]

logger = logging.getLogger(__name__)

# Boxes drawn by hand or rounded often end a pixel beyond the image; they are clipped.
_BORDER_TOLERANCE = 2  # pixels
_NUM_PROBLEMS_SHOWN = 5

# Keys that a record must have, and their types.
_IMAGE_KEYS = {"id": int, "file_name": str, "height": int, "width": int}
_CATEGORY_KEYS = {"id": int, "name": str}
_ANNOTATION_KEYS = {"image_id": int, "category_id": int, "bbox": list}
_TYPE_NAMES = {int: "a whole number", str: "a text", list: "a list"}

_registered = {}  # name -> (json file, image folder), of the data sets registered here


def register_coco(json_file, image_root, name=None, check_images=True, categories_from=None):
    """
    Check a COCO-format detection data set and register it in Detectron2's catalogs; of several
    files each as a data set of its own, so that image ids need be unique within a file only.

    Calling it again with the same files returns the same name without another check, so that
    a config may use it wherever it needs the name.

    Annotations without ``area``, ``iscrowd`` or ``id`` are completed in a copy of the JSON in
    the cache folder; the file itself is never changed.

    Args:
        json_file (str or path-like, or a list of them): boxes are [x, y, width, height] in
            pixels. Several files must have the same categories.
        image_root (str or path-like, or a list of them): the folder that ``file_name`` is
            relative to; one for all files, or one for each.
        name (str or None): the name to register; None makes one from the paths.
        check_images (bool): decode every image once and compare its size with the JSON's.
        categories_from (str or path-like, a list of them, or None): another COCO JSON, usually
            the training set's, that must have the same categories in the same order.

    Returns:
        str or list[str]: the name of the data set; for a list of files, the list of names.

    Raises:
        DatasetError: the data set cannot be used; lists the first problems and their number.
    """
    files, roots = _as_list(json_file), _as_list(image_root)
    if len(roots) not in (1, len(files)):
        raise DatasetError(
            f"There are {len(roots)} image folders for {len(files)} annotation files: give one "
            "folder, or one for each file."
        )
    for file in files[1:]:
        _check_same_categories(file, files[0])
    if categories_from is not None:
        _check_same_categories(files[0], _as_list(categories_from)[0])
    roots = roots * len(files) if len(roots) == 1 else roots
    names = [_register(file, root, name, check_images) for file, root in zip(files, roots)]
    return names if _is_list(json_file) else names[0]


def _register(json_file, image_root, name, check_images):
    json_file = _existing(json_file, os.path.isfile, "annotation file")
    image_root = _existing(image_root, os.path.isdir, "image folder")
    key = (json_file, image_root)
    if name is None:
        name = f"{Path(json_file).stem}_{_short_hash(repr(key))}"
    if _registered.get(name) == key:
        return name
    if name in DatasetCatalog.list():
        raise DatasetError(f"Data set name '{name}' is taken already: choose another name.")

    data = _read_json(json_file)
    _check(data, json_file, image_root, check_images)
    categories = sorted(data["categories"], key=lambda category: category["id"])
    metadata = {
        "thing_classes": [category["name"] for category in categories],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
    }
    register_coco_instances(name, metadata, _complete(data, json_file), image_root)
    _registered[name] = key
    return name


def class_names(json_file):
    """
    Args:
        json_file (str or path-like, or a list of them)

    Returns:
        list[str]: names of the categories in COCO JSONs, in the order of their ids.

    Raises:
        DatasetError: a file is missing or no COCO JSON, or its categories are unusable or not
            those of the first file.
    """
    first, *others = _as_list(json_file)
    for other in others:
        _check_same_categories(other, first)
    first = _existing(first, os.path.isfile, "annotation file")
    return list(_class_names(first, os.stat(first).st_mtime_ns))


def num_classes(json_file):
    """
    Returns:
        int: number of categories in a COCO JSON, or each of a list of them, used or not.

    Raises:
        DatasetError: see :func:`class_names`.
    """
    return len(class_names(json_file))


def require_dataset(names):
    """
    Make sure that registered data sets are on the disk, at next to no cost. The embedded data
    sets are made if need be.

    Args:
        names (str or sequence of str): names in Detectron2's catalog.

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


def _require_path(name, path, exists, kind):
    if path is None or exists(path):  # not every data set has both
        return
    root = os.environ.get("DETECTRON2_DATASETS")
    setting = f"is '{root}'" if root else "is not set, which means ./datasets"
    raise DatasetError(
        f"Data set '{name}' needs the {kind} {os.path.abspath(path)}, which does not exist: put "
        "it there, or set the environment variable DETECTRON2_DATASETS to the folder that has "
        f"it (DETECTRON2_DATASETS {setting})."
    )


def _is_list(paths):
    return isinstance(paths, Sequence) and not isinstance(paths, str)


def _as_list(paths):
    """At least one, if only None."""
    return (list(paths) if _is_list(paths) else [paths]) or [None]


def _existing(path, exists, kind):
    """Absolute path of something that exists."""
    if not path:
        raise DatasetError(f"The data set has no {kind}: give its path in the config.")
    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if not exists(path):
        raise DatasetError(f"The {kind} {path} does not exist: correct the path.")
    return path


def _short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@functools.lru_cache(maxsize=16)
def _class_names(json_file, mtime_ns):
    """`mtime_ns` makes a changed file another key of the cache."""
    data = _read_json(json_file)
    _raise_problems(json_file, _category_problems(data["categories"]))
    categories = sorted(data["categories"], key=lambda category: category["id"])
    return tuple(category["name"] for category in categories)


def _read_json(json_file):
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


def _check_same_categories(json_file, reference_file):
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


def _check(data, json_file, image_root, check_images):
    images, categories = data["images"], data["categories"]
    problems = _category_problems(categories) + _image_problems(images)
    valid_images = [image for image in images if not _record_problem(image, _IMAGE_KEYS)]
    problems += _annotation_problems(data["annotations"], valid_images, categories)
    _raise_problems(json_file, problems)
    # Where several processes read the same files, one of them need look at the pixels.
    if check_images and comm.is_main_process():
        _raise_problems(json_file, _file_problems(images, json_file, image_root))


def _raise_problems(json_file, problems):
    if not problems:
        return
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    shown = "".join(f"\n  {problem}" for problem in problems[:_NUM_PROBLEMS_SHOWN])
    more = "\n  ..." if len(problems) > _NUM_PROBLEMS_SHOWN else ""
    raise DatasetError(f"{count} in {json_file}:{shown}{more}")


def _record_problem(record, keys):
    """What is wrong with the keys of an image, category or annotation, or None."""
    if not isinstance(record, dict):
        return f"is {json.dumps(record)[:40]}, not an object; correct or remove it."
    for key, type_ in keys.items():
        if key not in record:
            return f"has no '{key}'; add it."
        if not isinstance(record[key], type_):
            return f"has {key} {record[key]!r}, which must be {_TYPE_NAMES[type_]}; correct it."
    return None


def _label(kind, index, record):
    """How messages name a record: by its id, and by its index in the file where it has none."""
    if not isinstance(record, dict) or "id" not in record:
        return f"{kind} at index {index}"
    if isinstance(record.get("file_name"), str):
        return f"{kind} {record['id']} ('{record['file_name']}')"
    if "image_id" in record:
        return f"{kind} {record['id']} (of image {record['image_id']})"
    return f"{kind} {record['id']}"


def _list_problems(kind, records, keys):
    """Missing keys, wrong types and repeated ids."""
    problems, seen = [], set()
    for index, record in enumerate(records):
        problem = _record_problem(record, keys)
        if problem is None and record.get("id") is not None:  # annotations can do without
            if not isinstance(record["id"], int):
                problem = "has an id that is not a whole number; correct it."
            elif record["id"] in seen:
                problem = f"has the id of an earlier {kind}; make ids unique."
            else:
                seen.add(record["id"])
        if problem is not None:
            problems.append(f"{_label(kind, index, record)} {problem}")
    return problems


def _category_problems(categories):
    if not categories:
        return ["'categories' is empty; add the classes."]
    return _list_problems("category", categories, _CATEGORY_KEYS)


def _image_problems(images):
    if not images:
        return ["'images' is empty; add the images."]
    problems = _list_problems("image", images, _IMAGE_KEYS)
    for index, image in enumerate(images):
        if _record_problem(image, _IMAGE_KEYS) is None and min(image["height"], image["width"]) < 1:
            size = f"{image['width']} x {image['height']}"
            problems.append(f"{_label('image', index, image)} has the size {size}; correct it.")
    return problems


def _annotation_problems(annotations, images, categories):
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    category_ids = {c["id"] for c in categories if not _record_problem(c, _CATEGORY_KEYS)}
    problems = _list_problems("annotation", annotations, _ANNOTATION_KEYS)
    for index, annotation in enumerate(annotations):
        if _record_problem(annotation, _ANNOTATION_KEYS) is not None:
            continue
        if annotation["image_id"] not in sizes:
            problem = "has an image_id that no image has; correct or remove it."
        elif annotation["category_id"] not in category_ids:
            problem = (
                f"has category_id {annotation['category_id']}, which no category has; add the "
                "category, or correct or remove the annotation."
            )
        elif annotation.get("ignore"):
            problem = "has 'ignore' set, which is not supported; use 'iscrowd' or remove it."
        else:
            problem = _box_problem(annotation["bbox"], *sizes[annotation["image_id"]])
        if problem is not None:
            problems.append(f"{_label('annotation', index, annotation)} {problem}")
    return problems


def _box_problem(bbox, height, width):
    """What is wrong with an [x, y, width, height] box in an image of that size, or None."""
    numbers = [v for v in bbox if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(bbox) != 4 or len(numbers) != 4:
        return f"has bbox {bbox}, which must be 4 numbers; correct or remove it."
    if not all(math.isfinite(v) for v in bbox):
        return f"has bbox {bbox}, which is not finite; correct or remove it."
    x, y, box_width, box_height = bbox
    if box_width <= 0 or box_height <= 0:
        return f"has bbox {bbox}, whose width or height is not positive; correct or remove it."
    tolerance = _BORDER_TOLERANCE
    within = (
        min(x, y) >= -tolerance
        and x + box_width <= width + tolerance
        and y + box_height <= height + tolerance
    )
    overlaps = x < width and y < height and x + box_width > 0 and y + box_height > 0
    if not (within and overlaps):
        return (
            f"has bbox {bbox}, which lies outside its image of {width} x {height} pixels; "
            "correct or remove it."
        )
    return None


def _file_problems(images, json_file, image_root):
    """Decode all images in a few threads."""

    def problem(image):
        try:
            path = os.path.join(image_root, image["file_name"])
            check_image(path, image["height"], image["width"])
        except DatasetError as error:
            return f"image {image['id']}: {error}"
        return None

    start = time.perf_counter()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        problems = [found for found in pool.map(problem, images) if found is not None]
    seconds = time.perf_counter() - start
    logger.info("Checked the %d images of %s in %.1f s.", len(images), json_file, seconds)
    return problems


def _complete(data, json_file):
    """
    Path of a JSON that Detectron2 and pycocotools read in full: `json_file` itself, or a
    completed copy in the cache folder where it lacks something.
    """
    annotations = data["annotations"]
    if "info" in data and all(map(_is_complete, annotations)):
        return json_file
    used_ids = {annotation.get("id") for annotation in annotations} - {None}
    next_id = max(used_ids, default=0) + 1
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
        if not _is_usable_segmentation(annotation.get("segmentation")):
            del annotation["segmentation"]
        completed.append(annotation)
    text = json.dumps({"info": {}, **data, "annotations": completed})
    path = cache_dir() / "coco" / f"{Path(json_file).stem}_{_short_hash(text)}.json"
    create_once(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    logger.info("%s lacks keys that the evaluation needs; using %s.", json_file, path)
    return str(path)


def _is_complete(annotation):
    # pycocotools takes a match with annotation 0 for no match, so 0 does not count as an id.
    return (
        bool(annotation.get("id"))
        and annotation.get("area") is not None
        and annotation.get("iscrowd") is not None
        and _is_usable_segmentation(annotation.get("segmentation"))
    )


def _is_usable_segmentation(segmentation):
    """Detectron2 silently drops objects whose polygons are all degenerate, box included."""
    if isinstance(segmentation, dict):
        return "counts" in segmentation and "size" in segmentation
    if isinstance(segmentation, list) and segmentation:
        if not all(isinstance(polygon, list) for polygon in segmentation):
            return False
        return any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation)
    return not segmentation

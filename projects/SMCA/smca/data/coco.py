"""Data sets in COCO's format: checked before they are used, registered in Detectron2's catalog."""

import contextlib
import json
import logging
import os
import time
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n

from smca.errors import DatasetError

from .cache import cache_dir, create_once, name_for
from .coco_checks import (
    WRITTEN,
    PathLike,
    Record,
    category_problems,
    existing,
    file_problems,
    in_threads,
    raise_problems,
    read_coco,
    record_problems,
    remarks_on,
    source_of,
    written_id,
)

logger = logging.getLogger(__name__)

Paths = Union[PathLike, Sequence[PathLike]]


def register_coco(
    json_file: Paths,
    image_root: Paths,
    check_images: bool = True,
    categories_from: Optional[Paths] = None,
    classes: Optional[Sequence[str]] = None,
) -> Union[str, List[str]]:
    """Check COCO-format detection data and register them in Detectron2's catalogs.

    Each of several files is a data set of its own, so that image ids need to be unique only within
    a file. Calling it again with the same files returns the same names without another check, as
    long as the files do not change.

    A file that lacks keys which Detectron2 or pycocotools need (``area``, ``iscrowd``, ``id``), or
    has ids that they cannot take, is completed in a copy in the cache folder, where ids are 1, 2,
    ...: `image_ids` and `category_ids` give the file's own. The file itself is never changed.

    Args:
        json_file: one or several; boxes are [x, y, width, height] in pixels. Several files must
            have categories of the same names, which the first one orders by their ids.
        image_root: the folder that ``file_name`` is relative to; one for all files, or one for
            each.
        check_images: decode every image and compare its size with the JSON's. A note in the cache
            folder says that this was done, as long as the files' sizes and times stay the same.
        categories_from: another COCO JSON, usually the training set's, that must have categories
            of the same names; it orders them.
        classes: names of the classes in a model's order, in place of `categories_from`.

    Returns:
        The name of the data set; for a list of files, the list of names. A DatasetError lists the
        first problems of data that cannot be used, and their number.
    """
    files, roots = as_list(json_file) or [None], as_list(image_root) or [None]
    if len(roots) not in (1, len(files)):
        raise DatasetError(
            f"There are {len(roots)} image folders for {len(files)} annotation files: give one "
            "folder, or one for each file."
        )
    owner = None
    if classes is None and (categories_from is not None or len(files) > 1):
        owner = as_list(categories_from or files)[0]
        if categories_from is not None and not os.path.isfile(os.path.expanduser(owner)):
            raise DatasetError(
                f"The annotation file {owner}, whose categories {files[0]} has to have, does "
                "not exist: correct the path. (An evaluation needs it only for a checkpoint that "
                "does not say its classes; dataloader.test.dataset.names.categories_from=null and "
                "model.num_classes=N do without.)"
            )
        classes = class_names(owner)
    for file in files if classes is not None else ():
        check_classes(file, classes or [], owner)
    pairs = zip(files, roots * len(files))
    names = [_register(file, root, check_images, classes) for file, root in pairs]
    return names[0] if isinstance(json_file, (str, os.PathLike)) else names


def _register(
    json_file: PathLike, image_root: PathLike, check_images: bool, classes: Optional[Sequence[str]]
) -> str:
    json_file = existing(json_file, os.path.isfile, "annotation file")
    image_root = existing(image_root, os.path.isdir, "image folder")
    if classes is not None and list(classes) == class_names(json_file):
        classes = None
    status = os.stat(json_file)
    state = (json_file, status.st_mtime_ns, status.st_size, image_root, classes)
    name = name_for(json_file, state)
    if name in DatasetCatalog.list():
        return name

    data = read_coco(json_file)
    raise_problems(source_of(data, json_file), record_problems(data))
    # Where several processes read the same files, one of them need look at the pixels.
    if check_images and comm.is_main_process():
        _check_files(data, json_file, image_root)
    for remark in remarks_on(data, json_file):
        log_first_n(logging.WARNING, remark, key="message", name=__name__)
    images, categories = sorted_by_id(data["images"]), _ordered(data["categories"], classes)
    used_file = json_file
    used = [[record["id"] for record in records] for records in (images, categories)]
    if not _is_complete(data, json_file) or used[1] != sorted(used[1]):
        used = [list(range(1, len(records) + 1)) for records in (images, categories)]
        used_file = _complete(data, json_file, images, categories)
    DatasetCatalog.register(name, lambda: dataset_dicts(read_coco(used_file), image_root))
    MetadataCatalog.get(name).set(
        json_file=used_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={key: index for index, key in enumerate(used[1])},
        category_ids=[written_id(category) for category in categories],
        image_ids=dict(zip(used[0], map(written_id, images))),
    )
    return name


def dataset_dicts(
    data: Mapping[str, Any], image_root: PathLike, classes: Optional[Sequence[str]] = None
) -> List[Record]:
    """The images of a COCO JSON without problems in Detectron2's format, by their ids. Only what
    boxes need is read of the annotations. `classes` are the names of all categories in the order of
    their indices; None: that of the ids."""
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


def category_ids(dataset: str) -> List[Union[int, str]]:
    """The ids that a registered data set's JSON has, by class index; empty if they are unknown."""
    metadata = MetadataCatalog.get(dataset)
    indices = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    return metadata.get("category_ids") or sorted(indices, key=lambda key: indices[key])


def image_ids(dataset: str) -> Dict[int, Union[int, str]]:
    """From each ``image_id`` of a data set registered here to the one that its JSON has."""
    return MetadataCatalog.get(dataset).get("image_ids") or {}


def class_names(json_file: Paths) -> List[str]:
    """Names of the categories in one or several COCO JSONs, in the order of the first one's ids. A
    file without usable categories, or with others than the first, is a DatasetError."""
    first, *others = as_list(json_file)
    data = read_coco(first)
    raise_problems(source_of(data, first), category_problems(data["categories"]))
    names = [category["name"] for category in sorted_by_id(data["categories"])]
    for other in others:
        check_classes(other, names, first)
    return names


def num_classes(json_file: Paths) -> int:
    """Number of categories in a COCO JSON, or each of several; errors as in :func:`class_names`."""
    return len(class_names(json_file))


def num_images(json_file: Paths) -> int:
    """Number of images in a COCO JSON, or in several together; errors as in :func:`read_coco`."""
    return sum(len(read_coco(file)["images"]) for file in as_list(json_file))


def require_dataset(names: Union[str, Sequence[str]]) -> None:
    """Make sure that registered data sets are on the disk, at next to no cost; the embedded data
    sets are made if need be. An unknown name, or a missing file or folder, is a DatasetError."""
    for name in as_list(names):
        if name not in DatasetCatalog.list():
            raise DatasetError(
                f"Data set '{name}' is not registered: correct dataloader.train.dataset.names or "
                "dataloader.test.dataset.names, or register it first."
            )
        metadata = MetadataCatalog.get(name)
        if metadata.get("make_files") is not None:
            metadata.make_files()
        for key, kind in (("json_file", "annotation file"), ("image_root", "image folder")):
            path = metadata.get(key)
            if path is not None and not os.path.exists(path):  # not every data set has both
                root = os.environ.get("DETECTRON2_DATASETS")
                setting = f"is '{root}'" if root else "is not set, which means ./datasets"
                raise DatasetError(
                    f"Data set '{name}' needs the {kind} {os.path.abspath(path)}, which does not "
                    "exist: put it there, or set the environment variable DETECTRON2_DATASETS to "
                    f"the folder that has it (DETECTRON2_DATASETS {setting})."
                )


def as_list(one_or_more: Any) -> List[Any]:
    """One path or name, or a list of them, as a list."""
    is_one = one_or_more is None or isinstance(one_or_more, (str, os.PathLike))
    return [one_or_more] if is_one else list(one_or_more)


def check_classes(
    json_file: PathLike, classes: Sequence[str], owner: Optional[PathLike] = None
) -> None:
    """Raise a DatasetError unless a COCO JSON has categories of these names, in whatever order;
    the message names the JSON that has them, `owner`, or the model."""
    names = class_names(json_file)
    only_here = sorted(set(names) - set(classes))
    only_there = sorted(set(classes) - set(names))
    if only_here or only_there:
        source = source_of(read_coco(json_file), json_file)
        other = "the model" if owner is None else source_of(read_coco(owner), owner)
        sides = [("first", only_here), ("second", only_there)]
        differences = " and ".join(f"only the {side} has {found}" for side, found in sides if found)
        raise DatasetError(
            f"{source} and {other} must have the same categories, but {differences}: give both "
            "the same names in 'categories' (their ids and their order may differ)."
        )


def _check_files(data: Mapping[str, Any], json_file: str, image_root: str) -> None:
    """Decode all images, unless that was done and they are as they were."""
    images = data["images"]

    def state(image: Record) -> Any:
        """What decides whether the file can be read."""
        try:
            status = os.stat(os.path.join(image_root, image["file_name"]))
        except (OSError, ValueError):  # not there, or no name that a file can have
            return None
        size = (image["height"], image["width"])
        return image["file_name"], size, status.st_size, status.st_mtime_ns

    states = (json_file, image_root, list(in_threads(state, images)))
    note = cache_dir() / "checked" / name_for(json_file, states)
    with contextlib.suppress(OSError):  # without a cache, they are checked again
        if note.exists():
            return
    start = time.perf_counter()
    problems = [found for found in file_problems(images, image_root) if found is not None]
    seconds = time.perf_counter() - start
    logger.info("Checked the %d images of %s in %.1f s.", len(images), json_file, seconds)
    raise_problems(source_of(data, json_file), problems)
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def _is_complete(data: Mapping[str, Any], json_file: str) -> bool:
    """Whether Detectron2 and pycocotools can read a JSON as it is."""
    with open(json_file, "rb") as file:
        is_utf_8 = json.detect_encoding(file.read(4)) == "utf-8"  # without a byte order mark
    records = [*data["images"], *data["categories"], *data["annotations"]]
    return (
        is_utf_8
        and "info" in data
        and WRITTEN not in data
        # Evaluators keep ids as floats and in types of 32 and of 64 bits, with a sign and without.
        and all(type(each.get("id")) is int and 0 <= each["id"] < 2**31 for each in records)
        and not any(WRITTEN in each for each in records)
        # pycocotools takes a match with annotation 0 for no match.
        and all(a["id"] and a.get("area") and "iscrowd" in a for a in data["annotations"])
        and not any(a["iscrowd"] is None for a in data["annotations"])
    )


def _complete(
    data: Mapping[str, Any], json_file: str, images: List[Record], categories: List[Record]
) -> str:
    """Path of a completed copy in the cache folder. Images and categories get the ids 1, 2, ... in
    the order in which they are given."""
    image_ids = {image["id"]: number for number, image in enumerate(images, 1)}
    category_ids = {category["id"]: number for number, category in enumerate(categories, 1)}
    annotations = [
        {
            **annotation,
            "id": number,
            "image_id": image_ids[annotation["image_id"]],
            "category_id": category_ids[annotation["category_id"]],
            "area": annotation.get("area") or annotation["bbox"][2] * annotation["bbox"][3],
            "iscrowd": annotation.get("iscrowd") or 0,
        }
        for number, annotation in enumerate(data["annotations"], 1)
    ]
    changed = {
        "images": [{**image, "id": image_ids[image["id"]]} for image in images],
        "annotations": annotations,
        "categories": [{**each, "id": category_ids[each["id"]]} for each in categories],
    }
    text = json.dumps({"info": {}, **data, **changed})
    path = cache_dir() / "coco" / f"{name_for(json_file, text)}.json"
    create_once(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    logger.info(
        "%s is evaluated by a copy in which keys and ids are completed: %s.", json_file, path
    )
    return str(path)

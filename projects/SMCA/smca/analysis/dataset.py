"""A data set before training: its problems, statistics, and pictures as the model gets them."""

import collections
import hashlib
import os
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np
from detectron2.utils.env import seed_all_rng
from matplotlib.figure import Figure
from tqdm import tqdm

from smca.analysis.detections import draw_contact_sheet, draw_instances, evenly
from smca.data import coco_checks as checks
from smca.data.coco import check_classes, class_names, dataset_dicts, sorted_by_id
from smca.data.fitted import MAX_QUERIES
from smca.data.mapper import has_more_than_8_bits
from smca.errors import DatasetError, counted

_FEW_OBJECTS = 20  # of a class
_AP_DETECTIONS = 100  # that COCO's evaluation takes of an image


@dataclass
class DataSplit:
    """A COCO JSON with what is wrong with it."""

    json_file: str
    problems: List[checks.Problem]  # all that keep it from being used
    # of the valid categories, by ascending id, or in the order of the data set whose it has to have
    class_names: List[str]
    dataset_dicts: List[Dict[str, Any]]  # its valid images with their valid annotations
    source: str  # what messages name: the JSON, or the folder of labels that it was made from
    remarks: List[str]  # on what was left out when it was made


def examine(
    json_file: str,
    image_root: str,
    *,
    categories_from: Optional[str] = None,
    check_images: bool = True,
    title: str = "",
) -> DataSplit:
    """Find all problems of a data set in COCO's format. A missing file or folder, or a file that is
    no COCO JSON, is a DatasetError.

    Args:
        json_file, image_root: the file, and the folder that ``file_name`` is relative to.
        categories_from: another COCO JSON that must have the same categories.
        check_images: decode every image, in a few threads.
        title: of the progress bar.
    """
    image_root = checks.existing(image_root, os.path.isdir, "image folder")
    data = checks.read_coco(json_file)
    problems = checks.record_problems(data)
    order: Optional[List[str]] = None
    if categories_from is not None:
        try:
            names = class_names(categories_from)
            check_classes(json_file, names, categories_from)
            order = names
        except DatasetError as error:
            problems.append(checks.Problem("categories differ", str(error), data["categories"]))
    bad = {id(problem.record) for problem in problems}
    images = [image for image in data["images"] if id(image) not in bad]
    if check_images:
        checked = checks.file_problems(images, image_root)
        progress = tqdm(checked, title, len(images), unit="image", disable=None)
        problems += [problem for problem in progress if problem is not None]
        bad = {id(problem.record) for problem in problems}
    kinds = ("images", "categories", "annotations")
    good = {kind: [each for each in data[kind] if id(each) not in bad] for kind in kinds}
    image_ids, category_ids = ({each["id"] for each in good[kind]} for kind in kinds[:2])
    good["annotations"] = [
        each
        for each in good["annotations"]
        if each["image_id"] in image_ids and each["category_id"] in category_ids
    ]
    return DataSplit(
        json_file,
        problems,
        order or [category["name"] for category in sorted_by_id(good["categories"])],
        dataset_dicts(good, image_root, order),
        checks.source_of(data, json_file),
        checks.remarks_on(data, json_file),
    )


def statistics_of(*splits: DataSplit) -> Dict[str, Any]:
    """Sizes and numbers, for JSON, of what is valid of a data set, without crowds, or of several
    together: those that have the first one's classes. Sizes are in pixels; an object's is the
    square root of its box's area."""
    names = splits[0].class_names
    items = [item for split in splits if split.class_names == names for item in split.dataset_dicts]
    objects = [[a for a in item["annotations"] if not a["iscrowd"]] for item in items]
    classes = [a["category_id"] for of_image in objects for a in of_image]
    boxes = np.array([a["bbox"] for of_image in objects for a in of_image]).reshape(-1, 4)
    columns = {
        "image_width": [item["width"] for item in items],
        "image_height": [item["height"] for item in items],
        "objects_per_image": list(map(len, objects)),
        "object_size": np.sqrt(boxes[:, 2] * boxes[:, 3]),
        "object_width_by_height": boxes[:, 2] / boxes[:, 3],
    }
    counts = np.bincount(np.array(classes, dtype=np.int64), minlength=len(names))
    return {
        "images": len(items),
        "objects": len(classes),
        "objects_of_classes": dict(zip(names, counts.tolist())),
        "percentiles_5_25_50_75_95": {
            name: np.percentile(v, [5, 25, 50, 75, 95]).round(3).tolist() if len(v) else None
            for name, v in columns.items()
        },
        "most_objects_in_an_image": max(map(len, objects), default=0),
    }


def training_splits(splits: Mapping[str, DataSplit]) -> Dict[str, DataSplit]:
    """Those that train, which count as one: "train", or "train 1", "train 2", ..."""
    return {name: split for name, split in splits.items() if name.startswith("train")}


def find_remarks(splits: Mapping[str, DataSplit], num_examples: int = 3) -> List[str]:
    """Sentences on what does not keep a data set from being used, but may not be meant, with so
    many examples of pictures in two places. Splits have names as in `training_splits`."""
    remarks = [f"{name}: {remark}" for name, split in splits.items() for remark in split.remarks]
    training = training_splits(splits)
    groups = {"train": list(training.values())}
    groups.update({name: [split] for name, split in splits.items() if name not in training})
    for name, group in groups.items():
        least = _FEW_OBJECTS if name == "train" else 1
        counts = statistics_of(*group)["objects_of_classes"].items()
        few = [f"'{class_name}' ({count})" for class_name, count in counts if count < least]
        if few and any(split.dataset_dicts for split in group):
            remarks.append(f"{name}: few objects of the classes {', '.join(few)}.")
    for name, split in splits.items():
        items = split.dataset_dicts
        numbers = [sum(not a["iscrowd"] for a in item["annotations"]) for item in items]
        if 0 in numbers:
            remarks.append(f"{name}: {counted(numbers.count(0), 'image')} without objects.")
        full = sum(number > _AP_DETECTIONS for number in numbers)
        if name in training and max(numbers, default=0) > MAX_QUERIES:
            remarks.append(
                f"{name}: {max(numbers)} objects in one image: set model.num_queries to more, or "
                f"no more than {MAX_QUERIES} are found."
            )
        if full and name not in training:
            remarks.append(
                f"{name}: {counted(full, 'image')} with more than {_AP_DETECTIONS} objects: AP "
                "takes no more detections of an image, so it cannot reach 100."
            )
        deep = sum(has_more_than_8_bits(item["file_name"]) for item in items)
        if deep:
            remarks.append(
                f"{name}: {counted(deep, 'image')} of more than 8 bits, read by the bits that the "
                "greatest level of each needs: scale all files to 16 bits if their brightness "
                "should be comparable."
            )
        seen = collections.Counter(
            (item["image_id"], a["category_id"], tuple(a["bbox"]))
            for item in items
            for a in item["annotations"]
        )
        repeated = [(image, box) for (image, _, box), count in seen.items() if count > 1]
        if repeated:
            remarks.append(
                f"{name}: {counted(len(repeated), 'object')} annotated more than once with the "
                f"same box, such as {list(repeated[0][1])} in image {repeated[0][0]}."
            )
    for where, pairs in _same_files(splits).items():
        examples = "; ".join(" and ".join(dict.fromkeys(pair)) for pair in pairs[:num_examples])
        count = counted(len(pairs), "picture")
        remarks.append(f"{where}: {count} in two places, such as {examples}.")
    return remarks


def _same_files(splits: Mapping[str, DataSplit]) -> Dict[str, List[Tuple[str, str]]]:
    """Pairs of images with the same content, by where they are: "train", or "train and val"."""
    by_size: Dict[int, List[Tuple[str, str]]] = collections.defaultdict(list)
    for name, split in splits.items():
        for path in (item["file_name"] for item in split.dataset_dicts):
            if os.path.isfile(path):
                by_size[os.path.getsize(path)].append((name, path))
    first: Dict[bytes, Tuple[str, str]] = {}
    pairs: Dict[str, List[Tuple[str, str]]] = collections.defaultdict(list)
    for of_size in by_size.values():
        for name, path in of_size if len(of_size) > 1 else ():
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read()).digest()
            if digest in first:
                where = " and ".join(dict.fromkeys((first[digest][0], name)))
                pairs[where].append((first[digest][1], path))
            first.setdefault(digest, (name, path))
    return pairs


def draw_training_images(
    mapper: Callable[[Dict[str, Any]], Dict[str, Any]],
    split: DataSplit,
    count: int = 12,
    image_format: str = "RGB",
    seed: int = 0,
) -> Figure:
    """A contact sheet of so many images of a split that have objects, at least one, and boxes as
    the training mapper, of that image format and with that seed, gives them to the model."""
    seed_all_rng(seed)
    with_objects = [item for item in split.dataset_dicts if item["annotations"]]
    pictures, captions = [], []
    for item in evenly(with_objects, count):
        mapped = mapper(item)
        image = mapped["image"].numpy().transpose(1, 2, 0)
        image = np.ascontiguousarray(image if image_format == "RGB" else image[:, :, ::-1])
        pictures.append(draw_instances(image, mapped["instances"], split.class_names))
        captions.append(
            f"{os.path.basename(item['file_name'])}: {item['width']} x {item['height']} -> "
            f"{image.shape[1]} x {image.shape[0]}"
        )
    return draw_contact_sheet(pictures, captions, num_columns=3)

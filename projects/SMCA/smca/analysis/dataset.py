"""A data set before training: its problems, statistics, pictures as the model gets them, and which
settings suit it."""

import collections
import hashlib
import math
import os
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.env import seed_all_rng
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from smca.analysis.detections import DPI, draw_contact_sheet, draw_instances
from smca.analysis.pictures import evenly
from smca.data import (
    DatasetError,
    Problem,
    check_same_categories,
    file_problems,
    read_coco,
    record_problems,
)

__all__ = [
    "Advice",
    "DataSplit",
    "Statistics",
    "collect_statistics",
    "draw_statistics",
    "draw_training_images",
    "examine",
    "find_remarks",
    "recommend",
]

_SMALL, _LARGE = 10, 90  # percentiles of the sizes of "small" and "large" objects
_MAX_CLASSES_DRAWN = 40
_FEW_OBJECTS = 20  # of a class
# From the measured study, docs/convergence.md: its best models see a small object as 3 cells of
# their finest scale (25 and 27 pixels at stride 8), with maps that start at 8 pixels, a third of
# it. Its objects are alike in size, and 40 queries were enough for 30 objects an image.
_CELLS = 3
_START_RADIUS = 1 / 3  # of a small object
_ALIKE = 3  # large by small objects: 2.5 and 1.5 in the study
_QUERIES_BY_OBJECTS, _MIN_QUERIES = 1.4, 40
_SHORT_SIDES = (128, 800)  # pixels: the study's least, and the published one
_PUBLISHED_BETA = 8.0


@dataclass
class DataSplit:
    """A COCO JSON with what is wrong with it.

    Attributes:
        json_file, image_root: where it is.
        problems: all that keep it from being used.
        class_names: of the valid categories, by ascending id.
        dataset_dicts: its valid images with their valid annotations, in Detectron2's format.
    """

    json_file: str
    image_root: str
    problems: List[Problem]
    class_names: List[str]
    dataset_dicts: List[Dict[str, Any]]


def examine(
    json_file: str,
    image_root: str,
    *,
    categories_from: Optional[str] = None,
    check_images: bool = True,
    progress: Callable[..., Iterable[Any]] = lambda items, total: items,
) -> DataSplit:
    """Find all problems of a data set.

    Args:
        json_file: in COCO's format.
        image_root: the folder that ``file_name`` is relative to.
        categories_from: another COCO JSON that must have the same categories.
        check_images: decode every image, in a few threads.
        progress: wraps the images, whose number is `total`, as `tqdm.tqdm` does.

    Raises:
        DatasetError: the file is missing or no COCO JSON.
    """
    data = read_coco(json_file)
    problems = record_problems(data)
    if categories_from is not None:
        try:
            check_same_categories(json_file, categories_from)
        except DatasetError as error:
            problems.append(Problem("categories differ", str(error), data["categories"]))
    bad = {id(problem.record) for problem in problems}
    images = [image for image in data["images"] if id(image) not in bad]
    if check_images:
        checked = progress(file_problems(images, image_root), total=len(images))
        found = [problem for problem in checked if problem is not None]
        bad |= {id(problem.record) for problem in found}
        problems += found
    categories = [category for category in data["categories"] if id(category) not in bad]
    categories.sort(key=lambda category: category["id"])
    indices = {category["id"]: index for index, category in enumerate(categories)}
    by_image: Dict[int, List[Dict[str, Any]]] = {
        image["id"]: [] for image in images if id(image) not in bad
    }
    for annotation in data["annotations"]:
        is_usable = id(annotation) not in bad and annotation["category_id"] in indices
        if is_usable and annotation["image_id"] in by_image:
            by_image[annotation["image_id"]].append(
                {
                    "bbox": annotation["bbox"],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": indices[annotation["category_id"]],
                    "iscrowd": annotation.get("iscrowd") or 0,
                }
            )
    dataset_dicts = [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": by_image[image["id"]],
        }
        for image in images
        if image["id"] in by_image
    ]
    names = [category["name"] for category in categories]
    return DataSplit(json_file, image_root, problems, names, dataset_dicts)


# Statistics


@dataclass
class Statistics:
    """Sizes and numbers of a data set; crowds are left out.

    Attributes:
        class_names: of the C classes.
        image_sizes: (I, 2) int, width and height in pixels.
        objects_per_image: (I).
        classes: (N) class index of each object.
        boxes: (N, 4) XYWH in pixels.
        images: (N) index of each object's image.
    """

    class_names: List[str]
    image_sizes: np.ndarray
    objects_per_image: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    images: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """(N) square root of each box's area, in pixels."""
        return np.sqrt(self.boxes[:, 2] * self.boxes[:, 3])

    @property
    def objects_per_class(self) -> np.ndarray:
        """(C)."""
        return np.bincount(self.classes, minlength=len(self.class_names))

    def scaled_sizes(self, short_side: int, max_size: float = math.inf) -> np.ndarray:
        """(N) sizes where an image's short side becomes `short_side` pixels, but its long side no
        longer than `max_size`."""
        short, long = self.image_sizes.min(axis=1), self.image_sizes.max(axis=1)
        factors = np.minimum(short_side / short, max_size / long)
        return self.sizes * factors[self.images]

    def to_json(self) -> Dict[str, Any]:
        """A summary in plain types; quartiles are (5, 25, 50, 75, 95) percentiles."""

        def quantiles(values: np.ndarray) -> Optional[List[float]]:
            if not len(values):
                return None
            return np.percentile(values, [5, 25, 50, 75, 95]).round(3).tolist()

        return {
            "images": len(self.image_sizes),
            "objects": len(self.boxes),
            "objects_of_classes": dict(zip(self.class_names, self.objects_per_class.tolist())),
            "percentiles_5_25_50_75_95": {
                "image_width": quantiles(self.image_sizes[:, 0]),
                "image_height": quantiles(self.image_sizes[:, 1]),
                "objects_per_image": quantiles(self.objects_per_image),
                "object_size": quantiles(self.sizes),
                "object_width_by_height": quantiles(self.boxes[:, 2] / self.boxes[:, 3]),
            },
            "most_objects_in_an_image": int(self.objects_per_image.max(initial=0)),
        }


def collect_statistics(split: DataSplit) -> Statistics:
    """Statistics of what is valid of a data set."""
    boxes, classes, images, counts = [], [], [], []
    for index, item in enumerate(split.dataset_dicts):
        objects = [a for a in item["annotations"] if not a["iscrowd"]]
        counts.append(len(objects))
        boxes += [a["bbox"] for a in objects]
        classes += [a["category_id"] for a in objects]
        images += [index] * len(objects)
    return Statistics(
        class_names=split.class_names,
        image_sizes=np.array(
            [(item["width"], item["height"]) for item in split.dataset_dicts], dtype=np.int64
        ).reshape(-1, 2),
        objects_per_image=np.array(counts, dtype=np.int64),
        classes=np.array(classes, dtype=np.int64),
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        images=np.array(images, dtype=np.int64),
    )


def find_remarks(splits: Mapping[str, DataSplit]) -> List[str]:
    """What does not keep a data set from being used, but may not be meant.

    Args:
        splits: by their names; "train" among them.

    Returns:
        Sentences.
    """
    remarks = []
    for name, split in splits.items():
        statistics = collect_statistics(split)
        empty = int((statistics.objects_per_image == 0).sum())
        if empty:
            remarks.append(f"{name}: {_count(empty, 'image')} without objects.")
        for class_name, count in zip(split.class_names, statistics.objects_per_class.tolist()):
            if count < (_FEW_OBJECTS if name == "train" else 1):
                remarks.append(f"{name}: class '{class_name}' has {_count(count, 'object')}.")
        seen = collections.Counter(
            (item["image_id"], a["category_id"], tuple(a["bbox"]))
            for item in split.dataset_dicts
            for a in item["annotations"]
        )
        repeated = [key for key, count in seen.items() if count > 1]
        if repeated:
            image_id, _, box = repeated[0]
            remarks.append(
                f"{name}: {_count(len(repeated), 'object')} annotated more than once with the "
                f"same box, such as {list(box)} in image {image_id}."
            )
    for first, second in _same_files(splits):
        remarks.append(f"The same picture is in two places: {first} and {second}.")
    return remarks


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _same_files(splits: Mapping[str, DataSplit]) -> List[Tuple[str, str]]:
    """Pairs of images with the same content, within a split or in two."""
    paths = [item["file_name"] for split in splits.values() for item in split.dataset_dicts]
    by_size: Dict[int, List[str]] = collections.defaultdict(list)
    for path in paths:
        if os.path.isfile(path):
            by_size[os.path.getsize(path)].append(path)
    first: Dict[bytes, str] = {}
    pairs = []
    for of_size in by_size.values():
        for path in of_size if len(of_size) > 1 else ():
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read()).digest()
            if digest in first:
                pairs.append((first[digest], path))
            first.setdefault(digest, path)
    return pairs


# Pictures


def draw_statistics(statistics: Mapping[str, Statistics]) -> Figure:
    """Classes, sizes, aspect ratios, objects an image, image sizes and centres.

    Args:
        statistics: of each split, by its name.
    """
    figure = Figure((15, 8.5), dpi=DPI, layout="constrained")
    (classes, sizes, ratios), (counts, images, centres) = figure.subplots(2, 3)
    _draw_classes(classes, statistics)
    _draw_shares(sizes, {name: found.sizes for name, found in statistics.items()}, log=True)
    aspect_ratios = {name: s.boxes[:, 2] / s.boxes[:, 3] for name, s in statistics.items()}
    _draw_shares(ratios, aspect_ratios, log=True)
    _draw_shares(counts, {name: found.objects_per_image for name, found in statistics.items()})
    for name, found in statistics.items():
        images.plot(*found.image_sizes.T, ".", alpha=0.4, label=name)
    for side in (32, 96):
        sizes.axvline(side, color="grey", linestyle=":")
    sizes.set_xlabel("square root of an object's area (pixels; dotted: COCO's small, large)")
    ratios.set_xlabel("width by height of an object")
    counts.set_xlabel("objects in an image")
    images.set(xlabel="width of an image (pixels)", ylabel="height (pixels)")
    images.set_xlim(left=0)
    images.set_ylim(bottom=0)
    for axes in (classes, sizes, ratios, counts, images):
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    first = next(iter(statistics.values()))
    places = (first.boxes[:, :2] + first.boxes[:, 2:] / 2) / first.image_sizes[first.images]
    centres.hist2d(*places.T, bins=24, range=[[0, 1], [0, 1]], cmap="viridis")
    centres.invert_yaxis()
    centres.set_xlabel(f"where objects' centres are in the image ({next(iter(statistics))})")
    return figure


def _draw_classes(axes: Axes, statistics: Mapping[str, Statistics]) -> None:
    """The classes with most objects, in the order of the first split."""
    first = next(iter(statistics.values()))
    order = np.argsort(-first.objects_per_class, kind="stable")[:_MAX_CLASSES_DRAWN]
    names = [first.class_names[index] for index in order]
    height = 0.8 / len(statistics)
    for number, (split, found) in enumerate(statistics.items()):
        counts = dict(zip(found.class_names, found.objects_per_class.tolist()))
        places = np.arange(len(names)) + (number - (len(statistics) - 1) / 2) * height
        axes.barh(places, [counts.get(name, 0) for name in names], height, label=split)
    axes.set_yticks(range(len(names)), names, fontsize=9 if len(names) <= 20 else 5)
    axes.invert_yaxis()
    axes.set_xlabel("objects of a class")


def _draw_shares(axes: Axes, values: Mapping[str, np.ndarray], log: bool = False) -> None:
    """Histograms in percent, of each split."""
    everything = np.concatenate(list(values.values()))
    if not len(everything):
        return
    low, high = everything.min(), everything.max()
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        bins = np.geomspace(0.98 * low, 1.02 * high, 40)
    else:
        step = max(1, math.ceil((high - low + 1) / 40))
        bins = np.arange(low, high + step + 1, step) - 0.5
    for label, of_split in values.items():
        weights = np.full(len(of_split), 100 / max(len(of_split), 1))
        axes.hist(
            of_split, bins.tolist(), weights=weights, histtype="step", linewidth=1.5, label=label
        )
    axes.set_ylabel("%")


def draw_training_images(
    mapper: Callable[[Dict[str, Any]], Dict[str, Any]],
    split: DataSplit,
    count: int = 12,
    *,
    image_format: str = "RGB",
    seed: int = 0,
) -> Figure:
    """A contact sheet of images and boxes as the model gets them in training.

    Args:
        mapper: the training mapper, such as `smca.data.DetrDatasetMapper`.
        split: images are taken evenly from it, those with objects only; at least one.
        count: of images.
        image_format: the mapper's.
        seed: of the augmentation.
    """
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


# Recommendation


@dataclass
class Advice:
    """A setting that suits the data.

    Attributes:
        setting: its key, or what it is about.
        value: for a key, what to set; else words.
        reason: one sentence.
    """

    setting: str
    value: Any
    reason: str


def recommend(
    statistics: Statistics, finest_stride: int, num_scales: int, max_size: int = 1333
) -> List[Advice]:
    """Settings for the data, by what the measured study (docs/convergence.md) found.

    Args:
        statistics: of the training data.
        finest_stride: of the model's scales, in pixels.
        num_scales: of the model.
        max_size: limit of the long side, in pixels.

    Returns:
        One for queries, image size, beta and the model's scales; none without objects.
    """
    if not len(statistics.boxes):
        return []
    short_side, cells = _short_side(statistics, finest_stride, max_size)
    small, large = np.percentile(
        statistics.scaled_sizes(short_side, max_size), [_SMALL, _LARGE]
    ).tolist()
    return [
        _advise_queries(statistics),
        Advice(
            "short_sides",
            short_side,
            f"small objects (the {_SMALL}th percentile) become {small:.0f} pixels, {cells:.1f} "
            f"cells of stride {finest_stride}; the study's models saw them as {_CELLS}"
            + ("." if cells >= _CELLS - 0.1 else ", which larger images would cost too much.")
            + _smallest_class(statistics, short_side, max_size, small),
        ),
        _advise_beta(small, finest_stride, num_scales),
        _advise_scales(small, large, cells, finest_stride),
    ]


def _advise_queries(statistics: Statistics) -> Advice:
    most = int(statistics.objects_per_image.max())
    queries = max(_MIN_QUERIES, 10 * math.ceil(_QUERIES_BY_OBJECTS * most / 10))
    reason = (
        f"an image has up to {most} objects and a query finds one at most; in the study "
        f"{_MIN_QUERIES} were enough for 30, and fewer are faster"
    )
    if most > 100:
        reason += ". COCO's AP counts the best 100 detections of an image only"
    return Advice("model.num_queries", queries, reason + ".")


def _short_side(statistics: Statistics, stride: int, max_size: int) -> Tuple[int, float]:
    """The least multiple of 32 at which small objects span enough cells, and how many they do."""
    sides = range(_SHORT_SIDES[0], _SHORT_SIDES[1] + 1, 32)
    for side in sides:
        small = np.percentile(statistics.scaled_sizes(side, max_size), _SMALL)
        if small >= _CELLS * stride:
            break
    return side, float(small / stride)


def _smallest_class(statistics: Statistics, short_side: int, max_size: int, small: float) -> str:
    """A sentence on the class of the smallest objects, if it is smaller than "small" ones."""
    sizes = statistics.scaled_sizes(short_side, max_size)
    medians = {
        name: float(np.median(sizes[statistics.classes == index]))
        for index, name in enumerate(statistics.class_names)
        if (statistics.classes == index).any()
    }
    name = min(medians, key=lambda name: medians[name])
    if medians[name] >= small:
        return ""
    return (
        f" Objects of the class '{name}' become only {medians[name]:.0f} pixels (median): take "
        "larger images if that class matters."
    )


def _advise_beta(small: float, stride: int, num_scales: int) -> Advice:
    """Inverts the radius at which a map starts at the finest scale, sqrt(beta / 2) cells, with
    several scales sqrt(16 beta stride) pixels."""
    radius = _START_RADIUS * small
    beta = 2 * (radius / stride) ** 2 if num_scales == 1 else radius**2 / (16 * stride)
    beta = min(float(f"{beta:.1g}"), _PUBLISHED_BETA)
    start = stride * math.sqrt(beta / 2) if num_scales == 1 else math.sqrt(16 * beta * stride)
    return Advice(
        "model.decoder.beta",
        beta,
        f"maps start with a radius of {start:.0f} pixels at stride {stride}, about a third of a "
        f"small object ({small:.0f} pixels); starting so, not twice as wide, took the study's "
        "models from AP 28.9 to 33.2 with one scale and from 16.6 to 21.9 with three.",
    )


def _advise_scales(small: float, large: float, cells: float, stride: int) -> Advice:
    ratio = large / small
    alike = f"large objects are {ratio:.1f} times as long as small ones"
    if ratio <= _ALIKE and cells >= _CELLS - 0.1:
        return Advice(
            "scales",
            f"one of stride {stride} is enough",
            f"{alike}; in the study (2.5 and 1.5 times) several scales gained nothing over one, "
            "and took two to three times as long (configs/convergence/coco_single_scale.py has "
            "one of stride 8).",
        )
    if cells < _CELLS - 0.1 and stride > 8:
        return Advice(
            "scales",
            "several, from stride 8",
            f"small objects are {cells:.1f} cells of stride {stride}: the convolutional encoder "
            "(configs/common/models/smca_conv.py) has stride 8.",
        )
    return Advice(
        "scales",
        "several",
        f"{alike}; on COCO several scales are ahead of one (43.7 over 41.0 AP), and in the study "
        "the convolutional encoder (configs/common/models/smca_conv.py) was ahead of the "
        "attention encoder (30.5 over 21.9, and 37.1 over 31.0).",
    )

"""Pictures of detections: boxes with class and score, beside the truth, many on a sheet."""

import functools
import logging
import math
import textwrap
import warnings
from typing import Any, Dict, FrozenSet, List, Sequence, Set

import matplotlib
import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.logger import log_first_n
from detectron2.utils.visualizer import VisImage, Visualizer
from matplotlib import font_manager
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from PIL import Image

from smca.errors import some

_MIN_LONG_SIDE = 480  # pixels; on anything smaller the labels would hide the objects
_MAX_ROWS = 4  # that a label moves down, lest it cover another one
DPI = 120


def draw_instances(
    image: np.ndarray, instances: Instances, class_names: Sequence[str] = ()
) -> np.ndarray:
    """Draw boxes with their class and, if they have one, their score; gives a picture like `image`.

    Args:
        image: (height, width, 3) uint8, RGB. A small image is enlarged by a whole factor.
        instances: on the CPU, in pixels of `image`: ``pred_boxes``, ``scores`` and
            ``pred_classes``, or ``gt_boxes`` and ``gt_classes`` (and perhaps ``gt_crowd``).
        class_names: a class without a name is shown by its index.
    """
    height, width = image.shape[:2]
    factor = math.ceil(_MIN_LONG_SIDE / max(height, width))
    image = np.asarray(Image.fromarray(image).resize((width * factor, height * factor)))
    is_truth = instances.has("gt_boxes")
    classes = instances.gt_classes if is_truth else instances.pred_classes
    boxes = (instances.gt_boxes if is_truth else instances.pred_boxes).clone()
    boxes.scale(factor, factor)
    boxes.clip(image.shape[:2])

    labels = [class_name(class_names, index) for index in classes.tolist()]
    if instances.has("scores"):
        scores = instances.scores.tolist()
        labels = [f"{label} {100 * score:.0f}%" for label, score in zip(labels, scores)]
    if instances.has("gt_crowd"):
        crowds = instances.gt_crowd.tolist()
        labels = [f"{label} (crowd)" if crowd else label for label, crowd in zip(labels, crowds)]
    labels = [plain_text(label) for label in labels]
    visualizer = _Visualizer(image, font_size_scale=1.4)
    colors = [class_color(index) for index in classes.tolist()]
    return visualizer.overlay_instances(
        boxes=boxes.tensor.numpy(), labels=labels, assigned_colors=colors
    ).get_image()


def draw_truth_and_detections(
    image: np.ndarray, truth: Instances, detections: Instances, class_names: Sequence[str] = ()
) -> np.ndarray:
    """The pictures of `draw_instances` of the truth, left, and of the detections, right."""
    left = draw_instances(image, truth, class_names)
    right = draw_instances(image, detections, class_names)
    gap = np.full((left.shape[0], max(4, left.shape[1] // 64), 3), 255, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def truth_of(dataset_dict: Dict[str, Any]) -> Instances:
    """The objects of a dataset dict in Detectron2's format: ``gt_boxes`` (XYXY in pixels of the
    original image), ``gt_classes`` and ``gt_crowd``."""
    annotations = dataset_dict.get("annotations", [])
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return Instances(
        (dataset_dict["height"], dataset_dict["width"]),
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64),
        gt_crowd=torch.tensor([bool(a.get("iscrowd", 0)) for a in annotations], dtype=torch.bool),
    )


def draw_contact_sheet(
    pictures: Sequence[np.ndarray], captions: Sequence[str], num_columns: int = 2
) -> Figure:
    """Pictures in rows, (height, width, 3) uint8 RGB of any sizes, each with its caption."""
    width = 7.0  # inches of a column
    rows = [pictures[i : i + num_columns] for i in range(0, len(pictures), num_columns)]
    heights = [width * max(map(aspect, row)) + 0.35 for row in rows]
    figure = Figure((width * num_columns, sum(heights)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(rows), num_columns, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set_axis_off()
        axes.set_anchor("N")
    for axes, picture, caption in zip(grid.flat, pictures, captions):
        axes.imshow(picture)
        axes.set_title(textwrap.fill(plain_text(caption), 130 // num_columns), fontsize=11)
    return figure


def evenly(items: Sequence[Any], count: int) -> List[Any]:
    """`count` items (or all, if there are fewer) at equal distances."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def aspect(image: np.ndarray) -> float:
    """Height by width of a picture's place on a page, from 0.2 to 2."""
    return min(max(image.shape[0] / image.shape[1], 0.2), 2.0)


def class_name(class_names: Sequence[str], index: int) -> str:
    """The name of a class, or its index if it has none."""
    return class_names[index] if index < len(class_names) else str(index)


def plain_text(text: str) -> str:
    """A text that Matplotlib draws as `text`. It would read a formula between two dollar signs,
    leave a label that begins with an underscore out of a legend, and fail at a file name that is
    not UTF-8. Where its font lacks letters, another one is added to ``rcParams["font.family"]``."""
    text = text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    if not text.isascii():
        _use_fonts_for(frozenset(text))
    return f" {text}" if text.startswith("_") else text


class _Visualizer(Visualizer):
    """Detectron2's. Boxes are opaque, thin, and have a black border. Labels may have letters of any
    font in Matplotlib's settings, end within the image, and do not cover one another where there is
    room."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._labels: List[Bbox] = []

    def draw_box(self, *args: Any, **kwargs: Any) -> VisImage:
        output = super().draw_box(*args, **{"alpha": 1.0, **kwargs})
        width = max(1.0, self._default_font_size / 6)  # points, which grow with the image
        output.ax.patches[-1].set_linewidth(width)
        border = withStroke(linewidth=1.6 * width, foreground="black")
        output.ax.patches[-1].set_path_effects([border])
        return output

    def draw_text(self, *args: Any, **kwargs: Any) -> VisImage:
        output = super().draw_text(*args, **kwargs)
        text = output.ax.texts[-1]
        text.set_fontfamily(matplotlib.rcParams["font.family"])
        box = text.get_window_extent(output.canvas.get_renderer())
        left = max(0.0, box.x1 - output.width)
        places = [box.translated(-left, -down * box.height) for down in range(_MAX_ROWS)]
        free = [p for p in places if p.y0 >= 0 and not p.count_overlaps(self._labels)]
        place = (free or places)[0]
        x, y = text.get_position()
        text.set_position((x - left, y + box.y1 - place.y1))
        self._labels.append(place)
        return output


@functools.lru_cache(maxsize=None)
def _use_fonts_for(letters: FrozenSet[str]) -> None:
    families = matplotlib.rcParams["font.family"]
    missing = {ord(letter) for letter in letters if not letter.isspace()}
    for family in families:
        missing -= _letters_of(font_manager.findfont(font_manager.FontProperties(family=[family])))
    for font in font_manager.fontManager.ttflist if missing else ():
        is_usual = font.style == "normal" and font.weight in (400, "normal", "regular")
        # Matplotlib's font of last resort has a box for every letter.
        if is_usual and "Last Resort" not in font.name and missing & _letters_of(font.fname):
            families = [*families, font.name]
            missing -= _letters_of(font.fname)
    matplotlib.rcParams["font.family"] = families
    if missing:  # of which Matplotlib warns for each letter
        warnings.filterwarnings("ignore", "Glyph|Matplotlib currently does not support")
        log_first_n(
            logging.WARNING,
            f"No installed font has the letters {some(list(map(chr, sorted(missing))))}: pictures "
            "have boxes in their place. Install a font that has them, such as Noto.",
            name=__name__,
        )


def _letters_of(font_file: str) -> Set[int]:
    return set(font_manager.get_font(font_file).get_charmap())


def class_color(index: int) -> np.ndarray:
    """(3,) RGB in [0, 1], the same for a class in all pictures."""
    # Neighbors are far apart on the color wheel, and all are bright.
    return hsv_to_rgb(((0.13 + 0.618 * index) % 1, 0.8, 1.0))

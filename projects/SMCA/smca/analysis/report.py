"""The page on one or several evaluated detectors: one HTML file that needs no other."""

import base64
import datetime
import io
import json
import math
import os
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import jinja2
import numpy as np
import torch
from detectron2.structures import BoxMode
from matplotlib.figure import Figure
from PIL import Image

from smca.analysis.detections import draw_truth_and_detections, plain_text, truth_of
from smca.analysis.evaluation import RECALLS, Evaluation
from smca.data import read_image

_DPI = 100
_MAX_CLASS_CURVES = 12
_MAX_CLASSES_WITH_NUMBERS = 20  # in a confusion matrix
_MAX_PICTURE_WIDTH = 1100  # pixels


def write_report(
    evaluations: Sequence[Evaluation],
    dataset_dicts: Sequence[Dict[str, Any]],
    output_dir: str,
    *,
    dataset: str = "",
    device: str = "",
    num_worst: int = 8,
) -> List[str]:
    """Write ``report.html``, and ``report.json`` with its numbers; gives their paths. An image that
    cannot be read is a UserError.

    Args:
        evaluations: at least one, all on the data `dataset_dicts`, in Detectron2's format.
        output_dir: is made if need be.
        dataset, device: what was evaluated on, and where.
        num_worst: pictures of each detector's worst images.
    """
    by_id = {item["image_id"]: item for item in dataset_dicts}
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = template.render(
        evaluations=evaluations,
        dataset=dataset,
        device=device,
        date=datetime.date.today().isoformat(),
        num_images=len(by_id),
        num_objects=sum(sum(c[::2]) for c in evaluations[0].counts.values()),
        classes=dict(zip(evaluations[0].class_names, evaluations[0].category_ids)),
        format=format,
        max=max,
        min=min,
        precision_recall=_png(draw_precision_recall(evaluations)),
        confusion=_png(draw_confusion(evaluations)),
        worst=[
            (evaluation.name, [_picture(evaluation, by_id[key]) for key in keys])
            for evaluation in evaluations
            for keys in [worst_images(evaluation, num_worst)]
        ],
    )
    os.makedirs(output_dir, exist_ok=True)
    html_file, json_file = (Path(output_dir) / f"report.{kind}" for kind in ("html", "json"))
    html_file.write_text(page, encoding="utf-8", errors="backslashreplace")
    content = {
        "dataset": dataset,
        "device": device,
        "detectors": [evaluation.to_json() for evaluation in evaluations],
    }
    json_file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return [str(html_file), str(json_file)]


def draw_precision_recall(evaluations: Sequence[Evaluation]) -> Figure:
    """Precision over recall with IoU 0.5: the mean of all classes, and the classes with most
    objects; a line for each detector."""
    first = evaluations[0].classes
    names = dict(zip(evaluations[0].category_ids, evaluations[0].class_names))
    with_objects = [key for key, values in first.items() if values["objects"]]
    with_objects.sort(key=lambda key: -first[key]["objects"])
    shown = with_objects[:_MAX_CLASS_CURVES]
    num_columns = min(4, 1 + len(shown))
    num_rows = math.ceil((1 + len(shown)) / num_columns)
    figure = Figure((3.6 * num_columns, 3.3 * num_rows), dpi=_DPI, layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes in grid[1 + len(shown) :]:
        axes.set_axis_off()
    for axes, key in zip(grid, [None, *shown]):
        keys, title = with_objects, "mean of the classes"
        if key is not None:
            keys, title = [key], f"{names[key]} ({first[key]['objects']} objects)"
        for evaluation in evaluations:
            curves = [evaluation.curves[k] for k in keys] or [0 * RECALLS]
            axes.plot(RECALLS, np.mean(curves, axis=0), label=plain_text(evaluation.name))
        axes.set(xlim=(0, 1), ylim=(0, 1.03), xlabel="recall", ylabel="precision")
        axes.set_title(plain_text(title), fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].legend(fontsize=8)
    return figure


def draw_confusion(evaluations: Sequence[Evaluation]) -> Figure:
    """Confusion matrices; colors are shares of a row."""
    num_classes = len(evaluations[0].class_names)
    has_numbers = num_classes <= _MAX_CLASSES_WITH_NUMBERS
    side = 2.2 + (0.55 if has_numbers else 0.13) * (num_classes + 1)
    size = ((side + 0.8) * len(evaluations), side)
    figure = Figure(size, dpi=_DPI, layout="constrained")
    grid = figure.subplots(1, len(evaluations), squeeze=False)[0]
    for axes, evaluation in zip(grid, evaluations):
        matrix = evaluation.confusion
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        ticks = range(num_classes + 1)
        fontsize = 9 if has_numbers else 5
        labels = [plain_text(name) for name in evaluation.class_names]
        axes.set_xticks(ticks, [*labels, "nothing"], rotation=90, fontsize=fontsize)
        axes.set_yticks(ticks, [*labels, "background"], fontsize=fontsize)
        axes.set(xlabel="detected as", ylabel="truth")
        title = f"{evaluation.name}, scores from {evaluation.threshold:.2f}"
        axes.set_title(plain_text(title), fontsize=10)
        for row, column in np.argwhere(matrix > 0) if has_numbers else ():
            color = "white" if shares[row, column] > 0.5 else "black"
            text = str(matrix[row, column])
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    return figure


def worst_images(evaluation: Evaluation, count: int) -> List[int]:
    """Ids of the images with the lowest F1, those with most mistakes first among equals; images
    without a mistake are left out."""

    def quality(image_id: int) -> Tuple[float, int]:
        found, false, missed = evaluation.counts[image_id]
        return 2 * found / (2 * found + false + missed), -(false + missed)

    wrong = [key for key, (_, false, missed) in evaluation.counts.items() if false + missed]
    return sorted(wrong, key=quality)[:count]


def _picture(evaluation: Evaluation, item: Dict[str, Any]) -> Dict[str, str]:
    """Truth and detections of an image, as the template takes it."""
    image = read_image(item["file_name"], item["height"], item["width"])
    found = [
        {
            **detection,
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": evaluation.category_ids.index(detection["category_id"]),
        }
        for detection in evaluation.detections
        if detection["image_id"] == item["image_id"] and detection["score"] >= evaluation.threshold
    ]
    detections = truth_of({**item, "annotations": found})
    detections.scores = torch.tensor([detection["score"] for detection in found])
    drawn = draw_truth_and_detections(image, truth_of(item), detections, evaluation.class_names)
    picture = Image.fromarray(drawn)
    picture.thumbnail((_MAX_PICTURE_WIDTH, 10 * _MAX_PICTURE_WIDTH))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    right, false, missed = evaluation.counts[item["image_id"]]
    return {
        "title": os.path.basename(item["file_name"]),
        "text": f"found {right}, false {false}, missed {missed}",
        "source": _data_uri(buffer, "jpeg"),
    }


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return _data_uri(buffer, "png")


def _data_uri(file: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"

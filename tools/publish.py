#!/usr/bin/env python
"""Make a folder of a trained detector that can be given away.

It holds what inference needs of a checkpoint (model.safetensors, config.yaml) and a model card
(README.md); `smca.Predictor.from_pretrained` and the commands' --weights read it:

    publish.py --weights output/demo/model_best.pth --output published --license cc-by-4.0
    publish.py --weights FILE --output DIR --license mit --data "My photographs"

AP in the card is what the training's metrics.json says of the checkpoint's iteration.
`hf upload USER/NAME DIR` brings the folder to the Hugging Face Hub.
"""

import argparse
import hashlib
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

from smca.analysis import read_metrics
from smca.config import dataset_names
from smca.errors import ConfigError, UserError, command_line, exit_code, writing
from smca.inference import Predictor, add_weights_kind
from smca.inference.pretrained import CONFIG_NAME, WEIGHTS_NAME, check_parts, need_extra
from smca.version import __version__

import torch
import yaml
from detectron2.utils.registry import _convert_target_to_string
from omegaconf import OmegaConf
from tabulate import tabulate

CARD_NAME = "README.md"
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_MAX_CLASSES = 100  # named in the card

_CARD = """\
# {title}

An SMCA object detector ([Fast Convergence of DETR with Spatially Modulated Co-Attention, ICCV
2021](https://arxiv.org/abs/2108.02404)) for Detectron2.

```python
from smca import Predictor

predictor = Predictor.from_pretrained("{name}")  # the folder, or its repository on the Hub
detections = predictor("photo.jpg", threshold=0.5)
detections.draw().save("drawn.jpg")
```

## The model

{model}

## Classes

{classes}

## Results

{results}

## Files

{files}
"""


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint of a training")
    add_weights_kind(parser)
    parser.add_argument("--config-file", metavar="FILE", help="default: the config of the weights")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument(
        "--license", required=True, metavar="ID", help="of the weights, such as cc-by-4.0 or other"
    )
    parser.add_argument("--title", help="of the model card; default: the config's name")
    parser.add_argument(
        "--data",
        metavar="TEXT",
        help="what it was trained on; default: the data set's name, or nothing",
    )
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


def run(args: argparse.Namespace) -> List[str]:
    """The command's work; gives the paths of the files."""
    predictor = Predictor(
        args.weights,
        config_file=args.config_file,
        overrides=args.opts,
        weights=args.weights_kind,
        device="cpu",
    )
    published = save_pretrained(predictor, args.output)
    path = Path(args.output, CARD_NAME)
    with writing(str(path)):
        path.write_text(model_card(args, predictor, published), encoding="utf-8")
    return [str(file) for file in sorted(Path(args.output).iterdir())]


def save_pretrained(predictor: Predictor, folder: str) -> Dict[str, Any]:
    """Write what inference needs of a detector that has its config, into a new folder or one that
    this wrote before, for `smca.Predictor.from_pretrained`. Gives what the config file says.

    Raises:
        ConfigError: the detector's config cannot be published.
        UserError: safetensors is not installed, the folder holds something else (a training's has
            a config.yaml of its own), or cannot be written.
    """
    safetensors = need_extra("safetensors.torch")
    safetensors_error = need_extra("safetensors").SafetensorError  # no type of Python's own errors
    present = {file.name for file in Path(folder).glob("[!.]*")}
    foreign = sorted(present - {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME})
    if foreign:
        raise UserError(f"{folder} holds other files ({foreign[0]}): give a new folder.")
    cfg = predictor.cfg
    parts = {"model": cfg.model, "augmentations": cfg.dataloader.test.mapper.augmentations}
    published: Dict[str, Any] = {"smca_version": __version__}
    for key, part in parts.items():
        published[key] = _plain(OmegaConf.to_container(part, resolve=True))
    if "criterion" in published["model"]:  # which only training needs
        published["model"]["criterion"] = None
    for key in ("image_format", "class_names", "category_ids", "weights"):
        published[key] = getattr(predictor, key)
    try:
        text = yaml.safe_dump(published, sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"The detector's config cannot be published, it has a value that is no plain one: "
            f"{error.args[-1]!r}."
        ) from error
    check_parts(published, "The detector's config")
    try:
        os.makedirs(folder, exist_ok=True)
        safetensors.save_model(predictor.model, os.path.join(folder, WEIGHTS_NAME))
        # The last, without which the folder is no detector.
        Path(folder, CONFIG_NAME).write_text(text, encoding="utf-8")
        # safetensors lets nobody else read its file.
        shutil.copymode(os.path.join(folder, CONFIG_NAME), os.path.join(folder, WEIGHTS_NAME))
    except (OSError, safetensors_error) as error:
        raise UserError(f"{folder} cannot be written: {error}.") from error
    return published


def _plain(value: Any) -> Any:
    """A config's value with names for what it calls."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _convert_target_to_string(value) if callable(value) else value


def model_card(args: argparse.Namespace, predictor: Predictor, published: Dict[str, Any]) -> str:
    """The text of the model card, with the front matter that the Hub reads.

    Args:
        args: of the command line.
        predictor: what is published.
        published: what its config file says.
    """
    provenance = predictor.checkpoint.get("smca") or {}
    config_name = Path(args.config_file or provenance.get("config") or "").stem or "SMCA"
    data = args.data or ", ".join(dataset_names(predictor.cfg, "train")) or "not said"
    # A config may compute the iterations from data that need not be here.
    said = [OmegaConf.select(predictor.cfg, "train.max_iter"), provenance.get("max_iter")]
    max_iter = next((number for number in said if isinstance(number, int)), None)
    best = predictor.checkpoint.get("best") or {}
    steps = predictor.checkpoint.get("iteration", best.get("iteration"))
    if steps is not None:
        # Detectron2 numbers an evaluation like the last iteration, from 0, and the one after the
        # training like the next.
        steps = min(steps + 1, max_iter or steps + 1)
    model = published["model"]
    # Others would tell paths of the machine that trained it.
    overrides = [*(provenance.get("overrides") or []), *args.opts]
    overrides = [text for text in overrides if text.lstrip("+").startswith("model.")]
    num_parameters = sum(p.numel() for p in predictor.model.parameters())
    kind = "their moving average (ema)" if predictor.weights == "ema" else "as trained"
    rows = [
        ("config", config_name),
        ("overrides", ", ".join(overrides)),
        ("parameters", f"{num_parameters:,}"),
        ("queries", model.get("num_queries")),
        ("weight maps", ((model.get("decoder") or {}).get("modulation") or {}).get("map")),
        ("weights", kind),
        ("iterations", steps and f"{steps:,}"),
        ("trained on", data),
        ("license of the weights", args.license),
        ("smca", published["smca_version"]),
        ("torch", torch.__version__.partition("+")[0]),
    ]
    front = {
        "license": args.license,
        "pipeline_tag": "object-detection",
        "library_name": "smca",
        "tags": ["detectron2", "object-detection", "smca"],
    }
    card = _CARD.format(
        title=args.title or config_name,
        name=Path(args.output).name,
        model=tabulate([row for row in rows if row[1]], ["", ""], "github", disable_numparse=True),
        classes=_classes(predictor.class_names, model.get("num_classes")),
        results=_results(predictor, args.weights, steps, max_iter),
        files=_files(args.output),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{card}"


def _classes(names: List[str], number: Optional[int]) -> str:
    if not names:
        return f"{number}, without names."
    left_out = len(names) - _MAX_CLASSES
    shown = ", ".join(names[:_MAX_CLASSES])
    return f"{len(names)}: {shown}" + (f" and {left_out} more." if left_out > 0 else ".")


def _results(
    predictor: Predictor, weights: str, steps: Optional[int], max_iter: Optional[int]
) -> str:
    """A table of the evaluation that the training made of these weights."""
    prefix = "ema/" if predictor.weights == "ema" else ""
    try:
        metrics = read_metrics(str(Path(weights).with_name("metrics.json")))
    except UserError:  # there is none, or nothing in it
        metrics = {}
    if not metrics or steps is None:
        return "There is no evaluation beside the checkpoint."
    # As Detectron2 numbers it.
    iteration = steps if steps == max_iter else steps - 1
    found = {}
    for name in _METRICS:
        values = dict(zip(*metrics.get(f"{prefix}bbox/{name}", ((), ()))))
        if math.isfinite(values.get(iteration, math.nan)):  # nan without objects of that size
            found[name] = f"{values[iteration]:.1f}"
    if not found:
        return "The training made no evaluation of this checkpoint."
    data = ", ".join(dataset_names(predictor.cfg, "test")) or "the validation data"
    table = tabulate([found.values()], found.keys(), "github", disable_numparse=True)
    return f"COCO's box AP in % on {data}:\n\n{table}"


def _files(folder: str) -> str:
    rows = []
    for file in sorted(Path(folder).iterdir()):
        if file.is_file() and file.name != CARD_NAME:
            content = file.read_bytes()
            rows.append([file.name, f"{len(content):,}", hashlib.sha256(content).hexdigest()])
    return tabulate(rows, ["file", "bytes", "sha256"], "github", disable_numparse=True)


def main() -> None:
    """Run the command line."""
    print("Written:", *run(get_parser().parse_args()), sep="\n  ")


if __name__ == "__main__":
    sys.exit(exit_code(main))

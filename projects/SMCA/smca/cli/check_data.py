"""Look at a data set before training on it: ``smca-check-data``."""

import argparse
import collections
import json
import os
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from smca.analysis import dataset
from smca.config import build, fit_to_data, load_config, quoted
from smca.data import as_list, require_dataset
from smca.data.coco_checks import Problem
from smca.errors import UserError, at_least, command_line, counted, exit_code, writing
from smca.inference import make_folder

_DESCRIPTION = """\
Look at a data set before training on it. This counts every problem of its files, with examples,
draws training images, and says which settings follow from the data:

    %(prog)s --json train.json --images images --output check
    %(prog)s --config-file custom_small data.train_json=train.json \\
        data.train_images=images data.val_json=val.json data.val_images=images

It writes check.json, with statistics, and training_images.jpg. The exit code is 1 if there are
problems that training would stop at.
"""


def get_parser() -> argparse.ArgumentParser:
    parser = command_line(_DESCRIPTION)
    parser.add_argument("--config-file", metavar="FILE", help="default: custom_small")
    parser.add_argument("--json", metavar="FILE", help="a COCO JSON, instead of a config's data")
    parser.add_argument("--images", metavar="DIR", help="the folder of its images")
    text = "default: %(default)s"
    parser.add_argument("--output", default="output/check_data", metavar="DIR", help=text)
    text = "images in training_images.jpg; default: %(default)s"
    parser.add_argument("--num-images", type=at_least(1), default=12, metavar="N", help=text)
    text = "examples of each kind of problem; default: %(default)s"
    parser.add_argument("--num-examples", type=at_least(0), default=3, metavar="N", help=text)
    parser.add_argument("--no-decode", action="store_true", help="do not read the images")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


def run(args: argparse.Namespace) -> int:
    """Check, print, and write the files; gives the exit code."""
    cfg = load_config(*config_and_overrides(args))
    files = annotation_files(cfg, ("train",) if args.json else ("train", "test"))
    make_folder(args.output)
    splits: Dict[str, dataset.DataSplit] = {}
    for name, (json_file, image_root) in files.items():
        splits[name] = dataset.examine(
            json_file,
            image_root,
            categories_from=next(iter(splits.values())).json_file if splits else None,
            check_images=not args.no_decode,
            title=f"{name}: images",
        )
    statistics = {name: dataset.statistics_of(split) for name, split in splits.items()}
    training = dataset.training_splits(splits)
    trains = any(s.problems or statistics[name]["objects"] for name, s in training.items())
    if not args.json and not trains:
        for split in training.values():
            message = f"{split.source} has no objects: add their annotations."
            split.problems.append(Problem("no objects to train on", message, []))
    remarks = dataset.find_remarks(splits, args.num_examples or 1)
    fitted = settings(cfg, splits)
    for name, split in splits.items():
        print(problems_text(name, split, args.num_examples))
    print_list("Remarks", remarks)
    lines = [f"{key}={value}" for key, value in fitted.items()]
    print_list("Settings that follow from the training data", lines)

    paths = [os.path.join(args.output, "check.json")]
    found = {
        name: dict(json_file=s.json_file, problems=count_kinds(s), statistics=statistics[name])
        for name, s in splits.items()
    }
    content = {"splits": found, "remarks": remarks, "settings": fitted}
    with writing(args.output):
        Path(paths[0]).write_text(json.dumps(content, indent=1), encoding="utf-8")
    train_name = next(iter(splits))
    if statistics[train_name]["objects"] and not args.no_decode:
        mapper = cfg.dataloader.train.mapper
        parts = build(mapper), splits[train_name], args.num_images
        paths.append(os.path.join(args.output, "training_images.jpg"))
        figure = dataset.draw_training_images(*parts, mapper.get("image_format", "RGB"))
        with writing(args.output):
            figure.savefig(paths[-1], dpi=60)
    print("Written:", *paths, sep="\n  ")
    return 1 if any(split.problems for split in splits.values()) else 0


def config_and_overrides(args: argparse.Namespace) -> Tuple[str, List[str]]:
    """The config file and the overrides that the command line means."""
    config_file = args.config_file or "custom_small"
    if not args.json and not args.images:
        return config_file, args.opts
    if args.config_file or not (args.json and args.images):
        raise UserError("Give --json together with --images, or --config-file.")
    paths = [quoted(os.path.abspath(path)) for path in (args.json, args.images)]
    keys = [f"data.{split}_{kind}" for split in ("train", "val") for kind in ("json", "images")]
    return config_file, [*(f"{key}={path}" for key, path in zip(keys, 2 * paths)), *args.opts]


def annotation_files(cfg: DictConfig, splits: Sequence[str]) -> Dict[str, Tuple[str, str]]:
    """The JSON and the image folder of each of a config's data sets, "train" and "val", numbered
    where there are several."""
    found: Dict[str, Tuple[str, str]] = {}
    for split in splits:
        title = "val" if split == "test" else split
        names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names")
        if isinstance(names, DictConfig):  # registers data, which would stop at the first problems
            # Either may be a call as well, which converts other formats.
            if "json_file" not in names:
                source = getattr(names._target_, "__name__", names._target_)
                raise UserError(
                    f"dataloader.{split}.dataset.names calls {source}, whose data have no "
                    "annotation file in COCO's format: only such files can be checked."
                )
            files, roots = (as_list(build(names[key])) for key in ("json_file", "image_root"))
            pairs = list(zip(map(str, files), map(str, roots * len(files))))
        else:
            require_dataset(as_list(names))
            pairs = []
            for name in as_list(names):
                metadata = MetadataCatalog.get(name)
                if metadata.get("json_file") is None:
                    raise UserError(f"Data set '{name}' has no annotation file in COCO's format.")
                pairs.append((metadata.json_file, metadata.image_root))
        for number, pair in enumerate(pairs, 1):
            found[title if len(pairs) == 1 else f"{title} {number}"] = pair
    return found


def settings(cfg: DictConfig, splits: Dict[str, dataset.DataSplit]) -> Dict[str, Any]:
    """What a training with this config would compute from the data, here from those without
    problems; the config has it from here on."""
    names = []
    for name, split in dataset.training_splits(splits).items():
        names.append(f"checked {name}")
        DatasetCatalog.pop(names[-1], None)
        DatasetCatalog.register(names[-1], lambda split=split: split.dataset_dicts)
    OmegaConf.update(cfg, "dataloader.train.dataset.names", names, merge=False)
    return fit_to_data(cfg)


def count_kinds(split: dataset.DataSplit) -> Dict[str, int]:
    """How many problems there are of each kind, most first."""
    return dict(collections.Counter(problem.kind for problem in split.problems).most_common())


def problems_text(name: str, split: dataset.DataSplit, num_examples: int) -> str:
    """A split's problems by kind, with examples."""
    objects = sum(not a["iscrowd"] for item in split.dataset_dicts for a in item["annotations"])
    images, classes = len(split.dataset_dicts), len(split.class_names)
    lines = [
        f"{name}: {split.source}: {counted(images, 'usable image')} with "
        f"{counted(objects, 'object')} of {counted(classes, 'class')}; "
        f"{counted(len(split.problems), 'problem')}"
    ]
    for kind, count in count_kinds(split).items():
        lines.append(f"  {count} x {kind}")
        examples = [problem.message for problem in split.problems if problem.kind == kind]
        lines += [f"      {message}" for message in examples[:num_examples]]
        if count > num_examples:
            lines.append("      ...")
    return "\n".join(lines)


def print_list(title: str, texts: Sequence[str]) -> None:
    """Print sentences below a title, if there are any."""
    wrapper = textwrap.TextWrapper(100, initial_indent="  ", subsequent_indent="    ",
                                   break_long_words=False, break_on_hyphens=False)  # fmt: skip
    if texts:
        print(title, *map(wrapper.fill, texts), sep="\n")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; gives the exit code, 1 if there are problems."""
    return exit_code(run, get_parser().parse_intermixed_args(argv))

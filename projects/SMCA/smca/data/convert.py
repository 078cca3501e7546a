"""YOLO and Pascal VOC folders as data sets in COCO's format.

The folders are read by supervision (the extra "convert"); only boxes are kept. The JSONs are in the
cache folder, and are written anew when a file of the folders changes.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import yaml

from .cache import cache_dir, create_once
from .errors import DatasetError
from .mapper import PathLike

__all__ = ["coco_from_voc", "coco_from_yolo", "yolo_images"]

Coco = Dict[str, Any]
OneOrMore = Union[str, List[str]]


def yolo_images(data_yaml: PathLike, split: str) -> OneOrMore:
    """The image folder of a split of a YOLO data set.

    Args:
        data_yaml: the data set's file with ``train``, ``val``, ``names`` and perhaps ``path``.
        split: "train", "val" or another key of it.

    Returns:
        An absolute path, or a list of them where the file has a list.

    Raises:
        DatasetError: the file or a folder is missing, or the file lacks the split.
    """
    file = Path(data_yaml).expanduser().absolute()
    content = _read_yaml(file)
    folders = content.get(split)
    if not folders:
        raise DatasetError(f"{file} has no '{split}': add the folder of its images.")
    root = file.parent / str(content.get("path") or "")
    if isinstance(folders, str):
        return _yolo_folder(file, root, folders)
    return [_yolo_folder(file, root, str(folder)) for folder in folders]


def _read_yaml(file: Path) -> Dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"The file {file} does not exist: correct the path.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DatasetError(f"{file} is no YAML file ({error}): correct it.") from error
    if not isinstance(content, dict) or not content.get("names"):
        raise DatasetError(f"{file} has no 'names': add the names of the classes.")
    names = content["names"]
    if not isinstance(names, (list, dict)):
        raise DatasetError(f"{file} has 'names' that are no list: write [dog, cat].")
    if isinstance(names, dict):
        numbers = {str(key) for key in names}
        for number in map(str, range(len(names))):
            if number not in numbers:
                raise DatasetError(
                    f"{file} has no name of class {number}: number 'names' from 0 without gaps."
                )
    return content


def _yolo_folder(file: Path, root: Path, folder: str) -> str:
    # Some exports write ../train/images for what lies beside the file.
    candidates = [root / folder, file.parent / folder, file.parent / folder.removeprefix("../")]
    for candidate in candidates:
        if candidate.is_dir():
            return os.path.abspath(candidate)
    if any(candidate.is_file() for candidate in candidates):
        raise DatasetError(f"{file} lists images in the file {folder}: give their folder instead.")
    raise DatasetError(f"The image folder {candidates[0]} of {file} does not exist: correct it.")


def _yolo_labels(images: str) -> str:
    """The folder of the labels: ``labels`` where the images' path has its last folder ``images``,
    or the same one."""
    parts = images.split(os.sep)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    labels = os.sep.join(parts)
    return labels if os.path.isdir(labels) else images


def coco_from_yolo(data_yaml: PathLike, split: str) -> OneOrMore:
    """Convert a split of a YOLO data set; an image without a label file has no objects.

    Args:
        data_yaml, split: as of `yolo_images`.

    Returns:
        The COCO JSON, or a list of them with one for each folder of `yolo_images`, with the
        categories 1, 2, ... in the order of ``names``.

    Raises:
        DatasetError: something is missing or cannot be read.
    """
    file = Path(data_yaml).expanduser().absolute()

    def convert(images: str, labels: str) -> Coco:
        return _converted("from_yolo", images, labels, data_yaml_path=str(file))

    names = repr(_read_yaml(file)["names"])
    folders = yolo_images(file, split)
    if isinstance(folders, str):
        return _in_cache(folders, _yolo_labels(folders), names, convert)
    return [_in_cache(folder, _yolo_labels(folder), names, convert) for folder in folders]


def coco_from_voc(
    images: PathLike,
    annotations: PathLike,
    names: Optional[Sequence[str]] = None,
    image_list: Optional[PathLike] = None,
) -> str:
    """Convert a Pascal VOC data set. Boxes are 1-based and include their last pixel, as in VOC; an
    image without an XML file has no objects.

    Args:
        images: folder of the images.
        annotations: folder of the XML files.
        names: of the classes, in their order; None: those of the objects, by the alphabet. For
            validation give the training set's.
        image_list: file with the names of the images to use, without suffix, one a line, as in
            VOC's ``ImageSets/Main``; None uses all.

    Returns:
        The COCO JSON, with the categories 1, 2, ... in the order of `names`.

    Raises:
        DatasetError: something is missing or cannot be read, or an object has another class.
    """
    images, annotations = (_existing_folder(folder) for folder in (images, annotations))
    listed = None if image_list is None else _read_list(Path(image_list).expanduser().absolute())

    def convert(images: str, annotations: str) -> Coco:
        coco = _converted("from_pascal_voc", images, annotations)
        if listed is not None:
            coco = _chosen(coco, listed, images)
        return _renumbered(coco, names, annotations)

    settings = repr((names and list(names), listed))
    return _in_cache(images, annotations, settings, convert)


def _existing_folder(folder: PathLike) -> str:
    path = os.path.abspath(os.path.expanduser(os.fspath(folder)))
    if not os.path.isdir(path):
        raise DatasetError(f"The folder {path} does not exist: correct the path.")
    return path


def _read_list(file: Path) -> List[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:  # not UTF-8
        raise DatasetError(f"The list of images {file} cannot be read ({error}).") from error
    # VOC's lists of a class have 1, 0 or -1 after the name.
    return [line.split()[0] for line in lines if line.strip()]


def _chosen(coco: Coco, stems: Sequence[str], folder: str) -> Coco:
    kept = set(stems)
    stem_of = {image["id"]: Path(image["file_name"]).stem for image in coco["images"]}
    missing = sorted(kept.difference(stem_of.values()))
    if missing:
        raise DatasetError(
            f"The list of images has {len(missing)} names that {folder} has no image of, such as "
            f"{missing[0]}: correct it (names have no suffix)."
        )
    images = [image for image in coco["images"] if stem_of[image["id"]] in kept]
    ids = {image["id"] for image in images}
    annotations = [a for a in coco["annotations"] if a["image_id"] in ids]
    return {**coco, "images": images, "annotations": annotations}


def _renumbered(coco: Coco, names: Optional[Sequence[str]], folder: str) -> Coco:
    """With categories in the order of `names`."""
    by_id = {category["id"]: category["name"] for category in coco["categories"]}
    used = sorted({by_id[annotation["category_id"]] for annotation in coco["annotations"]})
    names = used if names is None else list(names)
    unknown = [name for name in used if name not in names]
    if unknown:
        raise DatasetError(
            f"{folder} has objects of the classes {unknown}, which are not among {names}: correct "
            "them, or add the classes."
        )
    ids = {name: index for index, name in enumerate(names, 1)}
    annotations = [{**a, "category_id": ids[by_id[a["category_id"]]]} for a in coco["annotations"]]
    categories = [{"id": index, "name": name} for name, index in ids.items()]
    return {**coco, "categories": categories, "annotations": annotations}


def _converted(reader: str, images: str, annotations: str, **settings: Any) -> Coco:
    """What supervision reads from two folders, as a COCO JSON's content."""
    try:
        import supervision
    except ImportError as error:
        raise DatasetError(
            "YOLO and Pascal VOC folders need supervision: run pip install supervision (or "
            "install the extra 'convert' of this package)."
        ) from error
    try:
        read = getattr(supervision.DetectionDataset, reader)
        found = read(
            images_directory_path=images,
            annotations_directory_path=annotations,
            show_progress=True,
            **settings,
        )
    except Exception as error:  # whatever its parsers raise
        raise DatasetError(f"{annotations} cannot be read: {error}") from error
    for boxes in found.annotations.values():
        boxes.mask = None
    paths = sorted(found.image_paths)
    found = supervision.DetectionDataset(found.classes, paths, found.annotations)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "coco.json")
        found.as_coco(annotations_path=path)
        with open(path, encoding="utf-8") as file:
            coco: Coco = json.load(file)
    # It also writes a licence and a date, which say nothing of these images.
    return {"info": {}, **{key: coco[key] for key in ("images", "annotations", "categories")}}


def _in_cache(
    images: str, annotations: str, settings: str, convert: Callable[[str, str], Coco]
) -> str:
    """The JSON of two folders, converted unless it is there and nothing has changed."""
    state = repr((images, annotations, settings, _files(images), _files(annotations)))
    digest = hashlib.sha256(state.encode()).hexdigest()[:8]
    path = cache_dir() / "converted" / f"{Path(annotations).name}_{digest}.json"

    def write(partial: Path) -> None:
        partial.write_text(json.dumps(convert(images, annotations)), encoding="utf-8")

    create_once(path, write)
    return str(path)


def _files(folder: str) -> List[Tuple[str, int, int]]:
    """Name, size and time of each file."""
    with os.scandir(folder) as entries:
        states = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in states)

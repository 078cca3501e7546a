"""What the conversions of YOLO and Pascal VOC folders to COCO's format share.

Only boxes are kept. The JSONs are in the cache folder, and are written anew when a file of the
folders changes. Their records name the label file that they come from, and what is wrong with it;
`smca.data.coco_checks` reports both.
"""

import codecs
import collections
import json
import logging
import os
import re
import unicodedata
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from detectron2.utils.logger import log_first_n
from PIL import Image

from smca.errors import DatasetError, counted

from .cache import cache_dir, create_once, name_for
from .coco_checks import FAULT, REMARKS, SOURCE, Record, in_threads
from .mapper import PathLike, upright_size

States = Dict[str, Tuple[int, int]]  # path -> (size, time of the last change)
# Of an image: what its record gets, and its objects with "name" and "bbox"
Content = Tuple[Record, List[Record]]
# Of an image by its path in the folder, that of its label or None
Pairs = Dict[str, Optional[str]]

# Pillow's names of the formats that have images; a folder may hold other files.
_FORMATS = {"AVIF", "BMP", "DDS", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "SGI"}
_FORMATS |= {"TGA", "TIFF", "WEBP"}
_LAYOUT = 3  # of the JSONs: a new number makes them anew
_NUM_SHOWN = 3  # of files that a remark is about


def read_text(path: PathLike) -> str:
    """UTF-8 or, with a byte order mark, UTF-16."""
    content = Path(path).read_bytes()
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf_16 else "utf-8-sig")


def files_below(folder: str, suffix: str = "") -> States:
    """All files below a folder whose names end with the suffix, without hidden ones."""
    found, seen = {}, set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        # A folder that is linked to again, perhaps from below itself, is read once.
        is_new = os.path.realpath(parent) not in seen
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if is_new and not name.startswith("."))
        for name in names if is_new else ():
            path = os.path.join(parent, name)
            if not name.startswith(".") and name.lower().endswith(suffix) and os.path.isfile(path):
                status = os.stat(path)
                found[path] = status.st_size, status.st_mtime_ns
    return found


def read_list(file: Path) -> List[str]:
    """The names of images, one a line."""
    try:
        lines = read_text(file).splitlines()
    except (OSError, ValueError) as error:
        raise DatasetError(f"The list of images {file} cannot be read ({error}).") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DatasetError(f"The list of images {file} is empty: write a name on each line.")
    return names


def _choose(pairs: Pairs, lines: Sequence[str], folder: str) -> Pairs:
    """The images that are listed by their names, with or without suffix, or with further folders in
    front, as CVAT writes them."""
    images = {os.path.splitext(name)[0]: name for name in pairs}
    images.update({name: name for name in pairs})

    def name_of(line: str) -> str:
        # In VOC's lists of a class, a flag follows the name.
        name = line if line in images else re.sub(r"\s+(-1|0|1)$", "", line)
        parts = name.split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((end for end in ends if end in images), name)

    listed = set(map(name_of, lines))
    missing = sorted(listed.difference(images))
    if missing:
        raise DatasetError(
            f"The list of images has {len(missing)} names that {folder} has no image of, such as "
            f"{missing[0]}: correct it."
        )
    chosen = {images[name] for name in listed}
    return {name: label for name, label in pairs.items() if name in chosen}


def size_record(path: str) -> Record:
    """The size of an image for its record, or why it cannot be read."""
    try:
        height, width = upright_size(path)
    except DatasetError as error:
        return {SOURCE: path, FAULT: f"cannot be used: {error}"}
    return {"height": height, "width": width}


def convert(
    images: str,
    labels: str,
    label_files: States,
    stems: Callable[[str], Iterable[str]],
    lines: Optional[Sequence[str]],
    read: Callable[[str, Optional[str]], Content],
    names: Optional[Sequence[str]],
    state: Any = None,
    pair_rest: Optional[Callable[[Pairs, Sequence[str]], None]] = None,
) -> str:
    """The JSON of the folders of images and labels, converted unless it is there and nothing has
    changed.

    Args:
        label_files: those that may be an image's.
        stems: gives the paths without suffix that the label file of an image may have.
        lines: choose images by their names; None takes all.
        read: gives an image's size and objects.
        names: of the classes; None takes those of the objects.
        state: what else the JSON depends on.
        pair_rest: may pair labels that `stems` did not, in place.
    """
    formats = Image.registered_extensions()
    image_files = {
        path: state
        for path, state in files_below(images).items()
        if formats.get(os.path.splitext(path)[1].lower()) in _FORMATS
    }
    files = [sorted(files.items()) for files in (image_files, label_files)]
    state = (_LAYOUT, images, labels, names, lines, state, files)
    path = cache_dir() / "converted" / f"{name_for(labels, state)}.json"

    def write(partial: Path) -> None:
        by_stem = {os.path.splitext(path)[0]: path for path in label_files}
        pairs: Pairs = {
            os.path.relpath(path, images): next(filter(None, map(by_stem.get, stems(path))), None)
            for path in sorted(image_files)
        }
        rest = set(label_files).difference(pairs.values())
        by_stem = {plain(os.path.splitext(path)[0]): path for path in rest}
        for path in [path for path, label in pairs.items() if label is None]:
            found = (by_stem.get(plain(stem)) for stem in stems(os.path.join(images, path)))
            pairs[path] = next(filter(None, found), None)
        if pair_rest is not None:
            pair_rest(pairs, sorted(set(label_files).difference(pairs.values())))
        unused = sorted(set(label_files).difference(pairs.values()))
        if lines is not None:
            pairs, unused = _choose(pairs, lines, images), []
        coco = _make_coco(images, labels, pairs, unused, read, names)
        for remark in coco["info"][REMARKS]:
            log_first_n(logging.WARNING, remark, key="message", name=__name__)
        partial.write_text(json.dumps(coco), encoding="utf-8")

    create_once(path, write)
    return str(path)


def plain(name: str) -> str:
    """A name as it looks: a Mac writes another Unicode form, and Windows knows no capitals."""
    return unicodedata.normalize("NFC", name).casefold()


def _make_coco(
    folder: str,
    labels: str,
    pairs: Pairs,
    unused: Sequence[str],
    read: Callable[[str, Optional[str]], Content],
    names: Optional[Sequence[str]],
) -> Dict[str, Any]:
    if not pairs:
        raise DatasetError(f"{folder} has no images: correct the path.")
    remarks: List[str] = []
    counts = collections.Counter(filter(None, pairs.values()))
    if not counts:
        remarks.append(f"None of the {len(pairs)} images of {folder} has a label file.")
    shared = [label for label, count in counts.items() if count > 1]
    for files, what, advice in (
        (shared, "several images", "give the images different names"),
        (unused, "no image that can be read", "add the images"),
    ):
        if files:
            examples = ", ".join(files[:_NUM_SHOWN])
            label_files = counted(len(files), "label file")
            remarks.append(f"{label_files} with {what}, such as {examples}: {advice}.")
    paths = [os.path.join(folder, name) for name in pairs]
    contents = list(in_threads(read, paths, pairs.values()))
    all_objects = [item for _, objects in contents for item in objects]
    found = {item["name"]: item[SOURCE] for item in all_objects[::-1] if "name" in item}
    names = sorted(found) if names is None else names
    if not names:
        faults = [f"{item[SOURCE]} {item[FAULT]}" for item in all_objects]
        raise DatasetError(
            f"{labels} has no objects that say their classes: correct the path, or give the names "
            f"of the classes. {' '.join([*faults, *remarks][:1])}".strip()
        )
    unknown = sorted(set(found).difference(names))
    if unknown:
        raise DatasetError(
            f"{labels} has objects of the classes {unknown}, which are not among {names} (such as "
            f"{found[unknown[0]]}): correct them, or add the classes."
        )
    ids = {name: index for index, name in enumerate(names, 1)}
    images: List[Record] = []
    annotations: List[Record] = []
    for name, (image, objects) in zip(pairs, contents):
        images.append({"id": len(images) + 1, "file_name": name, **image})
        for item in objects:
            record = {"id": len(annotations) + 1, "image_id": len(images), "iscrowd": 0, **item}
            if "bbox" in record:
                record["category_id"] = ids[record.pop("name")]
                record["area"] = record["bbox"][2] * record["bbox"][3]
            annotations.append(record)
    return {
        "info": {SOURCE: labels, REMARKS: remarks},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for index, name in enumerate(names, 1)],
    }

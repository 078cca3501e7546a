"""Pascal VOC folders as data sets in COCO's format."""

import codecs
import contextlib
import math
import os
import re
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence
from xml.etree import ElementTree

from .coco_checks import FAULT, SOURCE, Record, existing
from .convert import Content, Pairs, convert, files_below, plain, read_list, size_record
from .mapper import PathLike

_UNREADABLE = (ElementTree.ParseError, LookupError, OSError, ValueError)


def coco_from_voc(
    images: PathLike,
    annotations: PathLike,
    names: Optional[Sequence[str]] = None,
    image_list: Optional[PathLike] = None,
) -> str:
    """Convert a Pascal VOC data set. Boxes are 1-based and include their last pixel, as in VOC. An
    image without an XML file has no objects. The size in the XML file of an image with an EXIF
    orientation says whether its boxes are meant upright or as it is stored.

    Args:
        images: folder of the images, sub-folders included.
        annotations: folder of the XML files. Each is named like its image, in a sub-folder of the
            same name, or names it in its ``<filename>``.
        names: of the classes, in their order; None takes those of the objects, by the alphabet.
            For validation give the training set's.
        image_list: file with the names of the images to use, without suffix, one a line, as in
            VOC's ``ImageSets/Main``; None takes all images.

    Returns:
        The COCO JSON, with the categories 1, 2, ... in the order of `names`.
    """
    images = existing(images, os.path.isdir, "image folder")
    annotations = existing(annotations, os.path.isdir, "annotation folder")
    lines = None if image_list is None else read_list(Path(image_list).expanduser().absolute())
    names = None if names is None else list(names)
    label_files = files_below(annotations, ".xml")

    def stems(image: str) -> Iterable[str]:
        return [os.path.splitext(os.path.join(annotations, os.path.relpath(image, images)))[0]]

    return convert(
        images, annotations, label_files, stems, lines, _read_voc, names, pair_rest=_pair_by_name
    )


def _pair_by_name(pairs: Pairs, unused: Sequence[str]) -> None:
    """Give XML files that are not named like an image to the one that their ``<filename>`` names,
    or their own name without its folder, in capitals or not."""
    images: Dict[str, List[str]] = {}
    for image in pairs:
        images.setdefault(plain(Path(image).stem), []).append(image)
    for label in unused:
        file_name = ""
        with contextlib.suppress(*_UNREADABLE):
            file_name = (_parse(label).findtext("filename") or "").strip().replace("\\", "/")
        stems = (plain(Path(file_name).stem), plain(Path(label).stem))
        found = next((images[stem] for stem in stems if stem in images), [])
        free = [image for image in found if pairs[image] is None]
        if len(free) == 1:
            pairs[free[0]] = label


def _read_voc(image: str, label: Optional[str]) -> Content:
    if label is None:
        return size_record(image), []
    try:
        root = _parse(label)
    except _UNREADABLE as error:
        fault = f"cannot be read ({error}); correct or remove it."
        return size_record(image), [{SOURCE: label, FAULT: fault}]
    try:
        size = {tag: int(float(root.findtext(f"size/{tag}") or 0)) for tag in ("height", "width")}
    except (OverflowError, ValueError):
        size = {}
    if min(size.values(), default=0) < 1:
        size = size_record(image)
    objects = [
        {SOURCE: f"{label} object {number}", **_voc_object(element)}
        for number, element in enumerate(root.findall("object"), 1)
    ]
    return {SOURCE: label, **size}, objects


def _parse(file: str) -> ElementTree.Element:
    # What stands before the XML declaration would be an error.
    content = Path(file).read_bytes().removeprefix(codecs.BOM_UTF8).lstrip()
    declared = re.match(rb"<\?xml[^>]*encoding=[\"']([\w-]+)[^>]*>", content)
    if declared:  # the parser does not know the encodings of Chinese, say
        content = content[declared.end() :]
        try:
            content.decode()  # as .NET writes what it declares as UTF-16
        except UnicodeDecodeError:
            content = content.decode(declared[1].decode()).encode()
    root = ElementTree.fromstring(content)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2].lower()  # without a namespace
    if root.tag != "annotation":
        raise ValueError(f"it begins with <{root.tag}>, not with <annotation>")
    return root


def _voc_object(element: ElementTree.Element) -> Record:
    """An object's name and box, or what is wrong with it."""
    name = (element.findtext("name") or "").strip()
    if not name:
        return {FAULT: "has no name of its class; add it."}
    texts = [element.findtext(f"bndbox/{tag}") for tag in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = corners = [float(text or "nan") for text in texts]
    except ValueError:
        corners = [math.nan]
    if not all(map(math.isfinite, corners)):
        return {
            "name": name,
            FAULT: f"({name}) has no bndbox with the numbers xmin, ymin, xmax and ymax; correct or "
            "remove it.",
        }
    left, right = min(left, right) - 1, max(left, right)
    top, bottom = min(top, bottom) - 1, max(top, bottom)
    return {"name": name, "bbox": [left, top, right - left, bottom - top]}

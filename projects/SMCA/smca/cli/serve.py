"""A page in the browser that detects objects and shows where queries look: ``smca-serve``."""

import argparse
import contextlib
import inspect
import io
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from PIL import Image

from smca.analysis import LayerRecord, detect_and_record, draw_gaussians, maps_of
from smca.analysis.detections import class_color, class_name
from smca.cli.predict import find_images
from smca.data import read_image
from smca.errors import UserError, command_line, exit_code
from smca.inference import Detections, Predictor
from smca.inference.command_line import add_predictor_arguments, add_threshold, predictor_of

_DESCRIPTION = """\
Serve a page for the browser. Give it images to see the detections, and click into a box to see
where the detection's query looks, in each decoder layer:

    %(prog)s --weights output/demo/model_best.pth --examples photos
    %(prog)s --weights published --host 0.0.0.0 --port 8000

The server listens on this machine alone unless --host says otherwise.
"""
_PAGE = Path(__file__).with_suffix(".html")
_MAX_BYTES = 200_000_000  # of an image's file
_MAX_IMAGES = 32  # that are kept, of all visitors
_THUMBNAIL_SIDE = 160  # pixels

Reply = Tuple[str, bytes]  # content type and content


def get_parser() -> argparse.ArgumentParser:
    parser = command_line(_DESCRIPTION)
    add_predictor_arguments(parser)
    parser.add_argument("--examples", metavar="DIR", help="images that the page offers to try")
    text = "lowest score of a detection that the page begins with; default: %(default)s"
    add_threshold(parser, text)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


class Viewer:
    """What the page asks for; several threads may call it. It offers the images of the paths
    `examples`, and begins with a lowest score of `threshold`."""

    def __init__(self, predictor: Predictor, examples: Sequence[str] = (), threshold: float = 0.5):
        self.predictor = predictor
        self.examples = list(examples)
        self.threshold = threshold
        # Images, their detections, best first, and the records of the decoder's layers
        self._images: Dict[int, Tuple[np.ndarray, Detections, List[LayerRecord]]] = {}
        self._numbers = itertools.count()
        # What records a call of the model must not see another visitor's.
        self._lock = threading.Lock()
        _, self._layers = detect_and_record(predictor, np.zeros((64, 64, 3), np.uint8))

    def settings(self) -> Dict[str, Any]:
        """What the page has to know before there is an image."""
        count = getattr(self.predictor.model, "num_classes", len(self.predictor.class_names))
        classes = [class_name(self.predictor.class_names, index) for index in range(count)]
        return {
            "classes": classes,
            "colors": ["rgb({:.0%} {:.0%} {:.0%})".format(*class_color(i)) for i in range(count)],
            "examples": [Path(path).name for path in self.examples],
            "threshold": self.threshold,
            "num_layers": len(self._layers),
            "strides": self._layers[0].strides if self._layers else [],
        }

    def detect(self, image: np.ndarray) -> Dict[str, Any]:
        """The number of an (h, w, 3) uint8 RGB image for the other methods, its size, and its
        detections, best first: as in COCO's result files, with ``class`` (index), and for each
        decoder layer ``centers`` (x, y in pixels) and ``shares`` (the weights of the scales) of its
        query."""
        with self._lock:
            detections, layers = detect_and_record(self.predictor, image)
            number = next(self._numbers)
            self._images[number] = image, detections, layers
            while len(self._images) > _MAX_IMAGES:
                del self._images[min(self._images)]
        rows = detections.to_coco()
        classes, queries = detections.pred_classes.tolist(), detections.query_indices
        centers = [layer.centers_in_pixels(queries, image.shape[:2]) for layer in layers]
        shares = [layer.scale_shares(queries) for layer in layers]
        for index, row in enumerate(rows):
            row["class"] = classes[index]
            row["centers"] = [layer[index].tolist() for layer in centers]
            row["shares"] = [layer[index].tolist() for layer in shares]
        height, width = image.shape[:2]
        return {"id": number, "width": width, "height": height, "detections": rows}

    def draw_maps(self, number: int, index: int, layer: int, scale: Optional[int] = None) -> bytes:
        """Where the query of a detection looks, see `smca.analysis.draw_gaussians`, as PNG."""
        image, detections, layers = self.seen(number)
        _check_index("detection", index, len(detections))
        _check_index("layer", layer, len(layers))
        file = io.BytesIO()
        with self._lock:  # Matplotlib is not made for threads
            (maps,) = maps_of(detections[[index]], layers[layer], image)
            draw_gaussians([maps], self.predictor.class_names, scale).savefig(file, format="png")
        return file.getvalue()

    def seen(self, number: int) -> Tuple[np.ndarray, Detections, List[LayerRecord]]:
        """The image of that number, with its detections and records."""
        if number not in self._images:
            raise UserError("The server does not keep this image any more: give it again.")
        return self._images[number]


def make_server(viewer: Viewer, host: str, port: int) -> ThreadingHTTPServer:
    """The page's server, not yet running; port 0 takes a free one.

    Raises:
        UserError: it cannot listen there.
    """
    handler = type("Handler", (_Handler,), {"viewer": viewer})
    try:
        return ThreadingHTTPServer((host, port), handler)
    except (OSError, OverflowError) as error:  # the second of a port above 65535
        raise UserError(
            f"The page cannot be served at http://{host}:{port} ({error}): give another --host or "
            "--port."
        ) from error


class _Handler(BaseHTTPRequestHandler):
    viewer: Viewer

    def do_GET(self) -> None:
        self._reply(
            {
                "/": lambda: ("text/html; charset=utf-8", _PAGE.read_bytes()),
                "/settings": lambda: _as_json(self.viewer.settings()),
                "/example": lambda number: _as_jpeg(self._example(number), _THUMBNAIL_SIDE),
                "/image": lambda number: _as_jpeg(self.viewer.seen(number)[0]),
                "/maps": lambda number, index, layer, scale=None: (
                    "image/png",
                    self.viewer.draw_maps(number, index, layer, scale),
                ),
            }
        )

    def do_POST(self) -> None:
        """Detections: of an example, or of the image that is sent."""
        self._reply({"/detect": lambda number=None: _as_json(self._detect(number))})

    def _reply(self, routes: Dict[str, Callable[..., Reply]]) -> None:
        url = urlsplit(self.path)
        status, kind, content = 404, "text/plain; charset=utf-8", b"There is no such page."
        with contextlib.suppress(KeyError, TypeError, ValueError):
            query = {name: int(value) for name, value in parse_qsl(url.query)}
            inspect.signature(routes[url.path]).bind(**query)
            status = 200
        try:
            if status == 200:
                kind, content = routes[url.path](**query)
        except UserError as error:
            status, content = 400, str(error).encode(errors="backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _example(self, number: int) -> np.ndarray:
        _check_index("example", number, len(self.viewer.examples))
        return read_image(self.viewer.examples[number])

    def _detect(self, number: Optional[int]) -> Dict[str, Any]:
        if number is not None:
            return self.viewer.detect(self._example(number))
        try:
            length = int(self.headers.get("Content-Length") or 0)
        except ValueError:
            length = -1
        if not 0 <= length <= _MAX_BYTES:
            raise UserError(f"The Content-Length is no number of bytes up to {_MAX_BYTES:,}.")
        file = io.BytesIO(self.rfile.read(length))
        return self.viewer.detect(read_image("that was sent", file=file))

    def log_message(self, *args: Any) -> None:
        """Nothing is logged of a request."""


def _check_index(kind: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise UserError(f"There is no {kind} {index}: give one from 0 to below {count}.")


def _as_json(value: Any) -> Reply:
    return "application/json", json.dumps(value).encode()


def _as_jpeg(image: np.ndarray, side: int = 65500) -> Reply:  # JPEG has no larger ones
    file, picture = io.BytesIO(), Image.fromarray(image)
    picture.thumbnail((side, side))
    picture.save(file, "jpeg", quality=90)
    return "image/jpeg", file.getvalue()


def run(args: argparse.Namespace) -> None:
    examples = find_images([args.examples]) if args.examples else []
    viewer = Viewer(predictor_of(args), examples, args.confidence_threshold)
    with make_server(viewer, args.host, args.port) as server:
        print(f"Open http://{args.host}:{args.port} in a browser; Ctrl-C ends it.", flush=True)
        server.serve_forever()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line until Ctrl-C; gives the exit code."""
    return exit_code(run, get_parser().parse_args(argv))

"""A page in the browser that detects objects and shows where queries look: ``smca-serve``."""

import argparse
import io
import threading
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image

from smca.analysis import LayerRecord, NoModulationError, Recorder, draw_gaussians, maps_of
from smca.errors import UserError, exit_code
from smca.inference import Detections, Predictor, add_predictor_arguments, predictor_of, score
from smca.inference.images import rgb_array

_DESCRIPTION = """\
Serve a page for the browser. Give it an image to see the detections, and click into a box to see
where the detection's query looks, in each decoder layer:

    %(prog)s --weights output/demo/model_best.pth
    %(prog)s --weights published --host 0.0.0.0 --port 8000

The server listens on this machine alone unless --host says otherwise.
"""
ALL_SCALES = "all, as the query weighs them"


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_predictor_arguments(parser)
    parser.add_argument(
        "--confidence-threshold",
        type=score,
        default=0.5,
        metavar="SCORE",
        help="lowest score of a detection that the page begins with; default: %(default)s",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


@dataclass
class DetectedImage:
    """An image with its detections.

    Attributes:
        image: (height, width, 3) uint8 RGB.
        detections: all of them, best first.
        layers: a record of each decoder layer; empty for a model without modulation.
        drawn_width: of the picture with the detections, once it is drawn; a small image is enlarged
            for it.
    """

    image: np.ndarray
    detections: Detections
    layers: List[LayerRecord]
    drawn_width: int = 0


class Viewer:
    """What the page shows, without the page; several threads may call it.

    Args:
        predictor: its model is looked into.
    """

    def __init__(self, predictor: Predictor):
        self.predictor = predictor
        self.strides: List[int] = []
        self.num_layers = 0
        # A recorder keeps the last call of the model, which must not be another visitor's.
        self._lock = threading.Lock()
        blank = self.detect(np.zeros((64, 64, 3), np.uint8))
        if blank.layers:
            self.strides, self.num_layers = blank.layers[0].strides, len(blank.layers)

    def detect(self, image: np.ndarray) -> DetectedImage:
        """Detect objects in a (height, width, 3) uint8 RGB image."""
        with self._lock:
            try:
                recorder = Recorder(self.predictor.model)
            except NoModulationError:
                return DetectedImage(image, self.predictor(image, threshold=0), [])
            with recorder:
                detections = self.predictor(image, threshold=0)
            num_layers = recorder.layer(-1).num_layers
            return DetectedImage(image, detections, [recorder.layer(i) for i in range(num_layers)])

    def names(self, detected: DetectedImage, threshold: float) -> List[str]:
        """The detections from that score on, best first, in words."""
        found = detected.detections[detected.detections.scores >= threshold]
        pairs = zip(found.names, found.scores.tolist())
        return [f"{i + 1}: {name} {100 * score:.0f}%" for i, (name, score) in enumerate(pairs)]

    def draw(self, detected: DetectedImage, threshold: float) -> Image.Image:
        """The image with the detections from that score on."""
        drawn = detected.detections[detected.detections.scores >= threshold].draw()
        detected.drawn_width = drawn.width
        return drawn

    def draw_maps(
        self, detected: DetectedImage, index: int, layer: int, scale: Optional[int]
    ) -> Image.Image:
        """Where the query of a detection looks, see `smca.analysis.draw_gaussians`."""
        (maps,) = maps_of(detected.detections[[index]], detected.layers[layer], detected.image)
        file = io.BytesIO()
        draw_gaussians([maps], self.predictor.class_names, scale).savefig(file, format="png")
        return Image.open(file)

    def layer_rows(self, detected: DetectedImage, index: int) -> List[List[Any]]:
        """For each decoder layer its number, the query's center (x, y in pixels of the image) and
        its scale weights in %."""
        rows: List[List[Any]] = []
        query, size = detected.detections.query_indices[[index]], detected.image.shape[:2]
        for number, record in enumerate(detected.layers):
            center = record.centers_in_pixels(query, size)
            shares = [f"{100 * share:.0f}" for share in record.scale_shares(query)[0].tolist()]
            rows.append([number + 1, *(f"{value:.0f}" for value in center[0].tolist()), *shares])
        return rows

    def at(self, detected: DetectedImage, threshold: float, x: float, y: float) -> Optional[int]:
        """The smallest detected box around a point of the image, None if there is none."""
        detections = detected.detections[detected.detections.scores >= threshold]
        x0, y0, x1, y1 = detections.pred_boxes.tensor.unbind(1)
        inside = (x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)
        if not inside.any():
            return None
        return int(detections.pred_boxes.area().masked_fill(~inside, float("inf")).argmin())


def build_page(viewer: Viewer, confidence_threshold: float = 0.5) -> Any:
    """The page, a `gradio.Blocks`, which begins with this lowest score of a detection."""
    gr = import_gradio()
    scales = [f"stride {stride}" for stride in viewer.strides]
    with gr.Blocks(title="SMCA", analytics_enabled=False) as page:
        detected = gr.State(None)
        gr.Markdown("# SMCA: what it detects, and where it looks")
        # Without the button that shows a picture to others.
        quiet: Dict[str, Any] = {"interactive": False, "buttons": ["download", "fullscreen"]}
        with gr.Row():
            # The file itself: Gradio would clip images of 16 bits to white.
            image = gr.Image(
                label="Image",
                elem_id="image",
                height=380,
                type="filepath",
                image_mode=None,
                buttons=["fullscreen"],
            )
            drawn = gr.Image(
                label="Detections: click into a box", elem_id="drawn", height=380, **quiet
            )
        threshold = gr.Slider(
            0, 1, confidence_threshold, step=0.01, label="Lowest score", elem_id="threshold"
        )
        chosen = gr.Radio([], label="Detection", elem_id="chosen")
        with gr.Column(visible=viewer.num_layers > 0):
            with gr.Row():
                # A slider needs two ends, of a decoder with one layer too.
                layer = gr.Slider(
                    1,
                    max(2, viewer.num_layers),
                    max(1, viewer.num_layers),
                    step=1,
                    label="Decoder layer",
                    elem_id="layer",
                    interactive=viewer.num_layers > 1,
                )
                scale = gr.Dropdown(
                    [ALL_SCALES, *scales],
                    value=ALL_SCALES,
                    label="Map of the scale",
                    elem_id="scale",
                    visible=len(scales) > 1,
                )
            maps = gr.Image(label="Where the detection's query looks", elem_id="maps", **quiet)
            table = gr.Dataframe(
                headers=["layer", "center x", "center y", *(f"{name} (%)" for name in scales)],
                label="Over the layers: the center in pixels, and the weights of the scales",
                elem_id="table",
                interactive=False,
            )

        def look(path: Optional[str], least: float) -> Tuple[Any, ...]:
            if path is None:
                return None, None, gr.Radio([], value=None)
            try:
                result = viewer.detect(rgb_array(path))
            except UserError as error:
                raise gr.Error(str(error)) from error
            return result, *show(result, least)

        def show(result: Optional[DetectedImage], least: float) -> Tuple[Any, Any]:
            if result is None:
                return None, gr.Radio([], value=None)
            names = viewer.names(result, least)
            choices = [(name, index) for index, name in enumerate(names)]
            info = None if names else "No detection has such a score: move the slider down."
            return viewer.draw(result, least), gr.Radio(
                choices, value=0 if names else None, info=info
            )

        def show_maps(
            result: Optional[DetectedImage], index: Optional[int], number: float, name: str
        ) -> Any:
            if result is None or index is None or not result.layers:
                return None
            which = scales.index(name) if name in scales else None
            return viewer.draw_maps(result, index, int(number) - 1, which)

        def show_table(result: Optional[DetectedImage], index: Optional[int]) -> List[List[Any]]:
            return [] if result is None or index is None else viewer.layer_rows(result, index)

        # Gradio gives the click to the argument of this type.
        def choose(
            result: Optional[DetectedImage],
            least: float,
            event: gr.SelectData,  # type: ignore[name-defined]
        ) -> Any:
            if result is None:
                return None
            factor = result.image.shape[1] / result.drawn_width
            x, y = event.index
            index = viewer.at(result, least, factor * x, factor * y)
            return gr.skip() if index is None else index

        arguments = [detected, chosen, layer, scale]
        image.change(look, [image, threshold], [detected, drawn, chosen]).then(
            show_maps, arguments, maps
        ).then(show_table, [detected, chosen], table)
        threshold.release(show, [detected, threshold], [drawn, chosen])
        drawn.select(choose, [detected, threshold], chosen)
        for control in (chosen, layer, scale):
            control.change(show_maps, arguments, maps)
        chosen.change(show_table, [detected, chosen], table)
    return page


def launch_options(gr: ModuleType) -> Dict[str, Any]:
    """Of `gradio.Blocks.launch`: no fonts from elsewhere, no server beside this one."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return {"theme": theme, "ssr_mode": False, "quiet": True}


def import_gradio() -> ModuleType:
    """Gradio, which the package does not require.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            "The page needs Gradio: run pip install gradio (or install the extra 'serve' of this "
            "package)."
        ) from error
    return gradio


def run(args: argparse.Namespace) -> None:
    """The command's work, until Ctrl-C."""
    gr = import_gradio()
    page = build_page(Viewer(predictor_of(args)), args.confidence_threshold)
    address, options = f"http://{args.host}:{args.port}", launch_options(gr)
    try:
        page.launch(
            server_name=args.host, server_port=args.port, prevent_thread_lock=True, **options
        )
    except (OSError, OverflowError) as error:  # the second of a port above 65535
        raise UserError(
            f"The page cannot be served at {address}: give another --host or --port."
        ) from error
    print(f"Open {address} in a browser; Ctrl-C ends it.", flush=True)
    page.block_thread()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line until Ctrl-C; gives the exit code."""
    return exit_code(run, get_parser().parse_args(argv))

#!/usr/bin/env python
"""Exported models beside PyTorch's eager mode: differences, nodes, file sizes, speed.

    python benchmarks/compare_export.py                                       # the main models
    python benchmarks/compare_export.py --config configs/smca_r50_50ep.py --openvino

Each config's model, with random weights, is exported to ONNX and runs in onnxruntime on batches of
several sizes, with padding too. Differences are of boxes, in pixels of an image whose long side is
1000, and of scores. Times are of one image of the first size.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from smca.config import load_config
from smca.errors import UserError, command_line, exit_code
from smca.inference import Predictor
from smca.inference.export import OUTPUTS, export_detector
from smca.modeling import SMCA

import numpy as np
import onnx
import torch
from detectron2.structures import Instances
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

from benchmark import build_model
from measuring import CONFIGS, MAIN_MODELS, Options, Size, add_options, print_table

BATCHES: List[List[Size]] = [
    [(800, 1066)],
    [(603, 801)],
    [(801, 333)],
    [(97, 131)],
    [(427, 640), (640, 427)],
    [(320, 480), (333, 250), (301, 203)],
]
COLUMNS = ["config", "runtime", "boxes", "scores", "nodes", "MB", "eager (s)", "runtime (s)"]
_SAME_SCORE = 1e-5

Arrays = Dict[str, np.ndarray]
Runtime = Callable[[Arrays], Sequence[np.ndarray]]


def varied_model(options: Options, config: str) -> SMCA:
    """The config's model with random weights, but scores and weight maps as varied as a trained
    one's."""
    torch.manual_seed(0)
    model: Any = build_model(options, load_config(config)).eval()
    with torch.no_grad():
        model.class_embed.weight.normal_(std=0.1)
        for layer in model.decoder.layers:
            if layer.modulation is not None and layer.modulation.spread is not None:
                layer.modulation.spread.weight.normal_(std=0.02)
    return model


def make_batch(sizes: Sequence[Size]) -> Tuple[List[Dict[str, Any]], Arrays]:
    """Random images in the model's input format, and as the graph's inputs."""
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
    padded = np.zeros((len(sizes), 3, *np.max(sizes, axis=0)), dtype=np.float32)
    for pixels, image in zip(padded, images):
        pixels[:, : image.shape[1], : image.shape[2]] = image
    inputs = {"images": padded, "image_sizes": np.array(sizes, dtype=np.int64)}
    return [{"image": image} for image in images], inputs


def differences(
    wanted: Instances, boxes: Tensor, scores: Tensor, labels: Tensor
) -> Tuple[float, float]:
    """Compare each detection with the nearest one of its class and score, since rounding decides
    the order of equal scores, and which of the last ones are in the list.

    Returns:
        The greatest difference of a box, in thousandths of the image's long side, and of a score.
    """
    number = int((wanted.scores > wanted.scores[-1] + 2 * _SAME_SCORE).sum())
    score = (wanted.scores - scores).abs().max()
    other = wanted.pred_classes[:number, None] != labels
    other |= (wanted.scores[:number, None] - scores).abs() > _SAME_SCORE
    distance = (wanted.pred_boxes.tensor[:number, None] - boxes).abs().amax(dim=-1)
    distance = (distance * 1000 / max(wanted.image_size)).masked_fill(other, 1e6)
    rows, columns = linear_sum_assignment(distance.numpy())
    return float(distance[rows, columns].max()), float(score)


def runtimes(path: str, options: Options) -> Dict[str, Runtime]:
    """The exported file in each runtime, by its name."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    # It would keep the largest memory of each size.
    settings.enable_cpu_mem_arena = False
    session = onnxruntime.InferenceSession(path, settings)
    runs: Dict[str, Runtime] = {"onnxruntime": lambda inputs: session.run(None, inputs)}
    if options.openvino:
        import openvino

        properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": options.threads}
        compiled = openvino.compile_model(path, "CPU", properties)
        runs["OpenVINO"] = lambda inputs: [compiled(inputs)[name] for name in OUTPUTS]
    return runs


def median_seconds(function: Callable[..., Any], inputs: Any, options: Options) -> float:
    """Of a call with the inputs."""
    variables = {"function": function, "inputs": inputs}
    timer = Timer("function(inputs)", globals=variables, num_threads=options.threads)
    return timer.blocked_autorange(min_run_time=options.seconds).median


def compare(config: str, options: Options) -> List[List[str]]:
    """The rows of a config's table."""
    model = varied_model(options, config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        export_detector(Predictor.from_model(model), str(path))
        nodes, megabytes = len(onnx.load(path).graph.node), path.stat().st_size / 1e6
        runs = runtimes(str(path), options)
    rows, largest = [], dict.fromkeys(runs, (0.0, 0.0))
    with torch.no_grad():
        for sizes in BATCHES:
            items, inputs = make_batch(sizes)
            results = [result["instances"] for result in model(items)]
            for name, run in runs.items():
                outputs = [torch.as_tensor(output) for output in run(inputs)]
                found = [differences(*image) for image in zip(results, *outputs)]
                largest[name] = tuple(np.max([largest[name], *found], axis=0))
        items, inputs = make_batch(BATCHES[0])
        eager = median_seconds(model, items, options)
        for name, run in runs.items():
            box, score = largest[name]
            row = [Path(config).stem, name, f"{box:.1e}", f"{score:.1e}", f"{nodes}"]
            seconds = median_seconds(run, inputs, options)
            rows.append([*row, f"{megabytes:.1f}", f"{eager:.2f}", f"{seconds:.2f}"])
    return rows


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--config", action="append", metavar="FILE", help="can be repeated")
    parser.add_argument("--openvino", action="store_true", help="compare with OpenVINO too")
    add_options(parser)
    options = parser.parse_args(argv)
    options.device = "cpu"
    for name in ["onnxruntime"] + ["openvino"] * options.openvino:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: run pip install {name}.")
    torch.set_num_threads(options.threads)
    configs = options.config or [str(CONFIGS / f"{name}.py") for name in MAIN_MODELS]
    progress = tqdm(configs, unit="model", disable=None)
    rows = [row for config in progress for row in compare(config, options)]
    print_table(COLUMNS, rows, options)


if __name__ == "__main__":
    sys.exit(exit_code(main))

#!/usr/bin/env python
"""Exported models beside PyTorch's eager mode: differences, nodes, file sizes, speed.

    compare_export.py                                     # the main models
    compare_export.py --config configs/smca_r50_50ep.py --openvino

Each config's model, with random weights, is exported to ONNX and runs in onnxruntime on batches of
several sizes, with padding too. Differences are of boxes, in pixels of an image whose long side is
1000, and of scores; where neighbors in the list have equal scores but for rounding, their order is
left to chance, so each detection is compared with the nearest one of its class and score. Times are
of one image of the first size.
"""

import argparse
import functools
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from smca.config import load_config
from smca.errors import UserError, at_least, exit_code
from smca.inference import Predictor
from smca.inference.export import OUTPUTS, count_nodes, export_detector
from smca.modeling import SMCA

import numpy as np
import torch
from detectron2.structures import Instances
from scipy.optimize import linear_sum_assignment
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from benchmark import CONFIGS, MAIN_MODELS, device_name
from benchmark_cases import Size, build_model
from figures import command_line, write_figures

BATCHES: List[List[Size]] = [
    [(800, 1066)],
    [(603, 801)],
    [(801, 333)],
    [(97, 131)],
    [(427, 640), (640, 427)],
    [(320, 480), (333, 250), (301, 203)],
]
_SAME_SCORE = 1e-5

Run = Callable[[Dict[str, np.ndarray]], Sequence[np.ndarray]]


def varied_model(options: argparse.Namespace, config: str) -> SMCA:
    """The config's model with random weights, but scores and weight maps as varied as a trained
    one's."""
    torch.manual_seed(0)
    model = build_model(options, load_config(config)).eval()
    with torch.no_grad():
        model.class_embed.weight.normal_(std=0.1)
        layers: Any = model.decoder.layers
        for layer in layers:
            if layer.modulation is not None and layer.modulation.spread is not None:
                layer.modulation.spread.weight.normal_(std=0.02)
    return model


def make_batch(sizes: Sequence[Size]) -> Tuple[List[Dict[str, Any]], Dict[str, np.ndarray]]:
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
    """Greatest difference of a box, in thousandths of the image's long side, and of a score.

    The last detections are left out where it is by rounding that they are in the list."""
    number = int((wanted.scores > wanted.scores[-1] + 2 * _SAME_SCORE).sum())
    score = (wanted.scores - scores).abs().max()
    other = wanted.pred_classes[:number, None] != labels
    other |= (wanted.scores[:number, None] - scores).abs() > _SAME_SCORE
    distance = (wanted.pred_boxes.tensor[:number, None] - boxes).abs().amax(dim=-1)
    distance = distance * 1000 / max(wanted.image_size)
    rows, columns = linear_sum_assignment(distance.masked_fill(other, 1e6).numpy())
    return float(distance.masked_fill(other, 1e6)[rows, columns].max()), float(score)


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Of some calls, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def check_runtimes(with_openvino: bool) -> None:
    """
    Raises:
        UserError: what is not installed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError(
            "Exported models run in onnxruntime: run pip install onnxruntime (or install the extra "
            "'export')."
        )
    if with_openvino and importlib.util.find_spec("openvino") is None:
        raise UserError("OpenVINO is not installed: run pip install openvino.")


def runtimes(path: str, threads: int, with_openvino: bool) -> Dict[str, Run]:
    """The exported file in each runtime, by its name."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    # It would keep the largest memory of each size.
    settings.enable_cpu_mem_arena = False
    session = onnxruntime.InferenceSession(path, settings)
    runs: Dict[str, Run] = {"onnxruntime": lambda inputs: session.run(None, inputs)}
    if with_openvino:
        import openvino

        properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.compile_model(path, "CPU", properties)

        def run(inputs: Dict[str, np.ndarray]) -> List[np.ndarray]:
            outputs = compiled(inputs)
            return [outputs[name] for name in OUTPUTS]

        runs["OpenVINO"] = run
    return runs


def compare(config: str, options: argparse.Namespace) -> List[List[str]]:
    """The rows of a config's table."""
    model = varied_model(options, config)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        export_detector(Predictor.from_model(model), path)
        nodes, megabytes = sum(count_nodes(path).values()), os.path.getsize(path) / 1e6
        runs = runtimes(path, options.threads, options.openvino)
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
        eager = median_seconds(lambda: model(items), options.repeats)
        for name, run in runs.items():
            seconds = median_seconds(functools.partial(run, inputs), options.repeats)
            box, score = largest[name]
            rows.append(
                [Path(config).stem, name, f"{box:.1e}", f"{score:.1e}", str(nodes)]
                + [f"{megabytes:.1f}", f"{eager:.2f}", f"{seconds:.2f}"]
            )
    return rows


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="append", metavar="FILE", help="can be repeated")
    parser.add_argument("--openvino", action="store_true", help="compare with OpenVINO too")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    parser.add_argument("--repeats", type=at_least(1), default=3, help="calls that are timed")
    parser.add_argument("--output", metavar="FILE", help="write the table as JSON")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    options = get_parser().parse_args(argv)
    options.device = "cpu"
    check_runtimes(options.openvino)
    torch.set_num_threads(options.threads)
    headers = ["config", "runtime", "boxes", "scores", "nodes", "MB", "eager (s)", "runtime (s)"]
    command = command_line(__file__, argv or sys.argv[1:])
    where = f"{device_name('cpu')}, {options.threads} threads, torch {torch.__version__}"
    rows: List[List[str]] = []
    configs = options.config or [str(CONFIGS / f"{name}.py") for name in MAIN_MODELS]
    for config in tqdm(configs, unit="model", disable=None):
        rows += compare(config, options)
        if options.output:  # after each, so that a long run that is stopped leaves its results
            write_figures(options.output, command, headers, rows, machine=where)
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    sys.exit(exit_code(main))

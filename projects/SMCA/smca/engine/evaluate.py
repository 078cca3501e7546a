"""Evaluation on a config's test data."""

import logging
from typing import Any, Dict, Iterable, Optional, Sequence

from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from omegaconf import DictConfig
from torch import nn

from smca.config import build
from smca.engine.build import build_test_loader

__all__ = [
    "Results",
    "do_test",
    "log_summary",
]

logger = logging.getLogger(__name__)

Results = Dict[str, Any]  # {task: {metric: value}}


def do_test(
    cfg: DictConfig,
    model: nn.Module,
    test_loader: Optional[Iterable[Any]] = None,
    prefix: str = "",
) -> Results:
    """Evaluate a model on the config's test data, and log the results.

    Args:
        cfg: ``dataloader.test`` and ``dataloader.evaluator`` are used; without an evaluator
            there is nothing to do.
        model: not wrapped in DistributedDataParallel.
        test_loader: built from `cfg` if None.
        prefix: put before the names of the tasks in the results.

    Returns:
        ``{prefix + task: {metric: value}}``, empty in all but the main process.
    """
    if cfg.dataloader.get("evaluator") is None:
        return {}
    if test_loader is None:
        test_loader = build_test_loader(cfg)
    evaluator = build(cfg.dataloader.evaluator, "dataloader.evaluator")
    results = inference_on_dataset(model, test_loader, evaluator)
    results = {prefix + task: metrics for task, metrics in results.items()}
    if comm.is_main_process():
        print_csv_format(results)
    return results


def log_summary(results: Results, checkpoints: Sequence[str], others: Sequence[str]) -> None:
    """Log the last results, without those of single classes, and the paths of the run's files."""
    if not comm.is_main_process():
        return
    for task, metrics in results.items():
        overall = {name: value for name, value in metrics.items() if not name.startswith("AP-")}
        logger.info("%s:\n%s", task, create_small_table(overall))
    logger.info("Checkpoint: %s", ", ".join(checkpoints))
    logger.info("Written: %s", ", ".join(others))

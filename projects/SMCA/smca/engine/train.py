import argparse
import copy
import logging
import os
import random
import shutil
import sys
from typing import Any, Dict, Mapping, Optional, Sequence, cast

import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import create_ddp_model, default_setup, default_writers
from detectron2.engine.hooks import IterationTimer, LRScheduler, PeriodicWriter
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table, setup_logger
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from smca import config
from smca.checkpoint import SMCACheckpointer, read_provenance
from smca.checkpoint.files import find_checkpoints, require_file
from smca.data import category_ids, forget_files
from smca.engine import hooks, runs
from smca.engine.signals import protect_workers
from smca.engine.trainer import Trainer
from smca.errors import ConfigError

logger = logging.getLogger(__name__)

Results = Dict[str, Any]  # {task: {metric: value}}

# Keys of the section `data` that end so are paths of files and folders, or lists of them.
_PATHS = ("json", "images", "annotations", "list", "yaml")


def main(args: argparse.Namespace) -> Results:
    """Train or evaluate, in one process of possibly several.

    Args:
        args: arguments of Detectron2's `default_argument_parser`.

    Returns:
        Results of the (last) evaluation in the main process, empty if there was none; ``bbox`` with
        those of the trained weights, ``ema/bbox`` with those of their average.
    """
    args.config_file = config.find_config_file(args.config_file)  # Detectron2 logs what is in it
    # The data of an evaluation may follow from the checkpoint.
    cfg = config.load_config(args.config_file, args.opts, needed=() if args.eval_only else None)
    train = cfg.train
    device = config.resolve_device(train.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where memory is counted and waited for
    train.device = str(device)
    if train.fast_dev_run:  # every path once, apart from the real run's files
        train.output_dir = os.path.join(train.output_dir, "fast_dev_run")
        train.max_iter, train.eval_period, train.log_period = 3, 0, 1
    if args.eval_only:
        return do_eval(cfg, args)
    if train.early_stopping and train.eval_period == 0 and not train.fast_dev_run:
        raise ConfigError(
            "train.early_stopping counts evaluations, of which train.eval_period=0 makes none: set "
            "train.eval_period to the iterations between two, or train.early_stopping=0."
        )
    _require_files(cfg.get("data") or {})
    trained = runs.from_main_process(find_checkpoints, train.output_dir)
    # Started again by our launcher, or by torchrun.
    if getattr(args, "restart", 0) or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        args.resume = bool(trained)
    if train.fast_dev_run and not args.resume:
        runs.from_main_process(shutil.rmtree, train.output_dir, True)
    elif trained and not args.resume:
        raise ConfigError(
            f"train.output_dir={train.output_dir} holds a training: continue it with --resume, "
            "choose another folder, or remove this one."
        )
    runs.log_to(train.output_dir)
    runs.from_main_process(runs.lock, train.output_dir)
    saved = runs.open_run(train.output_dir) if args.resume else None
    if train.seed < 0:
        drawn = runs.from_main_process(random.SystemRandom().randrange, 2**31)
        train.seed = saved.seed if saved else drawn
    _setup(cfg, args)
    return do_train(cfg, args, saved)


def _setup(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Call Detectron2's `default_setup` without an output folder: the log is open already, and
    `do_train` writes config.yaml once the config is accepted. What it says of the environment and
    the text of the config file are only in the log's file: an error would follow pages later."""
    without_output = copy.deepcopy(cfg)
    del without_output.train.output_dir
    for handler in setup_logger(None, distributed_rank=comm.get_rank()).handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.addFilter(lambda record: record.name != "detectron2")
    default_setup(without_output, args)


def _require_files(data: Mapping[str, Any]) -> None:
    """Name a wrong path of the data before the first of them is read, which may take minutes."""
    for key in data:
        for path in data[key] if isinstance(data[key], ListConfig) else [data[key]]:
            if key.endswith(_PATHS) and isinstance(path, str) and "://" not in path:
                if not os.path.exists(os.path.expanduser(path)):
                    raise ConfigError(f"data.{key}={path} does not exist: correct the path.")


def do_train(
    cfg: DictConfig, args: argparse.Namespace, saved: Optional[runs.SavedRun] = None
) -> Results:
    """Train as the config says, going on from `saved` if there is one, and save the config as
    config.yaml once it is known to fit the data, the model, and the checkpoint."""
    fitted = config.fit_to_data(cfg, saved.provenance.get("fitted", {}) if saved else {})
    train, to_save = cfg.train, copy.deepcopy(cfg)
    if saved:
        config.use_classes(cfg, saved.provenance)
    run = runs.build_run(cfg, saved)
    checkpointer = SMCACheckpointer(
        run.model,
        train.output_dir,
        provenance={**_provenance(cfg, args), "fitted": fitted},
        max_to_keep=train.checkpointer.max_to_keep,
    )
    if not saved:
        checkpointer.load(train.init_checkpoint, checkpointables=[])
    # The average is copied from the model before that is wrapped or compiled.
    ema = hooks.ModelEMA(run.model, train.model_ema.decay) if train.model_ema.enabled else None
    trainer = _build_trainer(cfg, run)
    checkpointer.add_checkpointable("trainer", trainer)
    if ema:
        checkpointer.add_checkpointable("model_ema", ema.model)
    forget_files()
    results: Results = {}

    def evaluate() -> Results:
        results.update(do_test(run.model, run.test_loader, run.evaluator))
        if ema:
            results.update(do_test(ema.model, run.test_loader, run.evaluator, prefix="ema/"))
        # All processes end early by the results of the first.
        return comm.all_gather(dict(results))[0]

    best = hooks.BestCheckpointer(
        train.eval_period, checkpointer, train.best_metric, train.early_stopping
    )
    trainer.register_hooks(
        [
            # Without a time, the progress line divides by zero where a training fails at once.
            IterationTimer(warmup_iter=0),
            LRScheduler(scheduler=run.schedule),
            ema,
            hooks.EmergencyCheckpointer(checkpointer),
            # Checkpoints before evaluations, which may fail.
            hooks.PeriodicCheckpointer(checkpointer, train.checkpointer.period),
            hooks.EvalHook(train.eval_period, evaluate),
            best,
            *config.build(train.hooks),
        ]
    )
    start_iter = _resume(checkpointer, trainer, ema, saved) if saved else 0
    if start_iter >= train.max_iter:
        logger.warning(
            "The training in %s is finished, with %d iterations: it is only evaluated. To go on, "
            "set train.max_iter to more than these.",
            train.output_dir,
            start_iter,
        )
    # A config that is refused above must not replace the one that fits the run's checkpoints.
    runs.from_main_process(runs.save_config, to_save, train.output_dir)
    if comm.is_main_process():
        writers = [*config.build(train.writers), *default_writers(train.output_dir, train.max_iter)]
        trainer.register_hooks([PeriodicWriter(writers, train.log_period)])
    trainer.train(start_iter, train.max_iter)
    names = ["model_best.pth", "metrics.json", "log.txt", "config.yaml"]
    _log_summary(results, checkpointer.get_checkpoint_file(), train.output_dir, names)
    return results


def do_eval(cfg: DictConfig, args: argparse.Namespace) -> Results:
    """Evaluate the weights of ``train.init_checkpoint`` (or, with ``--resume``, of the newest
    checkpoint in ``train.output_dir``), and their average if the file has one.
    """
    folder, log = cfg.train.output_dir, "log_eval.txt"
    runs.log_to(folder, log)
    _setup(cfg, args)
    saved = runs.open_run(folder, need_trainer=False) if args.resume else None
    if saved is None:
        path = OmegaConf.select(cfg, "train.init_checkpoint")
        if not path:
            raise ConfigError(
                "Nothing to evaluate: give a checkpoint with train.init_checkpoint=FILE."
            )
        runs.from_main_process(require_file, path)
        saved = runs.SavedRun(path, runs.from_main_process(read_provenance, path))
    config.use_classes(cfg, saved.provenance)
    needed = ["model", "dataloader.test", "dataloader.evaluator"]
    config.require_values(cfg, needed, args.config_file)
    model, test_loader, evaluator = runs.build_evaluation(cfg, saved)
    checkpointer = SMCACheckpointer(model, folder, need_detector=True)
    others = checkpointer.resume(saved.path, saved.content)

    results = do_test(model, test_loader, evaluator)
    if "model_ema" in others:
        model.load_state_dict(others["model_ema"])
        results.update(do_test(model, test_loader, evaluator, prefix="ema/"))
    _log_summary(results, saved.path, folder, [log])
    return results


def do_test(model: nn.Module, test_loader: Any, evaluator: Any, prefix: str = "") -> Results:
    """Evaluate a model that is not wrapped in DistributedDataParallel, and log the results
    ``{prefix + task: {metric: value}}``, which are empty in all but the main process, and where
    there is no evaluator."""
    if evaluator is None:
        return {}
    results = inference_on_dataset(model, test_loader, evaluator)
    results = {prefix + task: metrics for task, metrics in results.items()}
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _log_summary(results: Results, checkpoint: str, folder: str, names: Sequence[str]) -> None:
    """Log the last results, without those of single classes, and the paths of the run's files."""
    if comm.is_main_process():
        for task, metrics in results.items():
            overall = {name: value for name, value in metrics.items() if "AP-" not in name}
            logger.info("%s:\n%s", task, create_small_table(overall))
        paths = filter(os.path.exists, [os.path.join(folder, name) for name in names])
        logger.info("Checkpoint: %s\nWritten: %s", checkpoint, ", ".join(paths))


def _build_trainer(cfg: DictConfig, run: runs.Run) -> Trainer:
    train, model = cfg.train, run.model
    if train.compile:
        getattr(model, "compile_parts", model.compile)()
    torch.set_float32_matmul_precision(train.float32_matmul_precision)
    protect_workers(run.train_loader)
    ddp = cast(Dict[str, Any], OmegaConf.to_container(train.ddp, resolve=True))
    device = torch.device(train.device)
    device_ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    return Trainer(
        create_ddp_model(model, device_ids=device_ids, **ddp),
        run.train_loader,
        run.optimizer,
        amp_dtype=config.amp_dtype(train.amp.dtype, device) if train.amp.enabled else None,
        accumulate=train.accumulate,
        clip_grad_norm=train.clip_grad_norm,
        seed=train.seed,
        total_batch_size=cfg.dataloader.train.get("total_batch_size"),
    )


def _resume(
    checkpointer: SMCACheckpointer,
    trainer: Trainer,
    ema: Optional[hooks.ModelEMA],
    saved: runs.SavedRun,
) -> int:
    """Load a checkpoint, and return the iteration to go on with."""
    others = checkpointer.resume(saved.path, saved.content)
    # Checkpoints hold the number of the iteration that was just finished.
    start_iter = trainer.iter + 1
    if ema is not None and not ema.has_begun:
        logger.warning("The checkpoint has no average of the weights: it starts here.")
        ema.model.load_state_dict(checkpointer.model.state_dict())
    if "model_ema" in others:
        raise ConfigError(
            f"The training in {checkpointer.save_dir} averages its weights: go on with "
            "train.model_ema.enabled=True, lest the average be lost."
        )
    logger.info("Resuming at iteration %d.", start_iter)
    return start_iter


def _provenance(cfg: DictConfig, args: argparse.Namespace) -> Dict[str, Any]:
    """What a checkpoint says about itself, in plain types."""
    names = config.dataset_names(cfg, "train")
    class_names = MetadataCatalog.get(names[0]).get("thing_classes", []) if names else []
    return {
        "config": os.path.basename(args.config_file),
        # Those that make the model and what it sees; the run's own would only hold local paths.
        "overrides": [text for text in args.opts if not text.lstrip("+").startswith("train.")],
        "class_names": list(class_names),
        "category_ids": category_ids(names[0]) if names else [],
        "num_classes": OmegaConf.select(cfg, "model.num_classes"),
        "max_iter": cfg.train.max_iter,
    }

import argparse
import copy
import logging
import os
import random
from typing import Any, Callable, Dict, List, Optional, Tuple, TypeVar, cast

import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase, create_ddp_model, default_setup, hooks
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from smca.checkpoint import SMCACheckpointer, read_provenance
from smca.checkpoint.files import find_checkpoints
from smca.config import (
    AMP_DTYPES,
    build,
    build_model,
    check_early_stopping,
    dataset_names,
    find_config_file,
    load_config,
    require_values,
    resolve_device,
    use_classes,
)
from smca.data import category_ids
from smca.engine.build import Run, build_run, build_test_data
from smca.engine.evaluate import Results, do_test, log_summary
from smca.engine.hooks import (
    BestCheckpointer,
    EarlyStopping,
    EmergencyCheckpointer,
    EvalHook,
    ModelEMA,
    PeriodicCheckpointer,
)
from smca.engine.pictures import EvaluationPictures
from smca.engine.run_folder import (
    claim,
    find_checkpoint,
    log_to,
    release,
    save_config,
    set_previous_run_aside,
)
from smca.engine.signals import protect_workers
from smca.engine.trainer import Trainer
from smca.engine.writers import build_writers
from smca.errors import ConfigError, UserError
from smca.modeling import SMCA

__all__ = ["do_eval", "do_train", "main"]

logger = logging.getLogger(__name__)

_DEV_RUN_STEPS = 3
_EVAL_LOG = "log_eval.txt"

_T = TypeVar("_T")


def main(args: argparse.Namespace) -> Results:
    """Train or evaluate, in one process of possibly several.

    Args:
        args: of Detectron2's `default_argument_parser`.

    Returns:
        Results of the (last) evaluation, empty if there was none; ``bbox`` with those of
        the trained weights, ``ema/bbox`` with those of their average. Only in the main process.

    Raises:
        UserError: see its docstring.
    """
    args.config_file = find_config_file(args.config_file)  # Detectron2 logs what is in it
    # The data of an evaluation may follow from the checkpoint.
    cfg = load_config(args.config_file, args.opts, needed=() if args.eval_only else None)
    if not args.eval_only:
        check_early_stopping(cfg.train)
    cfg.train.device = str(resolve_device(cfg.train.device))
    if cfg.train.fast_dev_run:
        _shorten(cfg.train)
    if args.eval_only:
        log_to(cfg.train.output_dir, _EVAL_LOG)
        _setup(cfg, args)
        return do_eval(cfg, args)
    try:
        _from_main_process(claim, cfg.train.output_dir)
        return _start_or_resume(cfg, args)
    finally:
        release(cfg.train.output_dir)


def _start_or_resume(cfg: DictConfig, args: argparse.Namespace) -> Results:
    train = cfg.train
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        args.resume = bool(_from_main_process(find_checkpoints, train.output_dir))
    if not args.resume:
        previous, train.init_checkpoint = _from_main_process(set_previous_run_aside, train)
    log_to(train.output_dir)
    if not args.resume and previous:
        logger.warning(
            "%s holds another run, whose files are now in %s; --resume would have continued it.",
            train.output_dir,
            previous,
        )
    last = _from_main_process(find_checkpoint, train.output_dir) if args.resume else ""
    train.seed = _from_main_process(_choose_seed, train, last)
    _setup(cfg, args)
    return do_train(cfg, args, last)


def _from_main_process(function: Callable[..., _T], *args: Any) -> _T:
    """What a function returns in the main process, or the UserError that it raises there."""
    result = error = None
    if comm.is_main_process():
        try:
            result = function(*args)
        except UserError as raised:
            error = raised
    result, error = comm.all_gather((result, error))[0]
    if error is not None:
        raise error
    return result


def _choose_seed(train: DictConfig, last: str) -> int:
    """The seed, for a negative one that of the run to resume, or else a random one."""
    if train.seed >= 0:
        return train.seed
    if not last:
        return random.SystemRandom().randrange(2**31)
    checkpoint = torch.load(last, map_location="cpu", mmap=True, weights_only=True)
    return checkpoint["trainer"].get("seed", 0)


def _setup(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Detectron2's `default_setup`, but for its files: the log is open, and config.yaml waits until
    what it says is accepted."""
    without_output = copy.deepcopy(cfg)
    del without_output.train.output_dir
    default_setup(without_output, args)


def _shorten(train: DictConfig) -> None:
    """Settings for a run that takes every path once, apart from the real one's files."""
    train.output_dir = os.path.join(train.output_dir, "fast_dev_run")
    train.max_iter = _DEV_RUN_STEPS
    train.eval_period = 0
    train.log_period = 1


def do_eval(cfg: DictConfig, args: argparse.Namespace) -> Results:
    """Evaluate the weights of ``train.init_checkpoint`` (or, with ``--resume``, of the newest
    checkpoint in ``train.output_dir``), and their average if the file has one.
    """
    runs = SMCACheckpointer(nn.Module(), cfg.train.output_dir)
    last = _from_main_process(runs.find_resumable, False) if args.resume else ""
    path = last or OmegaConf.select(cfg, "train.init_checkpoint")
    if not path:
        raise ConfigError("Nothing to evaluate: give a checkpoint with train.init_checkpoint=FILE.")
    provenance = _from_main_process(read_provenance, path)
    use_classes(cfg, provenance)
    needed = ["model", "dataloader.test", "dataloader.evaluator"]
    require_values(cfg, needed, args.config_file)
    test_loader = build_test_data(cfg, path, provenance)
    model = build_model(cfg)
    checkpointer = SMCACheckpointer(model, cfg.train.output_dir, need_detector=True)
    others = checkpointer.resume(path) if last else checkpointer.load(path)

    results = do_test(cfg, model, test_loader)
    if "model_ema" in others:
        model.load_state_dict(others["model_ema"])
        results.update(do_test(cfg, model, test_loader, prefix="ema/"))
    log_summary(results, [path], [os.path.join(cfg.train.output_dir, _EVAL_LOG)])
    return results


def do_train(
    cfg: DictConfig,
    args: argparse.Namespace,
    resume_from: Optional[str] = None,
) -> Results:
    """Train as the config says, which becomes config.yaml once it is seen to fit data, model and
    checkpoint.

    Args:
        cfg: the whole config.
        args: of Detectron2's `default_argument_parser`.
        resume_from: a checkpoint of this training to go on from, or "". None: with ``--resume``
            the newest in ``train.output_dir``.

    Returns:
        Results of the last evaluation, see :func:`main`.
    """
    train, to_save = cfg.train, copy.deepcopy(cfg)
    if resume_from is None and args.resume:
        resume_from = _from_main_process(find_checkpoint, train.output_dir)
    before = _from_main_process(read_provenance, resume_from) if resume_from else {}
    use_classes(cfg, before)
    run = build_run(cfg, resume_from or "", before)
    model = run.model

    protect_workers(run.train_loader)
    checkpointer = SMCACheckpointer(
        model,
        train.output_dir,
        provenance=_provenance(cfg, args),
        max_to_keep=train.checkpointer.max_to_keep,
    )
    if not resume_from:
        checkpointer.load(train.init_checkpoint, checkpointables=[])
    # Before the model is wrapped or compiled, so that it is a plain copy.
    ema = ModelEMA(model, train.model_ema.decay) if train.model_ema.enabled else None

    trainer = _build_trainer(cfg, run)
    checkpointer.add_checkpointable("trainer", trainer)
    if ema is not None:
        checkpointer.add_checkpointable("model_ema", ema.averaged)
    results: Results = {}
    pictures = EvaluationPictures(cfg, train.num_pictures)

    def evaluate() -> Results:
        results.update(do_test(cfg, model, run.test_loader))
        if ema is not None:
            results.update(do_test(cfg, ema.model, run.test_loader, prefix="ema/"))
        if comm.is_main_process():
            drawn = ema.model if ema and train.best_metric.startswith("ema/") else model
            pictures.put(drawn, trainer.storage)
        # All processes end early by the results of the first.
        return comm.all_gather(dict(results))[0]

    trainer.register_hooks(_build_hooks(train, run.schedule, checkpointer, ema, evaluate))
    start_iter = _resume(checkpointer, trainer, ema, resume_from) if resume_from else 0
    # Not before all is accepted: the run's checkpoints would no longer fit.
    _from_main_process(save_config, to_save, train.output_dir)
    if comm.is_main_process():
        trainer.register_hooks([hooks.PeriodicWriter(build_writers(train), train.log_period)])
    trainer.train(start_iter, train.max_iter)
    log_summary(results, *_written_files(train.output_dir, checkpointer))
    return results


def _build_trainer(cfg: DictConfig, run: Run) -> Trainer:
    train, model = cfg.train, run.model
    if train.compile:
        cast(SMCA, model).compile_parts()
    ddp = cast(Dict[str, Any], OmegaConf.to_container(train.ddp, resolve=True))
    is_cuda = torch.device(train.device).type == "cuda"
    return Trainer(
        create_ddp_model(
            model, device_ids=[torch.cuda.current_device()] if is_cuda else None, **ddp
        ),
        run.train_loader,
        run.optimizer,
        amp_dtype=AMP_DTYPES[train.amp.dtype] if train.amp.enabled else None,
        accumulate=train.accumulate,
        clip_grad_norm=train.clip_grad_norm,
        seed=train.seed,
        total_batch_size=cfg.dataloader.train.get("total_batch_size"),
        skip_nonfinite=train.skip_nonfinite,
        report_dir=train.output_dir,
    )


def _build_hooks(
    train: DictConfig,
    schedule: Any,
    checkpointer: SMCACheckpointer,
    ema: Optional[ModelEMA],
    evaluate: Callable[[], Results],
) -> List[Optional[HookBase]]:
    state_hooks = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=schedule),
        ema,
        EmergencyCheckpointer(checkpointer),
    ]
    patience = train.early_stopping
    return state_hooks + [
        # Checkpoints before evaluations, which may fail.
        PeriodicCheckpointer(checkpointer, train.checkpointer.period),
        EvalHook(train.eval_period, evaluate),
        BestCheckpointer(train.eval_period, checkpointer, train.best_metric),
        EarlyStopping(patience, train.best_metric) if patience else None,
        *build(train.get("hooks", []), "train.hooks"),
    ]


def _resume(
    checkpointer: SMCACheckpointer, trainer: Trainer, ema: Optional[ModelEMA], path: str
) -> int:
    """
    Returns:
        The iteration to go on with.
    """
    others = checkpointer.resume(path)
    # Checkpoints hold the number of the iteration that was just finished.
    start_iter = trainer.iter + 1
    if ema is not None and not ema.averaged.n_averaged:
        logger.warning("The checkpoint has no average of the weights: it starts here.")
        ema.averaged.load_state_dict(copy.deepcopy(checkpointer.model.state_dict()))
    if "model_ema" in others:
        logger.warning(
            "The checkpoint's average of the weights is dropped, since "
            "train.model_ema.enabled is false."
        )
    logger.info("Resuming at iteration %d.", start_iter)
    return start_iter


def _provenance(cfg: DictConfig, args: argparse.Namespace) -> Dict[str, Any]:
    """What a checkpoint says about itself, in plain types."""
    names = dataset_names(cfg, "train")
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


def _written_files(output_dir: str, checkpointer: SMCACheckpointer) -> Tuple[List[str], List[str]]:
    names = ["model_best.pth", "metrics.json", "log.txt", "config.yaml"]
    paths = [os.path.join(output_dir, name) for name in names]
    return [checkpointer.get_checkpoint_file()], [path for path in paths if os.path.exists(path)]

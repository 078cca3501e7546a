"""What a training does with its evaluations: keep the best weights, end early, and make up for one
that a kill left out."""

import logging
import math
import os
from typing import Any, Collection, Dict, List, Optional, Sequence

from detectron2.checkpoint import Checkpointer
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from smca.analysis import read_metrics
from smca.checkpoint.files import load_tensors
from smca.engine.signals import React
from smca.errors import UserError

__all__ = ["BestCheckpointer", "EarlyStopping", "EvalHook", "MissedEvaluation"]

logger = logging.getLogger(__name__)


class EvalHook(hooks.EvalHook):
    """Detectron2's :class:`EvalHook`, which a signal ends at once: the state is whole."""

    def _do_eval(self) -> None:
        with self.trainer.signals.reacting(React.AT_ONCE):
            super()._do_eval()

    def after_train(self) -> None:
        if self.trainer.error is None:  # not even if it failed in the last iteration
            super().after_train()


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's :class:`BestCheckpointer`, resumable: the best value so far is kept in the best
    checkpoint itself, and that checkpoint is never what ``--resume`` continues from (unless there
    is no other). A missing or nan metric is no error.
    """

    _is_warned = False

    def before_train(self) -> None:
        path = os.path.join(self._checkpointer.save_dir, self._file_prefix + ".pth")
        if self.trainer.start_iter > 0 and os.path.isfile(path):
            try:
                best = load_tensors(path).get("best", {})
            except Exception as error:  # a broken file can raise anything
                logger.warning(
                    "%s cannot be read (%s): the best checkpoint is looked for anew.", path, error
                )
                return
            if best.get("metric") == self._val_metric:
                self.best_metric, self.best_iter = best["value"], best["iteration"]

    def _best_checking(self) -> None:
        latest = self.trainer.storage.latest()
        value, iteration = latest.get(self._val_metric, (None, None))
        if value is None:
            self._warn_of_missing([name for name in latest if "/" in name])
        if value is None or iteration == self.best_iter:
            return
        if self.best_metric is not None and not self._compare(value, self.best_metric):
            return
        if not self._update_best(value, iteration):
            return
        last = self._checkpointer.get_checkpoint_file()
        best = {"metric": self._val_metric, "value": float(value), "iteration": int(iteration)}
        self._checkpointer.save(self._file_prefix, best=best)
        if last:
            self._checkpointer.tag_last_checkpoint(os.path.basename(last))
        logger.info("Best %s so far: %.3f at iteration %d.", self._val_metric, value, iteration)

    def _warn_of_missing(self, metrics: List[str]) -> None:
        if metrics and not self._is_warned:
            self._is_warned = True
            logger.warning(
                "train.best_metric=%s is none of the evaluation's, so that no best checkpoint is "
                "kept. There are: %s.",
                self._val_metric,
                ", ".join(sorted(metrics)),
            )


class EarlyStopping(HookBase):
    """Ends the training, in all processes, when a metric has not become better for so many
    evaluations in a row.

    The last state is saved as ``model_final.pth``, and what was best so far is in the checkpoints,
    so that a resumed training ends where an unbroken one does. Put it behind `EvalHook`. An
    evaluation that has no such metric does not count.

    Args:
        period: iterations from one evaluation to the next, as of the `EvalHook`.
        patience: evaluations, at least 1.
        checkpointer: saves the last state.
        metric: such as ``bbox/AP``; more is better.
    """

    def __init__(self, period: int, patience: int, checkpointer: Checkpointer, metric: str):
        self._period = period
        self._patience = patience
        self._checkpointer = checkpointer
        self.metric = metric
        self._best: Optional[float] = None
        self._num_worse = 0  # since the best
        self._last_iter = -1  # of what was counted

    def before_train(self) -> None:
        self._stop_if_due()

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if self._period <= 0 or next_iter % self._period or next_iter == self.trainer.max_iter:
            return
        # Only the main process has results.
        value, iteration = self.trainer.storage.latest().get(self.metric, (None, None))
        self.count(value if iteration == self.trainer.iter else None)

    def count(self, value: Optional[float]) -> None:
        """Take the evaluation of this iteration into account, unless that was done before.

        Args:
            value: of the metric, None if there is none; that of the main process counts.
        """
        value = comm.all_gather(value)[0]
        if value is None or self._last_iter >= self.trainer.iter:
            return
        self._last_iter = self.trainer.iter
        if math.isfinite(value) and (self._best is None or value > self._best):
            self._best, self._num_worse = float(value), 0
        else:
            self._num_worse += 1
        if self._stop_if_due():
            self._checkpointer.save("model_final", iteration=self.trainer.iter)

    def _stop_if_due(self) -> bool:
        if self._num_worse < self._patience:
            return False
        logger.info(
            "The training ends early: %s did not become better than %s in %d evaluations "
            "(train.early_stopping=%d).",
            self.metric,
            "nan" if self._best is None else f"{self._best:.3f}",
            self._num_worse,
            self._patience,
        )
        self.trainer.stopped_early = True
        return True

    def state_dict(self) -> Dict[str, Any]:
        return {"best": self._best, "num_worse": self._num_worse, "last_iter": self._last_iter}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self._best, self._num_worse = state_dict["best"], state_dict["num_worse"]
        self._last_iter = state_dict.get("last_iter", -1)


class MissedEvaluation(HookBase):
    """When a training goes on from a checkpoint that should have been evaluated, and was not before
    the run ended, does that first; if it was, `EarlyStopping` counts it, which the checkpoint
    may be too old to say. Put it behind the others.

    Args:
        period: iterations from one evaluation to the next, as of the `EvalHook`.
        metrics_file: metrics.json, which tells what was evaluated.
        steps: the `EvalHook`, and those that act on its results.
    """

    def __init__(self, period: int, metrics_file: str, steps: Sequence[HookBase]) -> None:
        self._period = period
        self._metrics_file = metrics_file
        self._steps = steps

    def before_train(self) -> None:
        trainer = self.trainer
        start = trainer.start_iter
        # What follows the last iteration is evaluated in any case.
        if self._period <= 0 or start % self._period or not 0 < start < trainer.max_iter:
            return
        # Of a training that was to end here, the results are one number further.
        results = comm.all_gather(self._results_of((start - 1, start)))[0]
        trainer.iter = trainer.storage.iter = start - 1
        if not results:
            logger.info("The evaluation of iteration %d is made up for.", start - 1)
        for hook in self._steps:
            if not results:
                hook.after_step()
            elif isinstance(hook, EarlyStopping):
                hook.count(results.get(hook.metric))
        trainer.iter = trainer.storage.iter = start

    def _results_of(self, iterations: Collection[int]) -> Dict[str, float]:
        """What metrics.json has of an evaluation after one of these iterations, by its name."""
        try:
            metrics = read_metrics(self._metrics_file)
        except UserError:  # nothing was written yet
            return {}
        # The results' names are task/metric.
        return {
            name: value
            for name, (found, values) in metrics.items()
            if "/" in name
            for iteration, value in zip(found, values)
            if iteration in iterations
        }

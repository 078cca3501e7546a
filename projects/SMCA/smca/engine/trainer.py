import collections
import contextlib
import functools
import logging
import math
import random
import time
from typing import Any, Dict, Iterable, List, Optional, Tuple

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.common.history_buffer import HistoryBuffer
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smca.data.loader import set_start_sample
from smca.engine.signals import STOP_SIGNALS, StopSignals
from smca.errors import CheckpointError, NonFiniteError, some

logger = logging.getLogger(__name__)

# Keeps the random numbers of the model apart from those of the data loader, which are
# derived from the same seed.
_MODEL = 2
# Gradients that overflow at such a scale of the loss are broken, float16 or not.
_LEAST_SCALE = 2.0**-14
# What a config says of an optimizer, and a checkpoint as well.
_OPTIMIZER_SETTINGS = {"lr", "weight_decay", "betas", "eps", "momentum"}


class Trainer(SimpleTrainer):
    """Detectron2's :class:`SimpleTrainer` with mixed precision, gradient accumulation, gradient
    clipping, and exact resuming: on the CPU, a training that was stopped after any iteration and
    resumed ends with the same bits as one that never stopped, if the data loader is
    :func:`smca.data.build_train_loader`.

    Args:
        model: maps a batch to a dict of scalar losses whose sum is minimized; may be wrapped in
            DistributedDataParallel.
        data_loader: yields batches without end.
        amp_dtype: bfloat16 or float16 runs the model under autocast; float16 also scales the loss.
            None turns mixed precision off.
        accumulate: number of batches whose losses are averaged for an iteration.
        clip_grad_norm: largest norm of all gradients together. None or 0 does not clip.
        seed: a number that is not negative, the same in all processes.
        total_batch_size: number of images of a batch in all processes, by which a resumed run
            knows how far it has got in the data.
    """

    # Hooks read these.
    error: Optional[BaseException] = None  # that ended the training
    stop_signal: Optional[int] = None  # after which all processes stop after this iteration
    last_iter: int  # whose step was taken; unlike `iter`, it does not count on after the last one
    # From the beginning of the optimizer's step until a hook has seen the iteration to its end.
    is_updating = False
    stopped_early = False  # a hook sets this in all processes to end the training

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        amp_dtype: Optional[torch.dtype] = None,
        accumulate: int = 1,
        clip_grad_norm: Optional[float] = None,
        seed: int = 0,
        total_batch_size: Optional[int] = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.amp_dtype = amp_dtype
        self.accumulate = accumulate
        self.clip_grad_norm = clip_grad_norm or math.inf
        self.seed = seed
        self.total_batch_size = total_batch_size
        self.signals = StopSignals()
        self._start_sample = 0  # in the stream of data
        self._running = [x for module in get_bn_modules(model) for x in module.buffers()]
        self._statistics: List[Tensor] = []
        self.device = next(model.parameters()).device
        # Gradients that are not scaled can underflow in float16.
        self.grad_scaler = torch.amp.GradScaler(
            self.device.type, enabled=amp_dtype == torch.float16
        )

    def train(self, start_iter: int, max_iter: int) -> None:
        """Train as in Detectron2, but end after an iteration that sets `stopped_early`."""
        logger.info("Starting training from iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.last_iter = start_iter - 1
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            # As many values of a metric as a writer looks at: a million are gigabytes.
            buffer = functools.partial(HistoryBuffer, max_length=1000)
            self.storage._history = collections.defaultdict(buffer)
            try:
                self.before_train()
                while self.iter < self.max_iter and not self.stopped_early:
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    self.iter += 1
            except BaseException as error:
                self.error = error
                if isinstance(error, Exception):
                    # The logger of Detectron2's own loop, of which users may have set filters.
                    logging.getLogger("detectron2.engine.train_loop").exception(
                        "Exception during training:"
                    )
                raise
            finally:
                self.after_train()

    def before_train(self) -> None:
        try:
            set_start_sample(self.data_loader, self._start_sample)
        except TypeError as error:
            if self.start_iter > 0:
                logger.warning("The data start over, the run does not go on exactly: %s", error)
        super().before_train()

    def after_train(self) -> None:
        # The traceback of an error may keep the workers of the data loader alive.
        iterator: Any = self._data_loader_iter_obj
        self._data_loader_iter_obj: Any = None
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
            for worker in iterator._workers:  # one that is stuck does not end by itself
                worker.kill()
        try:
            super().after_train()
        finally:
            self.error = None  # whose traceback holds on to all that there was
            self.signals.restore()

    def run_step(self) -> None:
        """
        Raises:
            NonFiniteError: a loss or the gradient is nan or infinite. It is raised in all
                processes, and the weights are still those of the last iteration.
        """
        assert self.model.training, "the model was changed to eval mode"
        # The forward pass of an iteration that fails later changes these.
        self._statistics = [buffer.clone() for buffer in self._running]
        self._compute_gradients()
        self.is_updating = True
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self._statistics = []
        self.last_iter = self.iter

    def restore_statistics(self) -> None:
        """Put the statistics of batch norm back to those of the last complete iteration."""
        for buffer, value in zip(self._running, self._statistics):
            buffer.copy_(value)

    def _compute_gradients(self) -> None:
        own_losses: List[Tensor] = []
        file_names: List[str] = []
        data_time = 0.0
        self.optimizer.zero_grad()
        for micro_batch in range(self.accumulate):
            start = time.perf_counter()
            # One of several processes must not stop in an iteration that the others complete.
            with self.signals.interruptible(comm.get_world_size() == 1):
                data = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            names, losses = self._forward_backward(data, micro_batch)
            own_losses.append(losses)
            if isinstance(data, list):
                file_names += [x["file_name"] for x in data if "file_name" in x]
        self.after_backward()

        self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        total_norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm)
        means = torch.stack(own_losses).mean(dim=0)
        numbers, grad_norm, scale = self._to_host(means, total_norm)
        values = dict(zip(names, numbers))
        self._require_finite(values, grad_norm, scale, file_names)
        metrics = {"data_time": data_time, "total_loss": sum(values.values()), **values}
        if math.isfinite(grad_norm):
            metrics["grad_norm"] = grad_norm
        if self.grad_scaler.is_enabled():
            metrics["grad_scale"] = scale
        self.storage.put_scalars(**metrics)

    def _forward_backward(self, data: Any, micro_batch: int) -> Tuple[List[str], Tensor]:
        """The losses' names, and their values as one tensor, which a GPU adds up at once."""
        # Random states are a function of the position in the training, so that a checkpoint
        # need not hold them: the iteration number restores them, on any number of GPUs.
        batch = self.iter * self.accumulate + micro_batch
        entropy = (self.seed, _MODEL, comm.get_rank(), batch)
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

        is_last = micro_batch == self.accumulate - 1
        skip_sync = isinstance(self.model, DistributedDataParallel) and not is_last
        with self.model.no_sync() if skip_sync else contextlib.nullcontext():
            with torch.amp.autocast(
                self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
            ):
                losses = self.model(data)
            if isinstance(losses, torch.Tensor):
                losses = {"total_loss": losses}
            values = torch.stack(list(losses.values()))
            self.grad_scaler.scale(values.sum() / self.accumulate).backward()
        return list(losses), values.detach().float()

    def _to_host(self, losses: Tensor, grad_norm: Tensor) -> Tuple[List[float], float, float]:
        """The losses, averaged over the processes, the gradient's norm, and the loss's scale as
        numbers of Python. This also tells all processes of a signal that one of them was sent.

        The step waits for the device here only, before the optimizer steps: later, a nan would be
        in the weights already, and perhaps in a checkpoint.
        """
        values = torch.cat([losses, grad_norm.float().view(1)])
        stop = values.new_zeros(len(STOP_SIGNALS))
        if self.signals.received is not None:
            stop[STOP_SIGNALS.index(self.signals.received)].fill_(1)
        if comm.get_world_size() > 1:
            # The norm is the same everywhere; should it not be, a nan is one for all.
            both = torch.cat([values, stop])
            dist.all_reduce(both)
            values, stop = both[: len(values)] / comm.get_world_size(), both[len(values) :]
        scale = self.grad_scaler.scale(values.new_ones(1))
        numbers = torch.cat([values, stop, scale]).tolist()
        norm, *counts, scale = numbers[len(losses) :]
        self.stop_signal = next((n for n, count in zip(STOP_SIGNALS, counts) if count), None)
        return numbers[: len(losses)], norm, scale

    def _require_finite(
        self, losses: Dict[str, float], grad_norm: float, scale: float, file_names: List[str]
    ) -> None:
        """Raise, in all processes, if the losses or the gradient are not finite. `file_names` are
        this process's images, all else is the same in all of them."""
        if not all(map(math.isfinite, losses.values())):
            terms = ", ".join(f"{name}: {value:.4g}" for name, value in losses.items())
            problem = f"The loss became nan or infinite ({terms})"
        elif math.isfinite(grad_norm) or (self.grad_scaler.is_enabled() and scale > _LEAST_SCALE):
            return  # the scaler skips the step and lowers its scale, as is normal
        else:
            problem = f"The norm of the gradient became {grad_norm}"
        images = some([name for names in comm.all_gather(file_names) for name in names], 16)
        raise NonFiniteError(
            f"{problem} at iteration {self.iter}: lower the learning rate, or use "
            f"train.amp.dtype=bf16 or no mixed precision, and check the boxes of: {images}"
        )

    def _stream(self) -> Dict[str, Any]:
        """What decides which data and random numbers belong to an iteration."""
        try:
            dataset_size = len(self.data_loader.dataset)
        except (AttributeError, TypeError):  # of another kind of loader
            dataset_size = None
        return {
            "seed": self.seed,
            "world_size": comm.get_world_size(),
            "total_batch_size": self.total_batch_size,
            "accumulate": self.accumulate,
            "dataset_size": dataset_size,
        }

    def state_dict(self) -> Dict[str, Any]:
        samples_per_step = self.accumulate * (self.total_batch_size or 0)
        num_samples = (self.last_iter + 1 - self.start_iter) * samples_per_step
        return {
            **super().state_dict(),
            **self._stream(),
            "grad_scaler": self.grad_scaler.state_dict(),
            "iteration": self.last_iter,
            "sample": self._start_sample + num_samples,
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Load a checkpoint's state, but keep the learning rates that the config has now."""
        configured = [dict(group) for group in self.optimizer.param_groups]
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise CheckpointError(
                f"The optimizer's groups of parameters (optimizer.params) are not those of the run "
                f"({error}): resume with the settings of its config.yaml, or start another run "
                "from its weights, with train.init_checkpoint."
            ) from error
        if state_dict["grad_scaler"]:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self._start_sample = state_dict["sample"]
        values = {name: (state_dict[name], value) for name, value in self._stream().items()}
        # PyTorch's optimizers take their settings from a checkpoint, too.
        for group, settings in zip(self.optimizer.param_groups, configured):
            for name in sorted(_OPTIMIZER_SETTINGS & settings.keys()):
                key = "initial_lr" if name == "lr" else name  # which the schedule multiplies
                former, value = group.get(key, settings[name]), settings[name]
                # Pairs such as Adam's betas become lists in a config.
                if list(np.ravel(former)) != list(np.ravel(value)):
                    group[key] = value
                    values.setdefault(f"the optimizer's {name}", (former, value))
        for name, (former, value) in values.items():
            if former != value:
                logger.warning(
                    "The run goes on, but not exactly: %s was %s when the checkpoint was written "
                    "and is %s now.",
                    name,
                    former,
                    value,
                )

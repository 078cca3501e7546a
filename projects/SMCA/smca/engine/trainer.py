import contextlib
import logging
import math
import random
import time

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from smca.data.loader import set_start_batch
from smca.errors import NonFiniteError

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)

# Keeps the random numbers of the model apart from those of the data loader, which are
# derived from the same seed.
_MODEL = 2


def _seed_random_states(*entropy):
    """Seed `random`, `numpy.random` and `torch` (all devices) from non-negative integers."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Trainer(SimpleTrainer):
    """
    Detectron2's :class:`SimpleTrainer` with mixed precision, gradient accumulation, gradient
    clipping and exact resuming.

    On the CPU, a training that was stopped after any iteration and resumed from its checkpoint
    ends with the same bits as one that never stopped, if the data loader can start in the
    middle (:func:`smca.data.build_train_loader`).
    """

    def __init__(
        self,
        model,
        data_loader,
        optimizer,
        *,
        amp_dtype=None,
        accumulate=1,
        clip_grad_norm=None,
        seed=0,
        total_batch_size=None,
    ):
        """
        Args:
            model (nn.Module): from a batch to a dict of scalar losses whose sum is minimised;
                may be wrapped in DistributedDataParallel.
            data_loader (iterable): batches, endless.
            optimizer (torch.optim.Optimizer):
            amp_dtype (torch.dtype or None): bfloat16 or float16 runs the model under autocast;
                float16 scales the loss as well. None: no mixed precision.
            accumulate (int): batches per iteration. Their losses are averaged, each as the
                model normalised it for its own batch.
            clip_grad_norm (float or None): largest norm of all gradients together. None or 0
                does not clip.
            seed (int): not negative, the same in all processes.
            total_batch_size (int or None): images of one batch over all processes; only kept,
                to tell whether a resumed run goes on exactly.
        """
        super().__init__(model, data_loader, optimizer)
        self.amp_dtype = amp_dtype
        self.accumulate = accumulate
        self.clip_grad_norm = clip_grad_norm or math.inf
        self.seed = seed
        self.total_batch_size = total_batch_size
        self.device = next(model.parameters()).device
        # float16 alone has too narrow a range for unscaled gradients.
        self.grad_scaler = torch.amp.GradScaler(
            self.device.type, enabled=amp_dtype == torch.float16
        )

    def before_train(self):
        self._seek_data(self.start_iter * self.accumulate)
        super().before_train()

    def _seek_data(self, num_batches):
        try:
            set_start_batch(self.data_loader, num_batches)
        except TypeError as error:
            if num_batches > 0:
                logger.warning("The data start over, the run does not go on exactly: %s", error)

    def after_train(self):
        # Ends the loader's processes. Left to the garbage collector, each would take seconds.
        self._data_loader_iter_obj = None
        super().after_train()

    def run_step(self):
        """
        Raises:
            NonFiniteError: a loss or the gradient is nan or infinite. It is raised in all
                processes, and the weights are still those of the last iteration.
        """
        assert self.model.training, "the model was changed to eval mode"
        losses, data_time = {}, 0.0
        self.optimizer.zero_grad()
        for micro_batch in range(self.accumulate):
            start = time.perf_counter()
            data = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            for name, loss in self._forward_backward(data, micro_batch).items():
                losses[name] = losses.get(name, 0) + loss.detach().float() / self.accumulate
        self.after_backward()

        self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm)
        losses, grad_norm = self._to_host(losses, grad_norm)
        self._check_finite(losses, grad_norm)
        self._put_metrics(losses, grad_norm, data_time)

        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _forward_backward(self, data, micro_batch):
        # Random states are a function of the position in the training, so that a checkpoint
        # need not hold them: the iteration number restores them, on any number of GPUs.
        batch = self.iter * self.accumulate + micro_batch
        _seed_random_states(self.seed, _MODEL, comm.get_rank(), batch)

        is_last = micro_batch == self.accumulate - 1
        skip_sync = isinstance(self.model, DistributedDataParallel) and not is_last
        with self.model.no_sync() if skip_sync else contextlib.nullcontext():
            with torch.amp.autocast(
                self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
            ):
                losses = self.model(data)
            if isinstance(losses, torch.Tensor):
                losses = {"total_loss": losses}
            self.grad_scaler.scale(sum(losses.values()) / self.accumulate).backward()
        return losses

    @staticmethod
    def _to_host(losses, grad_norm):
        """
        Losses, averaged over the processes, and the gradient norm as Python numbers. This is
        the step's only wait for the device. It has to be before the optimizer steps: later,
        a nan would be in the weights already, and perhaps in a checkpoint.
        """
        values = torch.stack(list(losses.values()))
        if comm.get_world_size() > 1:
            dist.all_reduce(values)
            values /= comm.get_world_size()
        *values, grad_norm = torch.cat([values, grad_norm.float().view(1)]).tolist()
        return dict(zip(losses, values)), grad_norm

    def _check_finite(self, losses, grad_norm):
        if not all(map(math.isfinite, losses.values())):
            what = "The loss became nan or infinite ({})".format(
                ", ".join(f"{name}: {value:.4g}" for name, value in losses.items())
            )
        elif not math.isfinite(grad_norm) and not self.grad_scaler.is_enabled():
            # With float16 this is normal: the scaler skips the step and lowers its scale.
            what = f"The norm of the gradient became {grad_norm}"
        else:
            return
        raise NonFiniteError(
            f"{what} at iteration {self.iter}: lower the learning rate, or use "
            "train.amp.dtype=bf16 or no mixed precision, and check the boxes of the data."
        )

    def _put_metrics(self, losses, grad_norm, data_time):
        self.storage.put_scalar("data_time", data_time)
        self.storage.put_scalar("total_loss", sum(losses.values()))
        if len(losses) > 1:
            self.storage.put_scalars(**losses)
        if math.isfinite(grad_norm):
            self.storage.put_scalar("grad_norm", grad_norm)
        if self.grad_scaler.is_enabled():
            self.storage.put_scalar("grad_scale", self.grad_scaler.get_scale())

    def _stream(self):
        """What decides which data and random numbers belong to an iteration."""
        return {
            "seed": self.seed,
            "world_size": comm.get_world_size(),
            "total_batch_size": self.total_batch_size,
            "accumulate": self.accumulate,
        }

    def state_dict(self):
        state = super().state_dict()
        state["grad_scaler"] = self.grad_scaler.state_dict()
        state.update(self._stream())
        return state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        for name, value in self._stream().items():
            if state_dict.get(name) != value:
                logger.warning(
                    "The run goes on, but not exactly: %s was %s when the checkpoint was "
                    "written and is %s now.",
                    name,
                    state_dict.get(name),
                    value,
                )

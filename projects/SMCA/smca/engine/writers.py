"""Writers of a training's metrics: the progress line, Weights & Biases and MLflow."""

import importlib
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, MutableMapping, Optional, Tuple

import numpy as np
import torch
from detectron2.engine import default_writers
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    get_event_storage,
)
from omegaconf import DictConfig, OmegaConf

from smca.checkpoint.files import write_atomically
from smca.config import build
from smca.errors import ConfigError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["MLflowWriter", "ProgressPrinter", "WandbWriter", "build_writers"]

logger = logging.getLogger(__name__)


class _TrackingWriter(EventWriter):
    """Sends what is new in the storage, as TensorBoard's writer does. A service that fails ends
    the sending, with a warning, and not the training.

    Args:
        output_dir: holds the service's files, and the run's id for ``--resume``.
        window_size: iterations whose median is sent.

    Raises:
        ConfigError: the service's package is not installed, or a run cannot be started.
    """

    name = ""

    def __init__(self, output_dir: str, window_size: int = 20):
        self._window_size = window_size
        self._last_write = -1
        try:
            self._service: Any = importlib.import_module(self.name)
        except ImportError as error:
            raise ConfigError(
                f"train.writers has {self.name}, which is not installed: pip install "
                f"'smca[tracking]', or leave it out."
            ) from error
        path = Path(output_dir, "tracking.json")
        runs = json.loads(path.read_text()) if path.is_file() else {}
        try:
            runs[self.name] = self._start(output_dir, runs.get(self.name))
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(
                f"train.writers has {self.name}, which cannot start a run: {reason[0]}"
            ) from error
        write_atomically(str(path), json.dumps(runs).encode())
        self._is_on = True

    def _start(self, output_dir: str, run_id: Optional[str]) -> str:
        """Start or go on with a run, and return its id."""
        raise NotImplementedError

    def _send_values(self, values: Mapping[str, float], iteration: int) -> None:
        raise NotImplementedError

    def _send_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        """Send a picture, (height, width, 3) uint8, RGB."""
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError

    def write(self) -> None:
        if not self._is_on:
            return
        storage = get_event_storage()
        values: Dict[int, Dict[str, float]] = {}
        latest = storage.latest_with_smoothing_hint(self._window_size)
        for name, (value, iteration) in latest.items():
            if iteration > self._last_write:
                values.setdefault(iteration, {})[name] = value
        # Detectron2's storage shows pictures to writers in this list; TensorBoard's clears it.
        pictures = storage._vis_data
        try:
            # Weights & Biases drops values of earlier steps than the last one that it has.
            for iteration in sorted({*values, *(at for _, _, at in pictures)}):
                if iteration in values:
                    self._send_values(values[iteration], iteration)
                for name, picture, at in pictures:
                    if at == iteration:
                        self._send_image(name, np.asarray(picture).transpose(1, 2, 0), iteration)
        except Exception as error:
            self._is_on = False
            logger.warning("Nothing more is sent to %s: %s", self.name, error)
        self._last_write = max(values, default=self._last_write)

    def close(self) -> None:
        if self._is_on:
            self._is_on = False
            try:
                self._end()
            except Exception as error:
                logger.warning("The run at %s was not ended: %s", self.name, error)


class WandbWriter(_TrackingWriter):
    """Weights & Biases. Its environment variables count (``WANDB_PROJECT``, ``WANDB_MODE=offline``,
    ...); without ``WANDB_PROJECT`` the project is "smca"."""

    name = "wandb"

    def _start(self, output_dir: str, run_id: Optional[str]) -> str:
        self._run = self._service.init(
            project=os.environ.get("WANDB_PROJECT", "smca"),
            name=os.path.basename(os.path.abspath(output_dir)),
            dir=output_dir,
            config=_saved_config(output_dir),
            id=run_id,
            resume="allow" if run_id else None,
        )
        return self._run.id

    def _send_values(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log({**values, "iteration": iteration}, step=iteration)

    def _send_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        self._run.log({name: self._service.Image(image)}, step=iteration)

    def _end(self) -> None:
        self._run.finish()


class MLflowWriter(_TrackingWriter):
    """MLflow. Its environment variables count (``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``,
    ...); without them runs are in the output folder, in ``mlflow.db`` and ``mlartifacts``, in the
    experiment "smca"."""

    name = "mlflow"

    def _start(self, output_dir: str, run_id: Optional[str]) -> str:
        folder = Path(output_dir).resolve()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "smca")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            self._service.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
            if self._service.get_experiment_by_name(experiment) is None:
                artifacts = (folder / "mlartifacts").as_uri()
                self._service.create_experiment(experiment, artifact_location=artifacts)
        self._service.set_experiment(experiment)
        run = self._service.start_run(
            run_id=run_id, run_name=os.path.basename(os.path.abspath(output_dir))
        )
        if run_id is None:
            self._service.log_dict(_saved_config(output_dir), "config.yaml")
            self._service.log_params(dict(_flat(_saved_config(output_dir))))
        return run.info.run_id

    def _send_values(self, values: Mapping[str, float], iteration: int) -> None:
        # Class names may have characters that MLflow does not take.
        named = {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in values.items()}
        self._service.log_metrics(named, step=iteration)

    def _send_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        self._service.log_image(image, f"{name}_{iteration:07d}.png")

    def _end(self) -> None:
        self._service.end_run()


class _LineEnd(logging.LoggerAdapter):
    """Appends what Detectron2's progress line lacks."""

    def process(
        self, msg: str, kwargs: MutableMapping[str, Any]
    ) -> Tuple[str, MutableMapping[str, Any]]:
        grad_norm, _ = get_event_storage().latest().get("grad_norm", (None, None))
        if grad_norm is not None:
            msg += f"  grad_norm: {grad_norm:.4g}"
        if resource is not None and not torch.cuda.is_available():
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            msg += f"  max_mem: {peak / 2**20:.0f}M"
        return msg, kwargs


class ProgressPrinter(CommonMetricPrinter):
    """Detectron2's progress line (losses, ETA, times, learning rate, memory of the GPU), with the
    norm of the gradient and, without a GPU, the peak memory of the process.
    """

    def __init__(self, max_iter: Optional[int] = None, window_size: int = 20) -> None:
        super().__init__(max_iter, window_size)
        self.logger: Any = _LineEnd(self.logger, {})

    def _get_eta(self, storage: EventStorage) -> Optional[str]:
        # Called twice in an iteration that fails early, the original divides by zero.
        if self._last_write is not None and self._last_write[0] == storage.iter:
            return None
        return super()._get_eta(storage)


_WRITERS = {writer.name: writer for writer in (WandbWriter, MLflowWriter)}


def build_writers(train: DictConfig) -> List[EventWriter]:
    """
    Args:
        train: the config's section. Its `writers` are names of services, "wandb" or "mlflow", or
            calls of writers.

    Raises:
        ConfigError: a service cannot be used.
    """
    own = [
        _WRITERS[writer](train.output_dir)
        if isinstance(writer, str)
        else build(writer, f"train.writers.{index}")
        for index, writer in enumerate(train.writers)
    ]
    defaults = default_writers(train.output_dir, train.max_iter)[1:]
    # TensorBoard's is the last, since it clears the pictures.
    return [ProgressPrinter(train.max_iter), *own, *defaults]


def _saved_config(output_dir: str) -> Any:
    """What is in config.yaml, in plain types; empty if there is none."""
    try:
        config = OmegaConf.load(os.path.join(output_dir, "config.yaml"))
    except Exception:  # Detectron2 pickles what is no YAML
        return {}
    return OmegaConf.to_container(config, resolve=False)


def _flat(values: Any, prefix: str = "") -> Iterator[Tuple[str, str]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}{key}.")
    else:
        yield prefix[:-1], str(values)[:500]

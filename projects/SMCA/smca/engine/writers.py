"""Writers of a training's metrics: the progress line, Weights & Biases, and MLflow."""

import importlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import numpy as np
from detectron2.engine import default_writers
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    get_event_storage,
)
from omegaconf import DictConfig

from smca.checkpoint.files import write_atomically
from smca.config import build
from smca.errors import ConfigError

logger = logging.getLogger(__name__)


class _TrackingWriter(EventWriter):
    """Sends what is new in the storage, as TensorBoard's writer does. A service that cannot be
    reached at the start is a ConfigError; one that fails later ends the sending, with a warning,
    and not the training. `output_dir` keeps the run's id for ``--resume``.
    """

    name = ""

    def __init__(self, output_dir: str):
        self._last_write = -1
        path = Path(output_dir, "tracking.json")
        runs = json.loads(path.read_text()) if path.is_file() else {}
        try:
            self._service: Any = importlib.import_module(self.name)
            runs[self.name] = self._start(Path(output_dir).resolve(), runs.get(self.name))
        except ImportError as error:
            raise ConfigError(
                f"train.writers has {self.name}, which is not installed: pip install "
                f"'smca[tracking]', or leave it out."
            ) from error
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"train.writers has {self.name}, which cannot start a run: {reason}"
            ) from error
        write_atomically(str(path), json.dumps(runs).encode())
        self._is_on = True

    def _start(self, folder: Path, run_id: Optional[str]) -> str:
        """Start or go on with a run, and return its id."""
        raise NotImplementedError

    def _send(
        self, iteration: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """Send metrics, and pictures of (height, width, 3) uint8, RGB."""
        raise NotImplementedError

    def _end(self) -> None:
        """End the run."""

    def write(self) -> None:
        if not self._is_on:
            return
        storage = get_event_storage()
        values: Dict[int, Dict[str, float]] = {}
        for name, (value, iteration) in storage.latest_with_smoothing_hint().items():
            if iteration > self._last_write:
                values.setdefault(iteration, {})[name] = value
        self._last_write = max(values, default=self._last_write)
        # Detectron2's storage shows pictures to writers in this list; TensorBoard's clears it.
        pictures: Dict[int, Dict[str, np.ndarray]] = {}
        for name, picture, iteration in storage._vis_data:
            pictures.setdefault(iteration, {})[name] = np.asarray(picture).transpose(1, 2, 0)
        try:
            # Weights & Biases drops values of earlier steps than the last one that it has.
            for iteration in sorted({*values, *pictures}):
                self._send(iteration, values.get(iteration, {}), pictures.get(iteration, {}))
        except Exception as error:
            self._is_on = False
            logger.warning("Nothing more is sent to %s: %s", self.name, error)

    def close(self) -> None:
        if self._is_on:
            try:
                self._end()
            except Exception as error:
                logger.warning("The run at %s was not ended: %s", self.name, error)


class WandbWriter(_TrackingWriter):
    """Weights & Biases. Its environment variables count (``WANDB_PROJECT``, ``WANDB_MODE=offline``,
    ...); without ``WANDB_PROJECT`` the project is "smca"."""

    name = "wandb"

    def _start(self, folder: Path, run_id: Optional[str]) -> str:
        self._run = self._service.init(
            project=os.environ.get("WANDB_PROJECT", "smca"),
            name=folder.name,
            dir=str(folder),
            id=run_id,
            resume="allow" if run_id else None,
        )
        self._run.save(str(folder / "config.yaml"), base_path=str(folder), policy="now")
        return self._run.id

    def _send(
        self, iteration: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]
    ) -> None:
        images = {name: self._service.Image(picture) for name, picture in pictures.items()}
        self._run.log({**values, **images, "iteration": iteration}, step=iteration)

    def _end(self) -> None:
        self._run.finish()


class MLflowWriter(_TrackingWriter):
    """MLflow. Its environment variables count (``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``,
    ...); without them runs are in the output folder, in ``mlflow.db`` and ``mlartifacts``, in the
    experiment "smca"."""

    name = "mlflow"

    def _start(self, folder: Path, run_id: Optional[str]) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "smca")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            self._service.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
            if self._service.get_experiment_by_name(experiment) is None:
                artifacts = (folder / "mlartifacts").as_uri()
                self._service.create_experiment(experiment, artifact_location=artifacts)
        self._service.set_experiment(experiment)
        run = self._service.start_run(run_id=run_id, run_name=folder.name)
        self._service.log_artifact(str(folder / "config.yaml"))
        return run.info.run_id

    def _send(
        self, iteration: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]
    ) -> None:
        # Class names may have characters that MLflow does not take.
        named = {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in values.items()}
        self._service.log_metrics(named, step=iteration)
        for name, picture in pictures.items():
            self._service.log_image(picture, f"{name}_{iteration:07d}.png")

    def _end(self) -> None:
        self._service.end_run()


class ProgressPrinter(CommonMetricPrinter):
    """Detectron2's progress line."""

    def _get_eta(self, storage: EventStorage) -> Optional[str]:
        # Called twice in an iteration that fails early, the original divides by zero.
        if self._last_write is not None and self._last_write[0] == storage.iter:
            return None
        return super()._get_eta(storage)


_WRITERS = {writer.name: writer for writer in (WandbWriter, MLflowWriter)}


def build_writers(train: DictConfig) -> List[EventWriter]:
    """Detectron2's writers, and those of the config's section `train`."""
    own = [
        _WRITERS[writer](train.output_dir)
        if isinstance(writer, str)
        else build(writer, f"train.writers.{index}")
        for index, writer in enumerate(train.writers)
    ]
    defaults = default_writers(train.output_dir, train.max_iter)[1:]
    # TensorBoard's is the last, since it clears the pictures.
    return [ProgressPrinter(train.max_iter), *own, *defaults]

"""
What ``compare_convergence.py`` trains: a study, read from YAML, and of each of its trainings
what it has reached after how many steps and seconds.
"""

import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import (
    Any,
    Collection,
    Dict,
    Iterable,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

import smca.configs
from smca.analysis import read_metrics
from smca.config import build, load_config, quoted
from smca.config.schema import LIST, SECTION, Kind, check_value, number, text
from smca.errors import UserError, did_you_mean

import numpy as np
import pandas as pd
import torch
import yaml
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig, OmegaConf

from convergence_report import COLUMNS, Report, read_file

__all__ = ["Evaluation", "Study", "Training", "make_report", "read_study", "select"]

# Keys of a study and of a run in it, and what their values may be.
_AP = number("a number, an AP in %")
_TEXTS = Kind(
    "a list of texts", lambda value: LIST.accepts(value) and all(map(text().accepts, value))
)
_NAMES = Kind("a list of runs", lambda value: LIST.accepts(value) and len(value) > 0)
_STUDY = dict(
    seeds=LIST, overrides=_TEXTS, target_ap=_AP, runs=SECTION, comparisons=SECTION, claims=SECTION
)
_RUN = dict(config=text(), overrides=_TEXTS, seeds=LIST, stop_at_ap=_AP)
_CLAIM = dict(runs=LIST, published=LIST)
# What the study itself sets, for every training.
_PLACE = ("train.seed", "train.output_dir")
# Settings that the runs of a study must have in common: the data and when to evaluate.
_SHARED_SETTINGS = ("data.", "dataloader.", "train.eval_period")
# What config.yaml says of the place, of the machine and of what is kept: nothing that is learned.
_LOCAL_SETTINGS = ("train.output_dir", "train.device", "train.checkpointer.")

Evaluation = Tuple[int, Optional[float], float, float]


@dataclass(frozen=True, eq=False)
class Training:
    """
    One run of a study with one seed.

    Attributes:
        name: of the run.
        own_overrides: those of this run alone. overrides: all, as the training script gets them.
        stop_at_ap: in %: the first evaluation with this AP ends the training.
        cfg: the config with all overrides.
    """

    name: str
    seed: int
    folder: str
    config_file: str
    own_overrides: Tuple[str, ...]
    overrides: Tuple[str, ...]
    stop_at_ap: Optional[float]
    cfg: DictConfig

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def max_iter(self) -> int:
        return self.cfg.train.max_iter

    @cached_property
    def settings(self) -> Dict[str, Any]:
        """The config as config.yaml in a training's folder says it, flat."""
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "config.yaml")
            LazyConfig.save(self.cfg, file)
            return _read_settings(file)

    def evaluations(self) -> List[Evaluation]:
        """
        Rows of (iterations completed, seconds, AP, AP50), AP in %. Seconds are in training steps,
        without evaluations, checkpoints and starting up: of the times of a step that were logged,
        the one that nine tenths exceed, so that what else the machine did meanwhile does not
        count. They are None if no times were (the first two steps have none).
        """
        try:
            metrics = read_metrics(os.path.join(self.folder, "metrics.json"))
        except UserError:  # it has not begun
            return []
        if "bbox/AP" not in metrics:
            return []
        numbers, ap = metrics["bbox/AP"]
        # Detectron2 numbers an evaluation like the last iteration, the final one like the next.
        iterations = [min(number + 1, self.max_iter) for number in numbers]
        times = metrics.get("time", ([], []))[1]
        pace = float(np.quantile(times, 0.1)) if times else None
        seconds = [None if pace is None else round(i * pace, 2) for i in iterations]
        # AP is nan where a model detects nothing at all.
        scores = np.nan_to_num([ap, metrics["bbox/AP50"][1]]).round(3).tolist()
        return list(zip(iterations, seconds, *scores))

    def is_finished(self) -> bool:
        evaluations = self.evaluations()
        return self.max_iter in [row[0] for row in evaluations] or self.stops_early(evaluations)

    def stops_early(self, evaluations: Sequence[Evaluation]) -> bool:
        """Whether one of its evaluations ends it."""
        target = self.stop_at_ap
        return target is not None and any(ap >= target for _, _, ap, _ in evaluations)

    def check_folder(self) -> None:
        """
        Raises:
            UserError: the folder holds a training with other settings.
        """
        file = os.path.join(self.folder, "config.yaml")
        here = self.settings
        there = _read_settings(file) if os.path.isfile(file) else here
        for key in _differing(there, here):
            if not key.startswith(_LOCAL_SETTINGS):
                raise UserError(
                    f"{self.folder} holds a training with other settings ({key} is "
                    f"{there.get(key)} there, {here.get(key)} now): remove it, or choose another "
                    "--output."
                )


@dataclass(frozen=True)
class Study:
    """
    Attributes:
        overrides: those of all runs. target_ap: in %, or None.
        trainings: all runs with the first seed, then all with the next, and so on.
        comparisons: names of runs by the name of the comparison, the baseline first.
        claims: by what they say, "runs" (the better one first) and perhaps their "published" AP.
    """

    name: str
    output_dir: str
    overrides: Tuple[str, ...]
    target_ap: Optional[float]
    trainings: List[Training]
    comparisons: Dict[str, List[str]]
    claims: Dict[str, Dict[str, Any]]


def read_study(path: str, output_dir: Optional[str] = None, opts: Sequence[str] = ()) -> Study:
    """
    Args:
        path: a YAML file as described in compare_convergence.py.
        output_dir: for the trainings.
        opts: further overrides of all runs, which win over the study's.

    Raises:
        UserError: names the file and the key that cannot be used.
    """
    content = _read_yaml(path)
    output_dir = output_dir or os.path.join("output", "convergence", Path(path).stem)
    shared = content.get("overrides", [])
    trainings = []
    for name, spec in content["runs"].items():
        own = spec.get("overrides", [])
        config_file = os.path.normpath(os.path.join(os.path.dirname(path), spec["config"]))
        for override in [*shared, *own, *opts]:
            key = override.lstrip("+").split("=")[0]
            if key in _PLACE:
                raise UserError(f"{key} cannot be overridden: it follows from seeds and --output.")
        for seed in spec.get("seeds") or content.get("seeds") or [0]:
            folder = os.path.join(output_dir, name, f"seed{seed}")
            place = [f"train.seed={seed}", f"train.output_dir={quoted(folder)}"]
            overrides = (*shared, *own, *opts, *place)
            about = (name, seed, folder, config_file, tuple(own), overrides)
            cfg = load_config(config_file, overrides)
            trainings.append(Training(*about, spec.get("stop_at_ap"), cfg))
    _check_same_budget(trainings)
    trainings.sort(key=lambda training: training.seed)  # stable: runs keep their order
    comparisons = content.get("comparisons", {"all": list(content["runs"])})
    overrides = (*shared, *opts)
    target_ap = content.get("target_ap")
    claims = content.get("claims", {})
    return Study(Path(path).stem, output_dir, overrides, target_ap, trainings, comparisons, claims)


def make_report(study: Study) -> Report:
    """
    Returns:
        The study and, of each training, what it is and its evaluations; plain data.

    Raises:
        UserError: the data are missing.
    """
    loader = study.trainings[0].cfg.dataloader.train  # the same for all runs
    iterations_per_epoch = len(instantiate(loader.dataset)) / loader.total_batch_size
    cfgs = {training.name: training.cfg for training in study.trainings}
    num_parameters = {name: _num_parameters(cfg) for name, cfg in cfgs.items()}
    runs = []
    for training in study.trainings:
        rows = [
            [iteration, round(iteration / iterations_per_epoch, 3), *reached]
            for iteration, *reached in training.evaluations()
        ]
        run = {
            "name": training.name,
            "config": _display_path(training.config_file),
            "overrides": list(training.own_overrides),
            "seed": training.seed,
            "num_parameters": num_parameters[training.name],
            "max_iter": training.max_iter,
            "evaluations": rows,
            "final": dict(zip(COLUMNS, rows[-1])) if training.is_finished() else None,
        }
        runs.append(run)
    return {
        "study": study.name,
        # Without those that say where the data lie here.
        "overrides": [text for text in study.overrides if not text.startswith("data.")],
        "target_ap": study.target_ap,
        "comparisons": study.comparisons,
        "claims": study.claims,
        "iterations_per_epoch": iterations_per_epoch,
        "evaluation_columns": list(COLUMNS),
        "runs": runs,
    }


def _num_parameters(cfg: DictConfig) -> int:
    with torch.device("meta"):
        model = build(cfg.model, "model")
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _display_path(path: str) -> str:
    """Without the place of the repository; of other files the name alone."""
    file, root = Path(path).resolve(), Path(smca.configs.__file__).resolve().parents[1]
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name


def select(trainings: List[Training], names: Optional[Sequence[str]]) -> List[Training]:
    """The trainings of the runs with these names, or all if `names` is None."""
    if names is None:
        return trainings
    _check_names(names, {training.name for training in trainings}, "the study")
    return [training for training in trainings if training.name in names]


def _read_yaml(path: str) -> Dict[str, Any]:
    """The content of a study, with values of the right kinds; names of runs are texts."""
    content = read_file(path, yaml.safe_load, "YAML")
    if not isinstance(content, dict) or not content.get("runs"):
        raise UserError(f"{path} is no study: add runs: {{NAME: {{config: FILE}}}}.")
    _check_section(content, _STUDY, path)
    content["runs"] = {str(name): spec for name, spec in content["runs"].items()}
    for name, spec in content["runs"].items():
        if not isinstance(spec, dict) or "config" not in spec:
            raise UserError(f"{path}, run {name} has no config: add config: FILE.")
        _check_section(spec, _RUN, f"{path}, run {name}")
    for name, run_names in content.get("comparisons", {}).items():
        check_value(f"{path}, comparisons: {name}", run_names, _NAMES)
        _check_names(run_names, content["runs"], path)
    for name, claim in content.get("claims", {}).items():
        where = f"{path}, claims: {name}"
        check_value(where, claim, SECTION)
        _check_section(claim, _CLAIM, where)
        if len(claim.get("runs", ())) != 2 or len(claim.get("published", (0, 0))) != 2:
            raise UserError(f"{where} needs runs: [A, B], and may have published: [AP, AP].")
        _check_names(claim["runs"], content["runs"], path)
    return content


def _check_section(section: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    for key, value in section.items():
        if key not in kinds:
            raise UserError(f"{where} has the unknown key {key}{did_you_mean(str(key), kinds)}")
        check_value(f"{where}: {key}", value, kinds[key])


def _check_names(names: Iterable[str], known: Collection[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"There is no run {name} in {where}{did_you_mean(str(name), known)}")


def _check_same_budget(trainings: Sequence[Training]) -> None:
    first = trainings[0]
    for training in {training.name: training for training in trainings}.values():
        train = training.cfg.train
        for key in ("max_iter", "eval_period"):
            if not isinstance(train[key], int):
                raise UserError(
                    f"The run {training.name} has a train.{key} that is computed from the data: "
                    f"give train.{key}=N."
                )
        if train.get("early_stopping"):
            raise UserError(
                f"The run {training.name} has train.early_stopping={train.early_stopping}, with "
                "which it never counts as finished: make it 0, and use stop_at_ap."
            )
        if train.eval_period < train.log_period:
            # Detectron2 logs the last of several evaluations only.
            raise UserError(
                f"The run {training.name} has train.eval_period={train.eval_period}: make it at "
                f"least train.log_period={train.log_period}."
            )
        one, other = first.settings, training.settings
        for key in _differing(one, other):
            if key.startswith(_SHARED_SETTINGS):
                raise UserError(
                    f"The runs {first.name} and {training.name} cannot be compared: {key} is "
                    f"{one.get(key)} and {other.get(key)}; make it the same."
                )


def _read_settings(file: str) -> Dict[str, Any]:
    """{"train.seed": 0, ...}; references to other keys stay as they are."""
    content = OmegaConf.to_container(LazyConfig.load(file), resolve=False)
    return pd.json_normalize(content).to_dict("records")[0]


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> List[str]:
    return [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]

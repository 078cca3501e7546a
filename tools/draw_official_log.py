#!/usr/bin/env python3
"""Draw the authors' training logs of the convolutional models: docs/official_training.png.

Someone who trains on COCO sees there, from the first epoch on, whether the run is on track.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from typing import Dict, List

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "tests" / "golden" / "official_training_logs.csv"
PICTURE = ROOT / "docs" / "official_training.png"


def main() -> None:
    """Draw loss and AP of every run over the epochs."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    runs: Dict[str, List[Dict[str, str]]] = defaultdict(list)
    with LOG.open() as file:
        for row in csv.DictReader(file):
            runs[row["run"]].append(row)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, rows in runs.items():
        epochs = [int(row["epoch"]) + 1 for row in rows]
        left.plot(epochs, [float(row["train_loss"]) for row in rows], label=name)
        right.plot(epochs, [float(row["AP"]) for row in rows], label=name)
    left.set(xlabel="epoch", ylabel="training loss (sum of all layers, weighted)", yscale="log")
    right.set(xlabel="epoch", ylabel="AP on COCO val2017")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(PICTURE, dpi=110)
    print(PICTURE)


if __name__ == "__main__":
    main()

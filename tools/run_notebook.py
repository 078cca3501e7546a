#!/usr/bin/env python
"""Run a notebook from its first cell to its last, and write it back with what it printed and drew:

    run_notebook.py                  # docs/tour.ipynb, about five minutes of one CPU core
    run_notebook.py docs/tour.ipynb --output /tmp/tour.ipynb

An error in a cell is an error of this tool, and the file stays as it was. Written is what a reader
wants: of a progress bar its end, no colors, no warnings, and no paths of this machine (the home
folder becomes ~, the checkout's a dot).
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from smca.errors import UserError, exit_code

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "docs" / "tour.ipynb"
_SECONDS = 1800  # of a cell
_COLOR = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
_OVERWRITTEN = re.compile(r"[^\n]*\r(?=[^\n])")


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebook", nargs="?", default=str(TOUR), metavar="FILE")
    parser.add_argument("--output", metavar="FILE", help="default: the notebook's own")
    return parser


def run(args: argparse.Namespace) -> None:
    """The command's work."""
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    except ImportError as error:
        raise UserError(
            "Notebooks need nbclient, nbformat and ipykernel: install the extra 'notebook'."
        ) from error
    if not os.path.isfile(args.notebook):
        raise UserError(f"The notebook {args.notebook} does not exist.")
    try:
        notebook = nbformat.read(args.notebook, as_version=4)
    except Exception as error:  # it raises many kinds
        raise UserError(f"{args.notebook} is no notebook.") from error
    os.environ["PYTHONWARNINGS"] = "ignore"
    # What the cells call python is the one that this runs in.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    progress = tqdm(total=len(cells), unit="cell", disable=None)
    client = NotebookClient(
        notebook,
        timeout=_SECONDS,
        resources={"metadata": {"path": str(ROOT / "docs")}},
        record_timing=False,
        on_cell_executed=lambda **_: progress.update(),
    )
    try:
        client.execute()
    except CellExecutionError as error:
        lines = _COLOR.sub("", str(error)).strip().splitlines()
        raise UserError(f"{args.notebook} has an error in a cell: {lines[-1]}") from error
    except (CellTimeoutError, DeadKernelError) as error:
        raise UserError(f"{args.notebook} did not end: {str(error).splitlines()[0]}") from error
    finally:
        progress.close()
    for cell in cells:
        cell.outputs = [_portable(output) for output in joined(cell.outputs)]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.validate(notebook)
    output = args.output or args.notebook
    nbformat.write(notebook, output)
    print(f"Written: {output} ({os.path.getsize(output) / 1e3:.0f} kB)")


def joined(outputs: Any) -> list[Any]:
    """What was printed in pieces as one output each."""
    result: list[Any] = []
    for output in outputs:
        last = result[-1] if result else None
        if last and output.output_type == "stream" == last.output_type and output.name == last.name:
            last.text += output.text
        else:
            result.append(output)
    return result


def _portable(value: Any) -> Any:
    """An output as a reader wants it, see above."""
    if isinstance(value, dict):
        return type(value)({key: _portable(item) for key, item in value.items()})
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if isinstance(value, str):
        value = _OVERWRITTEN.sub("", _COLOR.sub("", value.replace("\r\n", "\n")))
        return value.replace(f"{ROOT}/", "").replace(str(ROOT), ".").replace(str(Path.home()), "~")
    return value


def main() -> int:
    """Run the command line; gives the exit code."""
    return exit_code(run, get_parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())

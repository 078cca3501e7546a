"""Train or evaluate a model from a LazyConfig: ``smca-train``, in a checkout ``train_net.py``."""

from typing import Optional, Sequence

from detectron2.engine import default_argument_parser

from smca.engine import run
from smca.errors import at_least, command_line

_HELP = {
    "opts": "settings of the config to change, key=value",
    "resume": "go on from the newest checkpoint in train.output_dir",
    "num_gpus": "processes on this machine, one a GPU; default: 1",
}
_EXAMPLES = """
CONFIG is a file, or the name of a config that comes with the package. Options stand before the
first key=value. For several machines use torchrun or Slurm, and leave out --num-machines,
--machine-rank, and --dist-url:

    %(prog)s --config-file configs/smca_shapes.py train.output_dir=output/shapes
    %(prog)s --config-file smca_r50_50ep --num-gpus 8 train.amp.enabled=True
    %(prog)s --config-file CONFIG --num-gpus 8 --max-restarts 3
    torchrun --nproc-per-node=8 train_net.py --config-file CONFIG
    %(prog)s --config-file CONFIG --resume train.output_dir=output/shapes
    %(prog)s --config-file CONFIG --eval-only train.init_checkpoint=FILE
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; gives the exit code."""
    detectron2s = default_argument_parser()
    for action in detectron2s._actions:
        action.help = _HELP.get(action.dest, action.help)
    parser = command_line(None, epilog=_EXAMPLES, parents=[detectron2s], add_help=False)
    parser.add_argument(
        "--max-restarts",
        type=at_least(0),
        default=0,
        help="of --num-gpus processes: how often all are started again when one of them fails, to "
        "go on from the newest checkpoint",
    )
    return run(parser.parse_args(argv))

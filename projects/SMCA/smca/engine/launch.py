import logging
import os
import re
import sys

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from smca.config import load_config, resolve_device
from smca.engine.train import main
from smca.errors import ConfigError, UserError

__all__ = ["run"]

_USER_ERROR = f"{UserError.__module__}.{UserError.__qualname__}: "


def run(args):
    """
    Run :func:`smca.engine.main` in as many processes as asked for: ``--num-gpus`` of them on
    each machine, which are CPU processes (gloo) if the device is the CPU.

    Args:
        args (argparse.Namespace): of Detectron2's `default_argument_parser`.

    Returns:
        int: the exit code. What the user can put right is printed as one sentence, with 1.
    """
    try:
        _check_processes(args)
        launch(
            _worker,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except UserError as error:
        return _report(_sentence(error))
    except ProcessRaisedException as error:
        last_line = str(error).strip().splitlines()[-1]
        if not last_line.startswith(_USER_ERROR):
            raise
        return _report(last_line[len(_USER_ERROR) :])
    except ProcessExitedException as error:
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _report(message):
    print(f"Error: {message}", file=sys.stderr)
    return 1


def _check_processes(args):
    """Find what is wrong with the config here, once, rather than in each of several processes."""
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ConfigError("--num-gpus and --num-machines have to be at least 1.")
    if args.num_gpus * args.num_machines == 1:
        return
    device = resolve_device(load_config(args.config_file, args.opts).train.device)
    if device.type == "cuda" and args.num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus {args.num_gpus} is more than this machine's {torch.cuda.device_count()} "
            "GPUs; CPU processes are started with train.device=cpu."
        )
    if device.type == "cpu":
        # Detectron2 chooses NCCL wherever it sees a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _worker(args):
    num_local = comm.get_local_size() if comm.get_world_size() > 1 else 1
    torch.set_num_threads(max(1, torch.get_num_threads() // num_local))
    # Detectron2 logs errors in training with their traceback.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_user_error)
    try:
        main(args)
    except UserError as error:
        # `run` looks for this class alone in what other processes raise.
        raise UserError(_sentence(error)) from None


def _sentence(error):
    """
    The message; of an error in a data loader's process, whose text is that process's
    traceback, its last line.
    """
    last_line = str(error).strip().splitlines()[-1]
    return re.sub(r"^smca[\w.]*Error: ", "", last_line)


def _is_no_user_error(record):
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))

"""Processes of a training that are killed, fail or get a signal: none is left behind, none waits,
and nothing is lost. (What they compute is in test_processes.py.)"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT, assert_same_bits, child_environment, write_tiny_config
from reliability_cases import Job, files, iteration_of, load
from smca.engine import Trainer, launch
from smca.errors import DatasetError

RARELY = {"period": 1000, "max_to_keep": 5}
MANY = {"max_iter": 1000, "eval_period": 0}


def at(action, begin):
    """Prepares processes: `begin(rank)` is called at first and `action(rank, iteration, restart)`
    before each batch. The launcher forks, so that its processes have that, too."""

    def prepare():
        launch._START_METHOD = "fork"
        original, work = Trainer._forward_backward, launch._work

        def act(self, *args):
            action(int(os.environ["RANK"]), self.iter, int(os.environ["RESTART"]))
            return original(self, *args)

        def work_on_one_thread(args):
            torch.set_num_threads(1)  # the threads of the process before are gone
            os.environ["RESTART"] = str(args.restart)
            begin(int(os.environ["RANK"]))
            work(args)

        Trainer._forward_backward, launch._work = act, work_on_one_thread

    return prepare


def launch_two(folder, action, *words, begin=lambda rank: None, **changes):
    config = write_tiny_config(folder, **changes)
    return Job(folder, config, "--num-gpus", 2, *words, prepare=at(action, begin))


def kill(pid=None):
    os.kill(pid or os.getpid(), signal.SIGKILL)


def test_processes_that_are_killed_are_started_again_and_end_with_the_same_bits(tmp_path):
    def kill_one_after_the_other(rank, iteration, restart):
        if (rank, iteration, restart) in [(1, 1, 0), (0, 3, 1)]:  # before there is a checkpoint
            kill()

    settings = {"max_iter": 6, "eval_period": 0}
    (tmp_path / "unbroken").mkdir()
    unbroken = launch_two(tmp_path / "unbroken", lambda *_: None, **settings)
    job = launch_two(tmp_path, kill_one_after_the_other, "--max-restarts", 2, **settings)
    assert (unbroken.wait(), job.wait()) == (0, 0), job.output
    final, expected = (
        load(folder / "run" / "model_final.pth") for folder in (tmp_path, tmp_path / "unbroken")
    )
    for key in ("model", "model_ema", "trainer"):
        assert_same_bits(final[key], expected[key])


def test_a_process_that_is_killed_ends_the_others_with_the_last_whole_step(tmp_path):
    def kill_the_second(rank, iteration, restart):
        if (rank, iteration) == (1, 3):
            kill()

    job = launch_two(tmp_path, kill_the_second, checkpointer=RARELY, **MANY)
    assert job.wait() != 0
    # The launcher may see the other one first, which fails because of this.
    assert "Error: Process " in job.output
    assert iteration_of(tmp_path / "run" / "model_0000002.pth") == 2


def is_running(pid):
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_without_their_launcher_the_processes_save_and_end(tmp_path):
    def kill_the_launcher(rank, iteration, restart):
        if iteration == 3:
            (tmp_path / f"pid_{rank}").write_text(str(os.getpid()))
            if rank == 0:
                kill(os.getppid())

    job = launch_two(tmp_path, kill_the_launcher, checkpointer=RARELY, **MANY)
    assert job.wait() == -signal.SIGKILL
    job.wait_until(lambda: not any(is_running(path.read_text()) for path in tmp_path.glob("pid_*")))
    (name,) = [x for x in files(tmp_path / "run") if x.startswith("model_")]
    assert iteration_of(tmp_path / "run" / name) == int(name[6:13]) >= 3


@pytest.mark.parametrize(
    "send, number",
    [
        (lambda number: os.killpg(0, number), signal.SIGINT),  # Ctrl-C in a terminal
        (lambda number: os.kill(os.getppid(), number), signal.SIGTERM),  # to the launcher
        (lambda number: os.kill(os.getpid(), number), signal.SIGUSR1),  # to one process
    ],
    ids=["SIGINT to all", "SIGTERM to the launcher", "SIGUSR1 to one"],
)
def test_a_signal_stops_all_processes_after_the_same_step(tmp_path, send, number):
    def signal_once(rank, iteration, restart):
        if (rank, iteration) == (1, 3):
            send(number)

    job = launch_two(tmp_path, signal_once, checkpointer=RARELY, **MANY)
    assert job.wait() == 128 + number, job.output
    assert "Error" not in job.output.replace("Error (KeyboardInterrupt)", "")
    (name,) = [x for x in files(tmp_path / "run") if x.startswith("model_")]
    assert iteration_of(tmp_path / "run" / name) == int(name[6:13]) >= 3


@pytest.mark.parametrize("ranks", [[1], [0, 1]])
def test_what_the_user_can_mend_is_one_sentence(tmp_path, ranks):
    def fail(rank, iteration, restart):
        assert restart == 0  # it would fail again
        if iteration == 3 and rank in ranks:
            raise DatasetError("cat.png is truncated.")

    job = launch_two(tmp_path, fail, "--max-restarts", 1, checkpointer=RARELY, **MANY)
    assert job.wait() == 1
    assert [line for line in job.output.splitlines() if line.startswith("Error: ")] == [
        "Error: cat.png is truncated."
    ]
    assert "DatasetError" not in job.output.replace("ended early (DatasetError)", "")
    assert "Terminating process" not in job.output
    assert iteration_of(tmp_path / "run" / "model_0000002.pth") == 2


def test_another_error_has_its_traceback(tmp_path):
    def fail(rank, iteration, restart):
        if (rank, iteration) == (1, 0):
            raise KeyError("nowhere")

    job = launch_two(tmp_path, fail, **MANY)
    assert job.wait() == 1
    assert "Error: Process 1 failed: KeyError: 'nowhere'" in job.output
    assert 'raise KeyError("nowhere")' in job.output


def test_a_process_without_the_file_system_of_the_first_resumes_with_it(tmp_path):
    def begin(rank):
        os.makedirs(f"{tmp_path}/machine_{rank}", exist_ok=True)
        os.chdir(f"{tmp_path}/machine_{rank}")

    settings = dict(begin=begin, output_dir="run", seed=-1, eval_period=0)
    for max_iter, words in ((2, []), (4, ["--resume"])):
        job = launch_two(tmp_path, lambda *_: None, *words, max_iter=max_iter, **settings)
        assert job.wait() == 0, job.output
    assert "Resuming at iteration 2" in job.output
    assert iteration_of(tmp_path / "machine_0" / "run" / "model_final.pth") == 3


def descendants(pid):
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        yield from (child, *descendants(child))


def test_the_slurm_script_requeues_after_the_signal_before_the_time_limit(tmp_path):
    """With the commands of Slurm replaced by ones that do their part here."""
    tools = tmp_path / "bin"
    tools.mkdir()
    tasks = 'for n in 0 1; do SLURM_PROCID=$n SLURM_LOCALID=$n "$@" & done; wait %1; c=$?; wait %2'
    for name, text in (
        ("srun", f'while [ "${{1#-}}" != "$1" ]; do shift; done; {tasks}; exit $c'),
        ("scontrol", f'[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/requeued'),
        ("python", f'exec {sys.executable} "$@"'),
    ):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    config = write_tiny_config(tmp_path, checkpointer=RARELY, **{**MANY, "max_iter": 100000})
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    slurm.update(SLURM_JOB_NODELIST="localhost", PATH=f"{tools}:{os.environ['PATH']}")
    job = subprocess.Popen(
        ["bash", ROOT / "tools" / "slurm_train.sh", "--config-file", config],
        env={**child_environment(), "OMP_NUM_THREADS": "1", **slurm},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines = []
    for line in job.stdout:
        lines.append(line)
        if " iter: 3 " in line:
            break
    # Slurm sends it to all processes of the step, not to the script.
    for pid in descendants(job.pid):
        if "train_net.py" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1]:
            os.kill(pid, signal.SIGUSR1)
    rest = job.communicate()[0]
    assert job.returncode == 138, "".join(lines) + rest
    assert "Traceback" not in rest
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    name = (tmp_path / "run" / "last_checkpoint").read_text()
    assert iteration_of(tmp_path / "run" / name) >= 3

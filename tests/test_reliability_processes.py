"""Several processes: one that fails or dies ends the job, all stop at the same step, and what
starts them (this project's launcher, torchrun, Slurm) is told how it went."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from helpers import TinyDetector, error_of, start_by_fork, write_dataset, write_tiny_config
from reliability_cases import Job, files, iteration_of, jobs, load
from smca.cli import train as train_command
from smca.engine import launch, peers
from test_train_net import SMALL

ROOT = Path(__file__).parents[1]
RARELY = {"period": 1000, "max_to_keep": 5}
WORKER = ["dataloader.train.num_workers=1"]


def at(iteration, rank, action):
    """`prepare` for `jobs`: does something in a process before an iteration."""

    def prepare(this_rank):
        from smca.engine import Trainer

        original = Trainer._forward_backward

        def act(self, *args):
            if (self.iter, this_rank) == (iteration, rank):
                action()
            return original(self, *args)

        Trainer._forward_backward = act

    return prepare


def fail():
    from smca.data.errors import DatasetError

    raise DatasetError("cat.png is truncated.")


def start(folder, prepare=None, flags=(), **changes):
    settings = dict(max_iter=1000, eval_period=0, checkpointer=RARELY, **changes)
    config = write_tiny_config(folder, **settings)
    return jobs(folder, "--config-file", config, *flags, prepare=prepare)


def test_a_process_that_is_killed_ends_the_job_with_the_last_whole_step(tmp_path):
    first, second = start(tmp_path, at(3, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert second.wait(90) == -signal.SIGKILL
    assert first.wait(90) == 1
    assert iteration_of(tmp_path / "run" / "model_0000002.pth") == 2
    assert "Process 1 is gone" in first.output


def test_a_process_that_waits_in_vain_is_saved_all_the_same(tmp_path):
    """The other one fails and lingers, so that its connections do not break: as with NCCL,
    nothing ends the collective."""

    def prepare(rank):
        from smca.engine import launch, peers

        peers._GRACE = 2
        original = launch._leave

        def linger(*args):
            code = original(*args)
            time.sleep(120 * rank)
            return code

        launch._leave = linger
        at(3, 1, fail)(rank)

    first, second = start(tmp_path, prepare)
    assert first.wait(90) == 1
    assert second.is_alive()
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    assert "Error: cat.png is truncated." in second.output
    assert "ended: cat.png is truncated." in first.output
    assert iteration_of(tmp_path / "run" / "model_0000002.pth") == 2
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000002.pth"


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    first, second = start(tmp_path)
    first.wait_for("iter: 3 ")
    os.kill(second.pid, signal.SIGUSR1)
    assert (first.wait(), second.wait()) == (138, 138)
    (name,) = [x for x in files(tmp_path / "run") if x.startswith("model_")]
    assert iteration_of(tmp_path / "run" / name) == int(name[6:13]) >= 3


def test_steps_that_are_not_finite_are_skipped_in_all_processes_alike(tmp_path):
    def prepare(rank):
        original = TinyDetector.losses

        def losses(self, batch, logits, boxes):
            losses = original(self, batch, logits, boxes)
            self.calls = getattr(self, "calls", -1) + 1
            if self.calls in (1, 2, 4, 5, 6) and rank == 1:
                losses["loss_bbox"] = losses["loss_bbox"] * float("nan")
            return losses

        TinyDetector.losses = losses

    first, second = start(tmp_path, prepare, skip_nonfinite=2)
    assert (first.wait(90), second.wait(90)) == (1, 1)
    run = tmp_path / "run"
    reports = sorted(x for x in files(run) if x.startswith("nonfinite"))
    assert reports == [f"nonfinite_{n:07d}.json" for n in (1, 2, 4, 5, 6)]
    assert "at iteration 6, after 2 skipped ones" in first.output
    assert "Traceback" not in second.output
    report = json.loads((run / reports[-1]).read_text())
    assert report["iteration"] == 6 and report["last_checkpoint"] is None
    one, two = report["processes"]
    assert len(one["images"]) == len(two["images"]) == 2
    assert all(Path(name).exists() for name in one["images"] + two["images"])
    assert one["losses_by_batch"][0]["loss_bbox"] < 10
    assert str(two["losses_by_batch"][0]["loss_bbox"]) == "nan"


def test_a_process_without_the_file_system_of_the_first_resumes_with_it(tmp_path):
    def prepare(rank):
        os.makedirs(f"{tmp_path}/machine_{rank}", exist_ok=True)
        os.chdir(f"{tmp_path}/machine_{rank}")

    settings = dict(output_dir="run", seed=-1, eval_period=0)
    config = write_tiny_config(tmp_path, max_iter=2, **settings)
    for job in jobs(tmp_path, "--config-file", config, prepare=prepare):
        assert job.wait(90) == 0, job.output
    config = write_tiny_config(tmp_path, max_iter=4, **settings)
    resumed = jobs(tmp_path, "--config-file", config, "--resume", prepare=prepare)
    for job in resumed:
        assert job.wait(90) == 0, job.output
    assert "Resuming at iteration 2" in resumed[0].output
    assert iteration_of(tmp_path / "machine_0" / "run" / "model_final.pth") == 3


def test_two_processes_of_which_one_has_no_objects_train_the_detector_like_one(tmp_path):
    write_dataset(tmp_path, num_images=2)
    data = json.loads((tmp_path / "truth.json").read_text())
    boxes = ([4, 4, 16, 16], [10, 2, 6, 20], [1, 20, 12, 8])  # all in the first image
    first = data["annotations"][0]
    data["annotations"] = [{**first, "id": n + 1, "bbox": box} for n, box in enumerate(boxes)]
    (tmp_path / "truth.json").write_text(json.dumps(data))
    args = ["--config-file", ROOT / "configs" / "custom_coco.py", *SMALL]
    for split in ("train", "val"):
        args += [f"data.{split}_json={tmp_path}/truth.json", f"data.{split}_images={tmp_path}"]
    args += ["dataloader.train.total_batch_size=2", "dataloader.train.dataset.filter_empty=False"]
    args += ["train.max_iter=4", "train.log_period=1", "train.model_ema.enabled=True"]
    # With its usual eps, Adam makes steps of full length from the rounding of zero gradients.
    args += ["model.dropout=0", "train.eval_period=2", "optimizer.eps=1.0", "optimizer.lr=0.1"]
    one = Job(tmp_path, *args, f"train.output_dir={tmp_path}/one", SMCA_CACHE=tmp_path / "cache")
    os.environ["SMCA_CACHE"] = str(tmp_path / "cache")
    two = jobs(tmp_path, *args, f"train.output_dir={tmp_path}/two")
    del os.environ["SMCA_CACHE"]
    for job in (one, *two):
        assert job.wait(120) == 0, job.output

    def rows(name):
        lines = (tmp_path / name / "metrics.json").read_text().splitlines()
        return {row["iteration"]: row for row in map(json.loads, lines)}

    for iteration, expected in rows("one").items():
        actual = rows("two")[iteration]
        for name in [name for name in expected if "loss" in name or name == "grad_norm"]:
            assert actual[name] == pytest.approx(expected[name], rel=1e-4), (iteration, name)
        for name in [name for name in expected if "bbox/" in name]:
            assert actual[name] == pytest.approx(expected[name], abs=1e-6, nan_ok=True)
    finals = [load(tmp_path / name / "model_final.pth") for name in ("one", "two")]
    for key in ("model", "model_ema"):
        for name, weight in finals[0][key].items():
            torch.testing.assert_close(finals[1][key][name], weight, atol=1e-6, rtol=1e-5)


# The real command lines


def environment(**others):
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tests"),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        **others,
    }


def popen(command, **kwargs):
    return subprocess.Popen(
        [str(x) for x in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **kwargs,
    )


def let_launcher_fork():
    torch.multiprocessing.start_processes = start_by_fork


def test_a_long_message_is_printed_whole_and_once_by_two_processes(tmp_path):
    write_dataset(tmp_path)
    data = json.loads((tmp_path / "truth.json").read_text())
    for annotation in data["annotations"][:7]:
        annotation["bbox"] = [40, 40, 8, 8]
    (tmp_path / "truth.json").write_text(json.dumps(data))
    args = ["--num-gpus", 2, "--dist-url", "auto"]
    args += ["--config-file", ROOT / "configs" / "custom_coco.py", "train.device=cpu"]
    for split in ("train", "val"):
        args += [f"data.{split}_json={tmp_path}/truth.json", f"data.{split}_images={tmp_path}"]
    args += [f"train.output_dir={tmp_path}/run", "train.init_checkpoint="]

    job = Job(tmp_path, *args, SMCA_CACHE=tmp_path / "cache", prepare=let_launcher_fork)
    assert job.wait(120) == 1
    output = job.output
    message = output[output.index("Error: ") :].splitlines()
    assert message[0] == f"Error: 7 problems in {tmp_path}/truth.json:"
    assert [line.split(" (of")[0] for line in message[1:6]] == [
        f"  annotation {n}" for n in range(1, 6)
    ]
    assert message[6:] == ["  ..."]
    assert output.count("problems in") == 1


def test_the_launcher_says_which_process_was_killed(tmp_path):
    config = write_tiny_config(tmp_path, max_iter=1000, eval_period=0, checkpointer=RARELY)
    with open(config, "a") as file:
        file.write(
            textwrap.dedent(
                """
                import os, torch.distributed as dist
                from smca.engine import Trainer

                original = Trainer._forward_backward

                def die(self, *args):
                    if self.iter == 3 and dist.get_rank() == 1:
                        os.kill(os.getpid(), 9)
                    return original(self, *args)

                if dist.is_initialized():
                    Trainer._forward_backward = die
                """
            )
        )
    args = ["--config-file", config, "--num-gpus", 2, "--dist-url", "auto"]
    job = Job(tmp_path, *args, prepare=let_launcher_fork)
    assert job.wait(120) == 137
    assert "Error: Process 1 was ended by SIGKILL." in job.output
    assert iteration_of(tmp_path / "run" / "model_0000002.pth") == 2


def test_a_signal_ends_a_process_that_waits_for_another_machine(tmp_path):
    config = write_tiny_config(tmp_path)
    args = ["--config-file", config, "--num-machines", 2]
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{link.getsockname()[1]}"
    job = Job(tmp_path, *args, "--dist-url", url, prepare=let_launcher_fork)
    while not list(descendants(job.pid)):
        time.sleep(0.1)
    time.sleep(3)  # its store waits
    job.signal_group(signal.SIGINT)
    assert job.wait(30) == 130


def test_several_machines_need_an_address(tmp_path, capsys):
    config = write_tiny_config(tmp_path)
    words = ["--config-file", config, "--num-machines", "2", "train.device=cpu"]
    text = error_of(capsys, train_command.main, *words)
    assert "--dist-url has to be tcp://HOST:PORT" in text


def test_torchrun_and_two_launchers_train_like_one_process(tmp_path):
    plain = ["model.dropout=0", "model.batch_norm=False", "train.max_iter=3"]
    plain += ["train.accumulate=2"]
    config = write_tiny_config(tmp_path)
    train = [ROOT / "train_net.py", "--config-file", config]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    under_torchrun = popen(
        [sys.executable, *torchrun, *train, f"train.output_dir={tmp_path}/torchrun", *plain],
        env=environment(),
    )
    machines = ["--num-machines", 2, "--dist-url", f"file://{tmp_path}/rendezvous"]
    launched = [
        Job(tmp_path, "--config-file", config, *flags, f"train.output_dir={tmp_path}/{out}", *plain)
        for out, flags in (
            ("one", []),
            ("machines", [*machines, "--machine-rank", 0]),
            ("machines", [*machines, "--machine-rank", 1]),
        )
    ]
    for job in launched:
        assert job.wait(120) == 0, job.output
    output = under_torchrun.communicate(timeout=120)[0]
    assert under_torchrun.returncode == 0, output
    one = load(tmp_path / "one" / "model_final.pth")
    for name in ("torchrun", "machines"):
        two = load(tmp_path / name / "model_final.pth")
        assert two["trainer"]["world_size"] == 2
        for key in ("model", "model_ema"):
            for weight, value in one[key].items():
                torch.testing.assert_close(two[key][weight], value, atol=1e-6, rtol=0)


def descendants(pid):
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        yield from (child, *descendants(child))


def test_the_slurm_script_requeues_after_the_signal_before_the_time_limit(tmp_path):
    """With the commands of Slurm replaced by ones that do their part here."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (
        ("srun", 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"'),
        ("scontrol", f'[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/requeued'),
        ("python", f'exec {sys.executable} "$@"'),
    ):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    config = write_tiny_config(tmp_path, max_iter=100000, eval_period=0, checkpointer=RARELY)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    slurm.update(SLURM_JOB_NODELIST="localhost", SLURM_GPUS_ON_NODE="1")
    job = popen(
        ["bash", ROOT / "tools" / "slurm_train.sh", "--config-file", config, *WORKER],
        env=environment(PATH=f"{tools}:{os.environ['PATH']}", **slurm),
    )
    lines = []
    for line in job.stdout:
        lines.append(line)
        if " iter: 3 " in line:
            break
    # Slurm sends it to all processes of the step, not to the script.
    for pid in descendants(job.pid):
        os.kill(pid, signal.SIGUSR1)
    rest = job.communicate(timeout=120)[0]
    assert job.returncode == 138, "".join(lines) + rest
    assert "Traceback" not in rest
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    name = (tmp_path / "run" / "last_checkpoint").read_text()
    assert iteration_of(tmp_path / "run" / name) >= 3


def test_the_end_of_one_process_is_told_to_every_other(monkeypatch):
    watches, addresses = [], []
    monkeypatch.setattr(peers.comm, "get_world_size", lambda: 3)
    monkeypatch.setattr(peers.comm, "all_gather", lambda own: addresses.append(own) or addresses)
    for rank in range(3):
        monkeypatch.setattr(peers.comm, "get_rank", lambda rank=rank: rank)
        watches.append(peers.PeerWatch("127.0.0.1"))
    try:
        deadline = time.monotonic() + 20
        while len(watches[0]._connections) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        watches[1].fail(peers.Failure(3, "the disk is full"))
        for other in (watches[0], watches[2]):
            failure = other.wait_for_failure(20)
            assert (failure.exit_code, failure.text) == (3, "the disk is full")
        assert watches[1].failure is None
    finally:
        for watch in watches:
            watch.close()


@pytest.mark.parametrize("does_fail, code", [(False, 0), (True, 7)])
def test_the_launcher_ends_slow_processes_only_if_another_failed(monkeypatch, does_fail, code):
    monkeypatch.setattr(launch, "_GRACE", 0.2)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=time.sleep, args=(60 if does_fail else 1.5,))]
    if does_fail:
        processes.append(context.Process(target=os._exit, args=(7,)))
    for process in processes:
        process.start()
    result = launch._wait(processes, [], context.SimpleQueue(), [])
    assert result == (-signal.SIGKILL if does_fail else 0)
    assert processes[-1].exitcode == code

"""Several processes, or one: joining those that torchrun started, averages over them, whether they agree, when to stop."""
import dataclasses
import hashlib
import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

import config as configuration


class Lost(Exception):
    """Another process has gone or does not answer."""


@contextmanager
def together():
    """Around whatever all processes do together: says in one line that one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = configuration.first_line(error)[-200:]
        raise Lost(f"another process has gone or does not answer ({reason})") from error


def join(device, backend=None, minutes=30.0):
    """Joins the processes that torchrun started, each with its own GPU; returns (rank, their number). device: as --device;
    minutes: how long one waits for the others."""
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and not dist.is_initialized():
        gpu = torch.cuda.is_available() and device != "cpu"
        if gpu:
            if (own := int(os.environ["LOCAL_RANK"])) >= (have := torch.cuda.device_count()):
                raise ValueError(f"--nproc_per_node: torch sees {have} GPUs here; start at most as many processes, or add "
                                 "--device cpu")
            torch.cuda.set_device(own)
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # or nobody notices that a process is lost
        try:
            dist.init_process_group(backend or ("nccl" if gpu else "gloo"), timeout=timedelta(minutes=minutes))
        except RuntimeError as error:
            raise ValueError(f"the processes cannot join: {configuration.first_line(error)}") from error
    return process, processes


def leave(processes):
    if processes > 1:
        barrier(processes)
        dist.destroy_process_group()


def give_up(message):
    """Ends the program with a line on stderr ("" for none) and exit code 1. One of several processes ends at once: while Python
    tidies up, gloo's threads may notice that another has gone before, and abort."""
    if not dist.is_initialized():
        sys.exit(message or 1)
    print(message, end="\n" * bool(message), file=sys.stderr)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(1)


def barrier(processes):
    if processes > 1:
        with together():
            dist.barrier()


def share(run):
    """Gives every process the first one's adapters."""
    if run.processes > 1:
        with together():
            for p in run.parameters + run.discriminator_parameters:
                dist.broadcast(p.data, 0)


def average(tensor, processes):
    """The mean of a tensor over all processes, in its place."""
    if processes > 1:
        with together():
            dist.all_reduce(tensor)
        tensor.div_(processes)
    return tensor


def gather(rows, processes):
    """The lists of all processes, one after another."""
    if processes == 1:
        return rows
    parts = [None] * processes
    with together():
        dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def any_of(flag, run):
    """Whether any process says so."""
    return bool(average(torch.tensor(float(flag), device=run.pipe.unet.device), run.processes) > 0)


def check_agreement(run):
    """Ends the run if the processes' adapters are no longer equal."""
    if run.processes == 1:
        return
    weights = torch.stack([p.detach().double().norm() for p in run.parameters + run.discriminator_parameters])
    extremes = torch.cat([weights, -weights])
    with together():
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
    largest, smallest = extremes.chunk(2)
    if not torch.equal(largest, -smallest):
        give_up(f"train.py: step {run.step}: the processes' weights have drifted apart; the last checkpoint is from before")


def check_alike(run):
    """Raises ValueError naming the flags, in every process, if the processes were started with different configurations, have
    different prompt files, or stand at different steps."""
    own = {f"--{k.replace('_', '-')}": str(v) for k, v in dataclasses.asdict(run.config).items()}
    own["the content of --prompts"] = hash_of(run.config.prompts)
    own["the checkpoint to go on from"] = str(run.step)
    rows = gather([own], run.processes)
    different = [name for name in own if len({row[name] for row in rows}) > 1]
    if different:
        raise ValueError("the processes do not agree: " + "; ".join(
            f"{name} is {' and '.join(sorted({row[name] for row in rows}))}" for name in different))


def hash_of(path):
    """sha256 of a file, in hexadecimal, without holding it in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StopWanted:
    """SIGTERM and SIGINT set `seen`; a second one does what it does without us."""

    def __init__(self):
        self.seen, self.before = False, {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self.note)

    def note(self, number, frame):
        self.seen = True
        self.forget()
        print("\nending this step, then saving; once more to stop at once", file=sys.stderr)

    def forget(self):
        for number, before in self.before.items():
            signal.signal(number, before)

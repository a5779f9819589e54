"""Several processes: joining those that torchrun started, averages over them, and whether they still agree."""
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def join(device, backend=None, timeout=timedelta(minutes=30)):
    """Joins the processes that torchrun started, each with its own GPU; returns (rank, their number). device: as --device."""
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and not dist.is_initialized():
        gpu = torch.cuda.is_available() and device != "cpu"
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend or ("nccl" if gpu else "gloo"), timeout=timeout)
    return process, processes


def average(tensor, processes):
    """The mean of a tensor over all processes."""
    if processes > 1:
        dist.all_reduce(tensor)
        tensor = tensor / processes
    return tensor


def check_agreement(run):
    """Ends the run if the processes' adapters are no longer equal."""
    weights = torch.stack([p.detach().double().norm() for p in run.parameters + run.discriminator_parameters])
    extremes = torch.cat([weights, -weights])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    largest, smallest = extremes.chunk(2)
    if not torch.equal(largest, -smallest):
        sys.exit(f"train.py: step {run.step}: the processes' weights have drifted apart; the last checkpoint is from before")

"""What every trainer has: whole files, ranks that agree, logs, checkpoints."""

import fcntl
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
from collections import defaultdict
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from config import Config, portable, resolved

# --------------------------------------------------------------------------------------------------
# Files and errors


def first_line(error):
    """What an exception says, or else its name, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def writing(path):
    """Around what writes to a path: OSError, which names it, for all that may be raised."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {first_line(error)}") from error


@contextmanager
def whole_file(path):
    """Opens a file that is written whole or not at all, also if the power fails."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.unfinished")
    with writing(path):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write(path, data):
    """Writes str or bytes, whole or not at all."""
    with whole_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def check_writable(flag, path):
    """Raises ValueError, before any work, if a folder cannot be made or written in: tries it."""
    there = Path(path).absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(buffering=0, dir=there) as probe:
            probe.write(b"0")
    except OSError as error:
        why = f"{there} cannot be written in ({error.strerror})"
        raise ValueError(f"{flag} {path}: {why}") from error


def seed_of(*names):
    """A seed from names, the same on every rank and in every Python."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7], "big")


def mean_of(logs):
    """The mean of each number over the rows that have it."""
    columns = defaultdict(list)
    for log in logs:
        for name, value in log.items():
            columns[name].append(value)
    return {name: sum(values) / len(values) for name, values in columns.items()}


def save_config(config, path):
    fields = {name: portable(value) for name, value in vars(config).items()}
    write(path, json.dumps(fields, indent=2) + "\n")


def load_config(path):
    """The Config in a run's config.json. Raises ValueError that names the fields that are wrong."""
    try:
        config = TypeAdapter(Config).validate_json(path.read_bytes(), strict=True, extra="forbid")
    except ValidationError as error:
        wrong = [": ".join([*map(str, e["loc"]), e["msg"]]) for e in error.errors()]
        raise ValueError(f"{path}: not a configuration: {'; '.join(wrong)}") from error
    return Config(**{name: resolved(value) for name, value in vars(config).items()})


@contextmanager
def one_line_errors(script, *, faults=(ValueError, OSError)):
    """Ends the program with one line in place of a traceback, for what is no fault of the code."""
    try:
        yield
        sys.stdout.flush()
    except torch.OutOfMemoryError:
        mend = "a smaller --batch, train.py with a larger --accumulate or --checkpointing"
        give_up(f"{script}: out of the GPU's memory: give {mend}")
    except KeyboardInterrupt:
        give_up(f"{script}: stopped; what was finished is kept, and train.py --resume goes on")
    except BrokenPipeError:  # who read the output has left
        os._exit(1)
    except faults as error:
        give_up(f"{script}: {first_line(error)}")


def give_up(message):
    """Ends the program with a line on stderr and exit code 1. One of several ranks ends at once:
    while Python tidies up, gloo may notice that another has gone, and abort."""
    if not dist.is_initialized():
        sys.exit(message)
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(1)


# --------------------------------------------------------------------------------------------------
# Ranks


def together(collective, *arguments, **options):
    """Calls what all ranks do together. Raises ConnectionError if one of them is gone."""
    try:
        collective(*arguments, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = first_line(error)[-200:]
        raise ConnectionError(f"another rank has gone or does not answer ({reason})") from error


def join(device, minutes=30.0):
    """Joins the ranks that torchrun started. Returns (rank, world_size).

    device: of choose_device; minutes: how long a rank waits for the others."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1 or dist.is_initialized():
        return rank, world_size
    options = {"backend": "gloo", "timeout": timedelta(minutes=minutes)}
    if device.type == "cuda":
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # to notice that a rank is lost
        options |= {"backend": "nccl", "device_id": device}
    together(dist.init_process_group, **options)
    return rank, world_size


def leave(world_size):
    barrier(world_size)
    if world_size > 1:
        dist.destroy_process_group()


def barrier(world_size):
    if world_size > 1:
        together(dist.barrier)


def broadcast(tensors, world_size):
    """Gives every rank the first one's values, in one message."""
    if world_size > 1:
        flat = torch.cat([t.data.flatten() for t in tensors])
        together(dist.broadcast, flat, 0)
        copy_from_flat(tensors, flat)


def average(tensors, world_size):
    """Replaces tensors by their means over all ranks, in one all_reduce."""
    if world_size > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        together(dist.all_reduce, flat)
        copy_from_flat(tensors, flat.div_(world_size))


def copy_from_flat(tensors, flat):
    parts = flat.split([t.numel() for t in tensors])
    for tensor, part in zip(tensors, parts):
        tensor.data.copy_(part.view_as(tensor))


def gather(rows, world_size):
    """The lists of all ranks, one after another."""
    if world_size == 1:
        return rows
    parts = [None] * world_size
    together(dist.all_gather_object, parts, rows)
    return [row for part in parts for row in part]


def check_weights(run):
    """Ends the run if the ranks' adapters are no longer finite, or no longer equal."""
    norms = weight_norms(run)
    drifted = any(row != norms for row in gather([norms], run.world_size))
    if drifted or not all(map(math.isfinite, norms)):
        what = "have drifted apart" if drifted else "are not finite"
        give_up(f"train.py: step {run.step}: the ranks' weights {what}; they are not saved")


def weight_norms(run):
    return [p.detach().double().norm().item() for p in run.trainables()]


def check_alike(run):
    """Raises ValueError, on every rank, if the ranks were started with different configurations,
    have different prompts, or stand at different steps."""
    own = flags_of(run.config)
    own["the content of --prompts"] = seed_of(*run.prompts)
    own["the checkpoint to go on from"] = run.step
    for other in gather([own], run.world_size):
        if different := differences(own, other):
            raise ValueError(f"the ranks do not agree on {different}")


def flags_of(config):
    fields = vars(config).items()
    return {f"--{name.replace('_', '-')}": str(portable(value)) for name, value in fields}


def differences(one, other):
    """What two dictionaries with the same keys do not agree on, as text."""
    pairs = [(name, value, other[name]) for name, value in one.items() if value != other[name]]
    return ", ".join(f"{name} ({value}, {another})" for name, value, another in pairs)


class StopSignal:
    """SIGTERM, SIGINT, SIGHUP and a reader of the output who leaves set `seen`; a second SIGTERM or
    SIGINT does what it does without us."""

    def __init__(self):
        self.seen, self.before = False, {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's SIGHUP
                self.before[number] = signal.signal(number, self.note)

    def note(self, number, frame):
        self.seen = True
        if number != signal.SIGHUP:  # which a closed terminal may send twice
            signal.signal(number, self.before[number])
        with suppress(OSError):
            os.write(2, b"\nending this step, then saving; once more to stop at once\n")

    def forget(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Heard:
    """A stream; if its reader has gone, this asks for a stop, and goes on without a word."""

    def __init__(self, stream, stop):
        self.stream, self.stop = stream, stop

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            self.stop.seen = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)


def choose_device(config):
    """The device that a Config names; under torchrun each rank has its own GPU."""
    if config.device == "cpu" or config.device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no GPU; use --device cpu")
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= gpus:
        raise ValueError(
            f"--nproc_per_node: torch sees {gpus} GPUs here; start at most as many ranks, or add "
            "--device cpu"
        )
    torch.cuda.set_device(local)
    tensor_cores = config.dtype != "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tensor_cores
    return torch.device("cuda", local)


@contextmanager
def without_tf32():
    """Within the context float32 products and convolutions on a GPU are float32's."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def peak_memory(device):
    """GiB: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# --------------------------------------------------------------------------------------------------
# The output folder

MAY_DIFFER = (
    "--out --resume --steps --sample-every --sample-prompts --checkpoint-every --keep --device "
    "--prompts --eval-prompts --eval-count --references --batch --accumulate --max-skips --timeout "
    "--checkpointing"
).split()
LOCK = ".lock"
STEP = "step-" + 6 * "[0-9]"


def open_output(c):
    """Takes the folder for this process; returns the checkpoint to go on from, or None to start.
    Refuses a folder that is in use, and a resume with another recipe. A rank that torchrun has
    started again resumes by itself."""
    resume = c.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    begun, first = (c.out / "config.json").is_file(), int(os.environ.get("RANK", 0)) == 0
    if first:
        used = c.out.exists() and (not c.out.is_dir() or set(os.listdir(c.out)) - {LOCK})
        if used and not (resume and begun):
            mend = "go on with --resume, or choose another" if begun else "choose another"
            raise ValueError(f"--out {c.out}: not empty; {mend}")
    if begun:
        before, now = flags_of(load_config(c.out / "config.json")), flags_of(c)
        before |= {flag: now[flag] for flag in MAY_DIFFER}
        if different := differences(before, now):
            other = f"{c.out} was made with other values (then, now)"
            raise ValueError(f"--resume: {other}: {different}")
    if first:
        lock(c.out)
    return newest_checkpoint(c.out) if begun else None


def lock(folder):
    """Keeps a folder for this process as long as it lives. Raises ValueError that says who has it.
    A file system without locks lets everybody in."""
    check_writable("--out", folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)  # not closed: the lock would end
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(handle, 300).decode()
        raise ValueError(f"--out {folder}: {holder} is training in it") from None
    except OSError:
        return
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())


def newest_checkpoint(out):
    """The newest checkpoint of a run, or None. Whatever is called step-NNNNNN is whole."""
    return max((out / "checkpoints").glob(STEP), default=None)


class Log:
    """log.jsonl and TensorBoard on rank 0, nothing on the others."""

    def __init__(self, run):
        self.file = self.board = None
        if run.rank > 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = run.config.out / "log.jsonl"
        rows = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = [row for row in rows if step_of(row) < run.step]  # a resumed run does the rest again
        write(path, "".join(f"{row}\n" for row in kept))
        self.file = open(path, "a")
        self.board = SummaryWriter(run.config.out, purge_step=run.step)

    def write(self, step, numbers, troubles=()):
        """numbers: {name: number}; what is not finite is written as text, for JSON has no NaN."""
        if self.file is None:
            return
        row = {"step": step, **({"troubles": troubles} if troubles else {})}
        for name, value in numbers.items():
            row[name] = float(f"{value:.6g}") if math.isfinite(value) else str(value)
        with writing(self.file.name):
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self.board.flush()

    def picture(self, step, name, image):
        self.board.add_image(name, np.asarray(image), step, dataformats="HWC")


def step_of(row):
    """The step of a line of log.jsonl; of half a line, or another, infinity."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return math.inf


# --------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(run):
    """Writes checkpoints/step-NNNNNN: the LoRA in diffusers' format, and state.pt to go on from:
    all randomness comes from (seed, step, place in the step), so there is no other state. It is
    written under another name and then renamed; `latest` is a link to it. Raises OSError if it
    cannot be written; the one before is then untouched."""
    folder = run.config.out / "checkpoints"
    final = folder / f"step-{run.step:06d}"
    state = {
        "step": run.step,
        "prompts_per_step": run.prompts_per_step(),
        "prompts": run.prompts,
        "weights": run.weights().state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    with writing(final):
        try:
            partial = folder / f".{final.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir(parents=True)
            run.save_lora(partial)
            with whole_file(partial / "state.pt") as file:
                torch.save(state, file)
            partial.rename(final)
            link = folder / ".latest"
            link.unlink(missing_ok=True)
            link.symlink_to(final.name)
            link.rename(folder / "latest")
            for old in sorted(folder.glob(STEP))[: -run.config.keep]:
                old.rename(folder / f".{old.name}.partial")  # before it is no longer whole
        finally:
            for leftover in folder.glob(f".{STEP}.partial"):
                shutil.rmtree(leftover, ignore_errors=True)


def load_checkpoint(run, folder):
    """Puts a run where it was when the checkpoint was written. Raises ValueError if that cannot be
    done exactly."""
    try:
        state = load_weights(run, folder)
        run.optimizer.load_state_dict(state["optimizer"])
        for p in run.trainables():
            if run.optimizer.state[p]["exp_avg"].shape != p.shape:
                raise ValueError("its optimiser is of another model")
        run.step, prompts = state["step"], state["prompts"]
        before, now = state["prompts_per_step"], run.prompts_per_step()
        if folder.name != f"step-{run.step:06d}":
            raise ValueError(f"it is of step {run.step}")
    except Exception as error:  # nearly anything may be raised of a damaged file
        raise ValueError(
            f"{folder}: not a whole checkpoint of this model ({first_line(error)}); delete it, and "
            "--resume takes the one before"
        ) from error
    c = run.config
    if before != now:
        raise ValueError(
            f"--resume: {c.out} was made with {before} prompts a step, --batch x --accumulate x "
            f"ranks; now these are {c.batch} x {c.accumulate} x {run.world_size}"
        )
    if prompts != run.prompts:
        raise ValueError(f"--resume: the content of {c.prompts} has changed since {c.out} was made")


def load_weights(run, folder):
    """Gives a run the weights of a checkpoint, the LoRA's and the discriminator's, and returns all
    of its state."""
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    run.weights().load_state_dict(state["weights"])
    if not all(map(math.isfinite, weight_norms(run))):
        raise ValueError("its weights are not finite")
    return state

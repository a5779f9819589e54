"""What every trainer has: whole files, ranks that agree, logs, checkpoints."""

import dataclasses
import hashlib
import json
import math
import os
import pickle
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from config import Config

# --------------------------------------------------------------------------------------------------
# Files and errors


def first_line(error):
    """What an exception says, or else its name, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write(path, data):
    """Writes a file (str or bytes) whole or not at all, also if the power fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def hash_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def seed_of(*names):
    """A seed from names, the same on every rank and in every Python."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7], "big")


def save_config(config, path):
    write(path, json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")


def load_config(path):
    """The Config in a run's config.json. Raises ValueError if the file holds no such thing."""
    try:
        values = json.loads(Path(path).read_text())
        for field in dataclasses.fields(Config):
            if field.name in values and isinstance(field.default, (Path, tuple)):
                values[field.name] = type(field.default)(values[field.name])
        return Config(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a configuration of this version ({error})") from error


MEMORY_HINT = "give a smaller --batch, or use another GPU, or --device cpu"
STOP_HINT = "stopped; what was finished is kept"


@contextmanager
def one_line_errors(script, memory=MEMORY_HINT, stopped=STOP_HINT, faults=(ValueError, OSError)):
    """Ends the program with one line in place of a traceback, for what is no fault of the code."""
    try:
        yield
    except torch.OutOfMemoryError:
        give_up(f"{script}: out of the GPU's memory: {memory}")
    except KeyboardInterrupt:
        give_up(f"{script}: {stopped}")
    except faults as error:
        give_up(f"{script}: {first_line(error)}")


def give_up(message):
    """Ends the program with a line on stderr ("" for none) and exit code 1. One of several ranks
    ends at once: while Python tidies up, gloo may notice that another has gone, and abort."""
    if not dist.is_initialized():
        sys.exit(message or 1)
    print(message, end="\n" * bool(message), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


# --------------------------------------------------------------------------------------------------
# Ranks


def together(collective, *arguments):
    """Calls what all ranks do together. Raises ConnectionError if one of them is gone."""
    try:
        collective(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = first_line(error)[-200:]
        lost = f"another rank has gone or does not answer ({reason})"
        raise ConnectionError(lost) from error


def join(device, minutes=30.0):
    """Joins the ranks that torchrun started, each with its own GPU. Returns (rank, world_size).

    device: as --device; minutes: how long a rank waits for the others."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1 or dist.is_initialized():
        return rank, world_size
    options = {"backend": "gloo", "timeout": timedelta(minutes=minutes)}
    if device != "cpu" and torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(
                f"--nproc_per_node: torch sees {gpus} GPUs here; start at most as many ranks, "
                "or add --device cpu"
            )
        torch.cuda.set_device(local)
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # to notice that a rank is lost
        options |= {"backend": "nccl", "device_id": torch.device("cuda", local)}
    try:
        dist.init_process_group(**options)
    except RuntimeError as error:
        raise ValueError(f"the ranks cannot join: {first_line(error)}") from error
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


def check_agreement(run):
    """Ends the run if the ranks' adapters are no longer equal."""
    norms = [p.detach().double().norm().item() for p in run.trainables()]
    if any(row != norms for row in gather([norms], run.world_size)):
        give_up(
            f"train.py: step {run.step}: the ranks' weights have drifted apart; "
            "the last checkpoint is from before"
        )


def check_alike(run):
    """Raises ValueError, on every rank, if the ranks were started with different configurations,
    have different prompt files, or stand at different steps."""
    fields = dataclasses.asdict(run.config).items()
    own = {f"--{name.replace('_', '-')}": str(value) for name, value in fields}
    own["the content of --prompts"] = hash_of(run.config.prompts)
    own["the checkpoint to go on from"] = str(run.step)
    rows = gather([own], run.world_size)
    values = {name: sorted({row[name] for row in rows}) for name in own}
    different = [f"{name} is {' and '.join(v)}" for name, v in values.items() if len(v) > 1]
    if different:
        raise ValueError(f"the ranks do not agree: {'; '.join(different)}")


class StopSignal:
    """SIGTERM and SIGINT set `seen`; a second one does what it does without us."""

    def __init__(self):
        self.seen = False
        stops = signal.SIGTERM, signal.SIGINT
        self.before = {number: signal.signal(number, self.note) for number in stops}

    def note(self, number, frame):
        self.seen = True
        self.forget()
        print("\nending this step, then saving; once more to stop at once", file=sys.stderr)

    def forget(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def choose_device(config):
    """The device that a Config names; under torchrun each rank has its own GPU."""
    if config.device == "cpu" or config.device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no GPU; use --device cpu")
    tensor_cores = config.dtype != "float32"  # also for the LoRA's products, which are float32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tensor_cores
    return torch.device("cuda", torch.cuda.current_device())


def peak_memory(device):
    """GiB: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# --------------------------------------------------------------------------------------------------
# The output folder

MAY_DIFFER = set(
    "out resume steps sample_every sample_prompts checkpoint_every keep device eval_prompts "
    "eval_count references batch accumulate max_skips timeout checkpointing".split()
)


def open_output(c):
    """Returns the checkpoint to go on from, or None to start. Refuses a folder that is in use, and
    a resume with another recipe. A rank that torchrun has started again resumes by itself."""
    resume = c.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    begun = (c.out / "config.json").is_file()
    if resume and begun:
        check_same_recipe(c)
        return newest_checkpoint(c.out)
    used = c.out.exists() and (not c.out.is_dir() or any(c.out.iterdir()))
    if used and int(os.environ.get("RANK", 0)) == 0:
        mend = "go on with --resume, or choose another" if begun else "choose another"
        raise ValueError(f"--out {c.out}: not empty; {mend}")
    return None


def check_same_recipe(c):
    before = load_config(c.out / "config.json")
    changed = [
        f"--{name.replace('_', '-')} ({value!r} then, {getattr(c, name)!r} now)"
        for name, value in vars(before).items()
        if name not in MAY_DIFFER and str(value) != str(getattr(c, name))
    ]
    if changed:
        raise ValueError(f"--resume: {c.out} was made with other values of {', '.join(changed)}")


def newest_checkpoint(out):
    """The newest checkpoint of a run, or None. Whatever is called step-NNNNNN is whole."""
    return max((out / "checkpoints").glob("step-??????"), default=None)


class Log:
    """log.jsonl and TensorBoard on rank 0, nothing on the others."""

    def __init__(self, run):
        self.file = self.board = None
        if run.rank > 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = run.config.out / "log.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
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
            self.board.add_scalar(name, value, step)
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self.board.flush()
        except OSError as error:
            raise OSError(f"{self.file.name}: cannot be written ({error.strerror})") from error

    def picture(self, step, name, image):
        self.board.add_image(name, np.asarray(image), step, dataformats="HWC")


def step_of(row):
    """The step of a line of log.jsonl; of half a line, infinity."""
    try:
        return json.loads(row)["step"]
    except ValueError:
        return math.inf


# --------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(run):
    """Writes checkpoints/step-NNNNNN: the LoRA in diffusers' format, the discriminator, the
    optimiser, the step. All randomness comes from (seed, step, place in the step), so there is no
    other state. It is written under another name and then renamed; `latest` is a link to it.
    Raises OSError if it cannot be written; the one before is then untouched."""
    folder = run.config.out / "checkpoints"
    final = folder / f"step-{run.step:06d}"
    unfinished = folder / f".{final.name}.unfinished"
    try:
        for leftover in folder.glob(".step-*"):  # of a process that was killed
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
        write_state(run, unfinished)
        for path in (*unfinished.iterdir(), unfinished):
            flush(path)
        discard(final)
        unfinished.rename(final)
        link = folder / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.rename(folder / "latest")
        flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            f"{final} cannot be written ({first_line(error)}); make room, then go on with --resume"
        ) from error
    for old in sorted(folder.glob("step-??????"))[: -run.config.keep]:
        discard(old)


def write_state(run, folder):
    run.save_adapters(folder)
    state = {
        "step": run.step,
        "prompts_per_step": run.prompts_per_step(),
        "prompts": hash_of(run.config.prompts),
        "optimizer": run.optimizer.state_dict(),
    }
    torch.save(state, folder / "state.pt")


def flush(path):
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(folder):
    """Deletes a checkpoint, which first loses its name: what is called step-NNNNNN is whole."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.discarded")
        folder.rename(hidden)
        shutil.rmtree(hidden)


DAMAGE = (OSError, RuntimeError, KeyError, SafetensorError, EOFError, pickle.UnpicklingError)


def load_checkpoint(run, folder):
    """Puts a run where it was when the checkpoint was written. Raises ValueError if that cannot be
    done exactly."""
    try:
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        check_same_prompts(run, state)
        run.load_adapters(folder)
        run.optimizer.load_state_dict(state["optimizer"])
        run.step = state["step"]
    except DAMAGE as error:
        raise ValueError(
            f"{folder}: not a whole checkpoint of this model ({first_line(error)}); delete it, and "
            "--resume takes the one before"
        ) from error


def check_same_prompts(run, state):
    c, before, now = run.config, state["prompts_per_step"], run.prompts_per_step()
    if before != now:
        raise ValueError(
            f"--resume: {c.out} was made with {before} prompts a step, --batch x --accumulate x "
            f"ranks; now these are {c.batch} x {c.accumulate} x {run.world_size}"
        )
    if state["prompts"] != hash_of(c.prompts):
        raise ValueError(f"--resume: the content of {c.prompts} has changed since {c.out} was made")

"""The output folder of a run: log.jsonl and TensorBoard events, sample grids, scores, checkpoints, and the rules for starting
and resuming in it."""
import json
import math
import os
import pickle
import shutil

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import config as configuration
import diffusion
import discriminator
import evaluate
import parallel
import sample

MAY_DIFFER = {"out", "resume", "steps", "sample_every", "sample_prompts", "terms_every", "checkpoint_every", "keep", "device",
              "eval_prompts", "eval_count", "references", "batch", "accumulate", "max_skips", "timeout", "offload",
              "checkpointing"}


def open_output(c):
    """Returns the checkpoint to go on from, or None to start. Refuses a folder that is in use, and a resume with another
    recipe. A process that torchrun has started again (--max-restarts) resumes by itself."""
    again = c.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    begun, first = (c.out / "config.json").is_file(), int(os.environ.get("RANK", 0)) == 0
    if first and not (again and begun) and c.out.exists() and (not c.out.is_dir() or any(c.out.iterdir())):
        raise ValueError(f"--out {c.out}: not empty" + ("; go on with --resume, or choose another folder" if begun else
                                                        ", and not a run's folder; choose another"))
    if not again or not begun:
        return None
    before = configuration.load(c.out / "config.json")
    changed = [f"--{k.replace('_', '-')} ({v!r} then, {getattr(c, k)!r} now)" for k, v in vars(before).items()
               if k not in MAY_DIFFER and str(v) != str(getattr(c, k))]
    if changed:
        raise ValueError(f"--resume: {c.out} was made with other values of {', '.join(changed)}")
    return newest(c.out)


def newest(out):
    """The newest checkpoint of a run, or None. Whatever is called step-NNNNNN is whole."""
    return max((out / "checkpoints").glob("step-??????"), default=None)


class Log:
    """log.jsonl and TensorBoard; on other processes than the first, nothing."""

    def __init__(self, run):
        self.file = self.board = None
        if run.process == 0:
            from torch.utils.tensorboard import SummaryWriter
            path = run.config.out / "log.jsonl"
            rows = path.read_text().split("\n") if path.exists() else []
            kept = [row for row in rows if step_of(row) < run.step]  # a resumed run takes up after its checkpoint
            configuration.write(path, "".join(row + "\n" for row in kept))
            self.file, self.board = open(path, "a"), SummaryWriter(run.config.out, purge_step=run.step)

    def write(self, step, numbers):
        """numbers: {name: a number or a list}. What is not finite is written as text: JSON has no NaN."""
        if self.file:
            row = {k: v if isinstance(v, list) else float(f"{v:.6g}") if math.isfinite(v) else str(v)
                   for k, v in numbers.items()}
            try:
                self.file.write(json.dumps({"step": step, **row}) + "\n")
                self.file.flush()
            except OSError as error:
                raise OSError(f"{self.file.name}: cannot be written ({error.strerror}); make room, then go on with --resume"
                                 ) from error
            for key, value in numbers.items():
                if not isinstance(value, list):
                    self.board.add_scalar(key, value, step)
            self.board.flush()

    def picture(self, step, name, image):
        self.board.add_image(name, torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(
            image.height, image.width, 3), step, dataformats="HWC")


def step_of(row):
    """The step of a line of log.jsonl; of half a line, infinity."""
    try:
        return json.loads(row)["step"]
    except ValueError:
        return math.inf


def draw_samples(run, log):
    """The grid at fixed prompts and seeds: samples/step-NNNNNN.png and TensorBoard."""
    c = run.config
    def draw(adapter):
        return sample.generate(run.pipe, run.plan, run.shown, c.guidance_scale, c.resolution, (adapter,), batch=8)[0]
    if run.base_samples is None:
        run.base_samples = draw(None)  # they never change: once a run
    picture = sample.grid(run.shown, {"base": run.base_samples, f"step {run.step}": draw(diffusion.ADAPTER)})
    (c.out / "samples").mkdir(exist_ok=True)
    picture.save(c.out / f"samples/step-{run.step:06d}.png")
    log.picture(run.step, "samples", picture)


def report(run):
    """Scores base against tuned on the held-out prompts, all processes together (evaluate.score_run), and draws
    samples/before_after.png."""
    c, captioner = run.config, (run.captioner, run.tokenizer) if run.captioner else None
    with diffusion.visiting(run.pipe.unet.device, *diffusion.text_encoders(run.pipe), run.pipe.vae, run.captioner):
        scored = evaluate.score_run(c, run.pipe, run.plan, captioner=captioner, parser=run.parser, process=run.process,
                                    processes=run.processes)
    if scored:
        _, asked, base, tuned = scored
        (c.out / "samples").mkdir(exist_ok=True)
        sample.grid(asked, {"base": base, "tuned": tuned}).save(c.out / "samples/before_after.png")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(run):
    """checkpoints/step-NNNNNN: the LoRA in diffusers' format, the discriminator, both optimisers, the step. All randomness
    comes from (seed, step, place in the step), so there is no other state. Written under another name, flushed to the disk,
    then renamed; `latest` is a link to it. Raises OSError if it cannot be written; the one before is then untouched."""
    folder = run.config.out / "checkpoints"
    final = folder / f"step-{run.step:06d}"
    unfinished, link = folder / f".{final.name}.unfinished", folder / ".latest"
    try:
        for leftover in folder.glob(".step-*"):  # of a process that was killed
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
        write_state(run, unfinished)
        for path in (*unfinished.iterdir(), unfinished):
            flush(path)
        discard(final)
        unfinished.rename(final)
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.rename(folder / "latest")
        flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        intact = newest(run.config.out)
        raise OSError(f"{final} cannot be written ({configuration.first_line(error)}); make room, then go on with --resume"
                         + (f": {intact.name} is intact" if intact else "")) from error
    for old in sorted(folder.glob("step-??????"))[:-run.config.keep]:
        discard(old)


def write_state(run, folder):
    diffusion.save_lora(run.pipe, folder, diffusion.ADAPTER)
    state = {"step": run.step, "each": prompts_a_step(run), "prompts": parallel.hash_of(run.config.prompts),
             "optimizer": run.optimizer.state_dict()}
    if run.head:
        adapter = get_peft_model_state_dict(run.pipe.unet, adapter_name=discriminator.ADAPTER)
        save_file({**{f"unet.{k}": v.contiguous() for k, v in adapter.items()},
                   **{f"head.{k}": v for k, v in run.head.state_dict().items()}}, folder / "discriminator.safetensors")
        state["discriminator_optimizer"] = run.discriminator_optimizer.state_dict()
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


def prompts_a_step(run):
    return run.config.batch * run.config.accumulate * run.processes


def load_checkpoint(run, folder):
    """Puts a run where it was when the checkpoint was written. Raises ValueError if that cannot be done exactly."""
    try:
        restore(run, folder)
    except (OSError, RuntimeError, KeyError, SafetensorError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}: not a whole checkpoint of this model ({configuration.first_line(error)}); delete it, and "
                         "--resume takes the one before") from error


def restore(run, folder):
    state = torch.load(folder / "state.pt", weights_only=True, map_location=run.pipe.unet.device)  # no code of a stranger's
    if state["each"] != prompts_a_step(run):
        raise ValueError(f"--resume: {run.config.out} was made with {state['each']} prompts a step, --batch x --accumulate x "
                         f"processes; now these are {run.config.batch} x {run.config.accumulate} x {run.processes}")
    if state["prompts"] != parallel.hash_of(run.config.prompts):
        raise ValueError(f"--resume: the content of {run.config.prompts} is not what it was at {folder.name}")
    lora = load_file(folder / "pytorch_lora_weights.safetensors")
    lora = convert_unet_state_dict_to_peft({k.removeprefix("unet."): v for k, v in lora.items()})
    set_peft_model_state_dict(run.pipe.unet, lora, diffusion.ADAPTER)
    run.optimizer.load_state_dict(state["optimizer"])
    if run.head:
        tensors = load_file(folder / "discriminator.safetensors")
        parts = {part: {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
                 for part in ("unet.", "head.")}
        set_peft_model_state_dict(run.pipe.unet, parts["unet."], discriminator.ADAPTER)
        run.head.load_state_dict(parts["head."])
        run.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
    run.step = state["step"]

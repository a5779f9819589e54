"""The output folder of a run: log.jsonl and TensorBoard events, checkpoints, and the rules for starting and resuming in it."""
import json
import shutil

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

import config as configuration
import diffusion
import discriminator

MAY_DIFFER = {"out", "resume", "steps", "sample_every", "sample_prompts", "terms_every", "checkpoint_every", "keep",
              "eval_prompts", "eval_count", "device", "references"}


def open_output(c):
    """Makes the output folder; refuses one that is in use, and a resume with another recipe. Returns the checkpoint to load."""
    latest = c.out / "checkpoints/latest"
    if not c.resume:
        if c.out.exists() and (not c.out.is_dir() or any(c.out.iterdir())):
            raise ValueError(f"--out {c.out}: not empty; go on with --resume, or choose another folder")
        return None
    if not latest.exists():
        raise ValueError(f"--resume: no checkpoint in {c.out}; leave --resume out to start afresh")
    before = configuration.load(c.out / "config.json")
    changed = [f"--{k.replace('_', '-')} ({v!r} then, {getattr(c, k)!r} now)" for k, v in vars(before).items()
               if k not in MAY_DIFFER and str(v) != str(getattr(c, k))]
    if changed:
        raise ValueError(f"--resume: {c.out} was made with other values of {', '.join(changed)}")
    return latest


class Log:
    """log.jsonl and TensorBoard; on other processes than the first, nothing."""

    def __init__(self, run):
        self.file = self.board = None
        if run.process == 0:
            from torch.utils.tensorboard import SummaryWriter
            path = run.config.out / "log.jsonl"
            kept = [s for s in path.read_text().splitlines() if json.loads(s)["step"] < run.step] if path.exists() else []
            path.write_text("".join(s + "\n" for s in kept))  # a resumed run takes up after its checkpoint: no step twice
            self.file, self.board = open(path, "a"), SummaryWriter(run.config.out, purge_step=run.step)

    def write(self, step, numbers):
        if self.file:
            self.file.write(json.dumps({"step": step, **numbers}) + "\n")
            self.file.flush()
            for key, value in numbers.items():
                self.board.add_scalar(key, value, step)

    def picture(self, step, name, image):
        self.board.add_image(name, torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(
            image.height, image.width, 3), step, dataformats="HWC")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(run):
    """checkpoints/step-NNNNNN: the LoRA in diffusers' format, the discriminator, both optimisers, the step. All randomness
    comes from (seed, step, process), so there is no other state. Written under another name, then renamed; `latest` is
    a link to it."""
    folder = run.config.out / "checkpoints"
    name = f"step-{run.step:06d}"
    unfinished, final = folder / f".{name}.unfinished", folder / name
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    diffusion.save_lora(run.pipe, unfinished, diffusion.ADAPTER)
    state = {"step": run.step, "optimizer": run.optimizer.state_dict()}
    if run.head:
        adapter = get_peft_model_state_dict(run.pipe.unet, adapter_name=discriminator.ADAPTER)
        save_file({**{f"unet.{k}": v.contiguous() for k, v in adapter.items()},
                   **{f"head.{k}": v for k, v in run.head.state_dict().items()}}, unfinished / "discriminator.safetensors")
        state["discriminator_optimizer"] = run.discriminator_optimizer.state_dict()
    torch.save(state, unfinished / "state.pt")
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)
    link = folder / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.rename(folder / "latest")
    for old in sorted(folder.glob("step-*"))[:-run.config.keep]:
        shutil.rmtree(old)


def load_checkpoint(run, folder):
    """Puts a run where it was when the checkpoint was written."""
    state = torch.load(folder / "state.pt", weights_only=True, map_location=run.pipe.device)
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

"""Loading at the edge: base pipelines, runs, LoRA files. What is not what it should be is refused
in one line that names the flag; the libraries would go on with random weights, or only warn."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict

import diffusion
from config import PRESETS, Config, check_ranges, unet_and_vae
from tools import lora
from utils import STEP, choose_device, first_line, load_config

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")

# --------------------------------------------------------------------------------------------------
# The base


def open_pipeline(config):
    """The pipeline and the Schedule that a Config names, on its device and in its dtype."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity(library.CRITICAL)  # what they log as an error they raise, too
    unet, vae = unet_and_vae(config)
    dtype, revision = getattr(torch, config.dtype), config.revision or None
    pipe = load(config.model, unet, vae, revision, config.scheduler, choose_device(config), dtype)
    return pipe, plan_of(pipe, config)


def plan_of(pipe, config):
    """The Schedule of a Config for a pipeline. Raises ValueError if they do not go together."""
    cell = 8 * pipe.vae_scale_factor  # the UNet halves its maps up to three times
    if config.resolution % cell:
        raise ValueError(f"--resolution {config.resolution}: must be a multiple of {cell} here")
    check_linear(pipe.scheduler, config.num_steps)
    return diffusion.schedule(pipe.scheduler, config.num_steps)


def check_linear(scheduler, num_steps):
    """Refuses samplers that are not linear in the UNet's output."""
    name, config = type(scheduler).__name__, scheduler.config
    if type(scheduler) not in diffusion.SCHEDULERS.values():
        raise ValueError(f"{name} is not linear in the UNet's output; use ddpm, ddim or euler")
    for option in ("thresholding", "clip_sample"):
        if config.get(option):
            raise ValueError(f"the scheduler's {option} is not linear in the UNet's output")
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {config.prediction_type!r}: use epsilon or v_prediction")
    if config.get("variance_type", "fixed_small") != "fixed_small":
        raise ValueError(f"variance_type {config.variance_type!r}: use fixed_small")
    if num_steps > config.num_train_timesteps:
        raise ValueError(f"--num-steps {num_steps}: the model has {config.num_train_timesteps}")


def load(
    model, unet="", vae="", revision=None, scheduler="ddpm", device="cpu", dtype=torch.float32
):
    """A frozen Stable Diffusion or SDXL pipeline from a hub id or a folder in diffusers' format.

    unet, vae: take this part from another hub id or folder. Raises ValueError, naming the flag."""
    parts = {}
    if unet:
        parts["unet"] = load_part("unet", UNet2DConditionModel, unet, dtype)
    if vae:
        parts["vae"] = load_part("vae", AutoencoderKL, vae, dtype)
    with naming("model", model):
        index = DiffusionPipeline.load_config(model, revision=revision)
        check_class(index, *PIPELINES)
        if "safety_checker" in index:
            parts |= {"safety_checker": None, "feature_extractor": None}
            parts["requires_safety_checker"] = False
        for name in ("text_encoder", "text_encoder_2"):
            if name in index:
                cls = getattr(transformers, index[name][1])
                options = {"subfolder": name, "dtype": dtype, "revision": revision}
                parts[name] = load_whole(cls, model, **options)
        pipe = DiffusionPipeline.from_pretrained(model, revision=revision, dtype=dtype, **parts)
        check_weights(pipe.unet)
        check_weights(pipe.vae)
        check_tokenizer(pipe.tokenizer, pipe.text_encoder.config.vocab_size)
        check_convention(pipe)
    settings = {"clip_sample": False, **pipe.scheduler.config}  # DDPM would clip latents as pixels
    pipe.scheduler = diffusion.SCHEDULERS[scheduler].from_config(settings)
    return freeze(pipe).to(device)


def check_convention(pipe):
    """Refuses latents and noise of another convention, for they would be decoded or sampled wrongly
    without a word."""
    if pipe.vae.config.get("latents_mean") or pipe.vae.config.get("latents_std"):
        raise ValueError("its VAE normalises latents by latents_mean and latents_std")
    if "sigma_data" in pipe.scheduler.config:
        name = type(pipe.scheduler).__name__
        raise ValueError(f"its scheduler is a {name}, of EDM's convention; DDPM's is needed")


def load_part(name, cls, source, dtype):
    """A UNet or VAE from a hub id or a folder that is, or has in its subfolder `name`, one."""
    with naming(name, source):
        try:
            config, subfolder = cls.load_config(source, subfolder=name), name
        except OSError:
            config, subfolder = cls.load_config(source), None
        check_class(config, cls.__name__)  # diffusers would go on with random weights
        part = cls.from_pretrained(source, subfolder=subfolder, dtype=dtype)
        check_weights(part)
        return part


@contextmanager
def naming(flag, source):
    """Turns whatever the libraries raise of a damaged folder, nearly anything, into one line."""
    try:
        yield
    except Exception as error:
        reason = first_line(error)
        if str(source).startswith((".", "/")) and not Path(source).exists():
            reason = "no such file or folder"
        raise ValueError(f"--{flag} {source}: cannot be loaded ({reason})") from error


def check_class(config, *names):
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in names:
        raise ValueError(f"it is a {kind}, {' or '.join(names)} is needed")


def check_weights(model):
    """Refuses a model of diffusers that lacks weights: they stay on the meta device."""
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("weights are missing")


def load_whole(cls, source, tolerated=0.1, **options):
    """A transformers model whose weights are in its file; for missing ones transformers would go on
    with random ones. tolerated: the share that may be missing, for a library may rename a few."""
    model, report = cls.from_pretrained(source, output_loading_info=True, **options)
    missing, count = len(report["missing_keys"]), len(model.state_dict())
    if missing > tolerated * count:
        raise ValueError(f"not a {cls.__name__}: {missing} of {count} weights are missing")
    return model


def check_tokenizer(tokenizer, words):
    """Refuses a tokenizer of another model; from a folder without one transformers makes one."""
    if not words // 2 < len(tokenizer) <= words:
        raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, the model {words}")
    tokenizer("a dog")


def load_blip_model(flag, cls, source, device, dtype, tolerated=0.1):
    """(frozen model, its tokenizer) of a BLIP class. Raises ValueError, naming the flag, if they
    cannot be loaded or more than a share `tolerated` of the weights is missing."""
    with naming(flag, source):
        model = load_whole(cls, source, tolerated, dtype=dtype).to(device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        check_tokenizer(tokenizer, model.config.text_config.vocab_size)
    return model.requires_grad_(False).eval(), tokenizer


def freeze(pipe):
    """Freezes all modules of a pipeline and silences its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipe


# --------------------------------------------------------------------------------------------------
# Runs and LoRA files


def read_run(out, checkpoint="latest", loras=(), base_only=False, **overrides):
    """(config, the LoRAs of its adapter, the flag that names them) of what `open_run` takes; loads
    nothing. Raises ValueError."""
    out = Path(out)
    if base_only + bool(loras) + (checkpoint != "latest") > 1:
        raise ValueError("--base-only, --lora and --checkpoint exclude each other: give one")
    if (out / "config.json").is_file():
        config = replace(load_config(out / "config.json"), out=out)
    elif loras or base_only:
        config = PRESETS[str(out)][1] if str(out) in PRESETS else replace(Config(), model=str(out))
    elif str(out) in PRESETS:
        raise ValueError(f"{out}: a preset has no checkpoint; give --base-only, --lora, or a run")
    else:
        raise ValueError(
            f"{out}: not an output folder of train.py (no config.json), nor a preset: "
            f"{', '.join(PRESETS)}; a hub id needs --base-only or --lora"
        )
    config = replace(config, **overrides)
    check_ranges(config)
    if loras or base_only:
        return config, loras, "lora"
    return config, [find_checkpoint(out, checkpoint)], "checkpoint"


def open_run(out, *source, **overrides):
    """(config, pipeline, Schedule) of an output folder, or, with loras or base_only, of a preset's
    name, or of a base model: a hub id or a folder, with the default settings.

    source: checkpoint, loras, base_only. The pipeline's adapter `comat` is the checkpoint, or the
    sum of loras (what lora.read takes); with base_only there is none. overrides: fields of the
    Config. Raises ValueError."""
    config, *adapter = read_run(out, *source, **overrides)
    return config, *load_run(config, *adapter)


def load_run(config, sources, flag):
    """(pipeline, Schedule) of what `read_run` returned."""
    pipe, plan = open_pipeline(config)
    if sources:
        add_loras(pipe, sources, flag)
    return pipe, plan


def adapters_of(base_only):
    """{label: adapter} of the models that sample.py and evaluate.py draw by."""
    return {"base": None} if base_only else {"base": None, "tuned": diffusion.ADAPTER}


def add_loras(pipe, sources, flag):
    """Adds the sum of LoRAs to the pipeline as its adapter `comat`, in fp32 as in training."""
    loras = []
    for source in sources:
        path, strength = lora.split_strength(source)
        with naming(flag, path):
            loras.append(lora.read(pipe, path, strength))
    lora.add(pipe, loras, diffusion.ADAPTER)
    diffusion.adapter_in_fp32(pipe.unet, diffusion.ADAPTER)


def find_checkpoint(out, name):
    """The folder of a whole checkpoint of a run; ValueError says what there is instead."""
    folder = out / "checkpoints" / name
    if (folder / lora.FILE).is_file() and not name.startswith("."):
        return folder
    have = sorted(path.name for path in (out / "checkpoints").glob(STEP))
    there = f"there are {', '.join(have)}" if have else "there is none; train first"
    raise ValueError(f"{folder}: no finished checkpoint; {there}")


def save_adapter(pipe, folder, name):
    """Writes an adapter in diffusers' own format: `pipe.load_lora_weights(folder)` reads it."""
    state = get_peft_model_state_dict(pipe.unet, adapter_name=name)
    layers = {k: v.contiguous() for k, v in convert_state_dict_to_diffusers(state).items()}
    pipe.save_lora_weights(folder, unet_lora_layers=layers)


@contextmanager
def using(pipe, name):
    """Within the context the whole pipeline runs with an adapter, or, if name is None, as the
    original model: a LoRA may have parts for the text encoders too."""
    with ExitStack() as stack:
        stack.enter_context(diffusion.adapter(pipe.unet, name))
        for part in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
            if name in (None, *getattr(part, "peft_config", ())):
                stack.enter_context(diffusion.adapter(part, name))
        yield

"""The sampler with gradient: load a pipeline, attach adapters, encode prompts, `sample` without gradient, `replay` chosen steps
with gradient, decode.

The UNet's input is detached at every step (as in the paper's SDXL recipe), so sampling is linear in the UNet's outputs:

    z_{i+1} = a_i z_i + b_i eps_i + c_i n_i          eps_i = eps_u + w (eps_c - eps_u), n_i ~ N(0, 1)

and the gradient of a loss on z_T falls into small exact pieces, one per trained step i, each with a graph of its own:

    dL/dtheta = sum_i  < b_i (prod_{j>i} a_j) dL/dz_T,  d eps_i / d theta >
"""
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict

import attention
import config as configuration
from entities import MAX_CHARS

SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}
ADAPTER = "comat"  # the online model's adapter
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


# ---------------------------------------------------------------------------------------------------------------------
# Models

def load(model, unet=None, vae=None, revision=None, scheduler="ddpm", device="cpu", dtype=torch.float32):
    """A frozen Stable Diffusion or SDXL pipeline from a hub id or a folder in diffusers' format, with one of SCHEDULERS.

    unet, vae: take this part from another folder or hub id, a whole pipeline or the part alone. SD1.5's safety checker is
    left out. Raises ValueError, naming the flag, if something is not what it should be."""
    try:
        index = DiffusionPipeline.load_config(model, revision=revision)
    except (OSError, RecursionError) as error:
        raise ValueError(f"--model {model}: no diffusers pipeline there; give a hub id (needs the network once) or a folder "
                         f"with model_index.json ({configuration.first_line(error)})") from None
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise ValueError(f"--model {model}: is a {kind}; Stable Diffusion or Stable Diffusion XL is needed")
    if Path(model).is_dir():
        missing = [n for n, v in index.items() if isinstance(v, list) and v[0] and not (Path(model) / n).is_dir()
                   and n not in ("safety_checker", "feature_extractor") and not (n == "unet" and unet or n == "vae" and vae)]
        if missing:
            raise ValueError(f"--model {model}: not a whole pipeline, it lacks {', '.join(f'{n}/' for n in missing)}")
    parts = {flag: load_part(flag, cls, source, dtype) for flag, cls, source in
             (("unet", UNet2DConditionModel, unet), ("vae", AutoencoderKL, vae)) if source}
    if "safety_checker" in index:
        parts.update(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    try:
        for name in ("text_encoder", "text_encoder_2"):
            if name in index:
                parts[name] = load_whole(getattr(transformers, index[name][1]), model, subfolder=name, dtype=dtype,
                                         revision=revision)
        pipe = DiffusionPipeline.from_pretrained(model, revision=revision, dtype=dtype, **parts)
        if any(p.is_meta for part in (pipe.unet, pipe.vae) for p in part.parameters()):
            raise ValueError("weights are missing in unet/ or vae/")
        check_tokenizer(pipe.tokenizer, pipe.text_encoder.config.vocab_size)
    except Exception as error:  # of a damaged folder diffusers, transformers and safetensors raise nearly anything
        raise ValueError(f"--model {model}: cannot be loaded ({configuration.first_line(error)})") from error
    settings = {"clip_sample": False, **pipe.scheduler.config}  # DDPM's own default would clip latents as if they were pixels
    pipe.scheduler = SCHEDULERS[scheduler].from_config(settings)
    return freeze(pipe).to(device)


def load_part(flag, cls, source, dtype):
    """A UNet or VAE from a hub id or a folder that is, or has in its subfolder `flag`, such a model."""
    for subfolder in (flag, None):
        try:
            kind = cls.load_config(source, subfolder=subfolder).get("_class_name")
        except OSError:
            continue
        if kind != cls.__name__:  # diffusers would go on with random weights
            raise ValueError(f"--{flag} {source}: is a {kind}, not a {cls.__name__}")
        try:
            part = cls.from_pretrained(source, subfolder=subfolder, dtype=dtype)
            if any(p.is_meta for p in part.parameters()):
                raise ValueError("weights are missing")
            return part
        except Exception as error:  # as above
            raise ValueError(f"--{flag} {source}: cannot be loaded ({configuration.first_line(error)})") from error
    raise ValueError(f"--{flag} {source}: no {cls.__name__} there; give a hub id (needs the network once) or a folder with "
                     f"config.json or {flag}/config.json")


def load_whole(cls, source, tolerated=0.1, **options):
    """A transformers model whose weights are in its file: for missing ones transformers would go on with random ones.
    tolerated: the share that may be missing, for a library's version may rename one or two."""
    model, found = cls.from_pretrained(source, output_loading_info=True, **options)
    if len(found["missing_keys"]) > tolerated * len(model.state_dict()):
        raise ValueError(f"not a {cls.__name__}: {len(found['missing_keys'])} of {len(model.state_dict())} are missing")
    return model


def check_tokenizer(tokenizer, words):
    """Refuses a tokenizer of another model; from a folder without one transformers makes an empty one."""
    if not words // 2 < len(tokenizer) <= words:
        raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, the model {words}")
    tokenizer("a dog")


def freeze(pipe):
    """Freezes all modules of a pipeline and silences its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def choose_device(config):
    """The device that a Config names; under torchrun each process has its own GPU."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no GPU; use --device cpu, or install torch for your driver")
    torch.backends.cuda.matmul.allow_tf32 = config.dtype != "float32"  # the LoRA's float32 products on tensor cores
    if device == "cuda" and torch.distributed.is_initialized():
        device = f"cuda:{torch.cuda.current_device()}"
    return torch.device(device)


def open_pipeline(config):
    """The pipeline and the Schedule that a Config names, on its device and in its dtype."""
    for library in (diffusers.utils.logging, transformers.utils.logging):  # downloads still show theirs
        library.disable_progress_bar()
        library.set_verbosity_error()
    pipe = load(config.model, *configuration.parts(config), config.revision or None, config.scheduler, choose_device(config),
                getattr(torch, config.dtype))
    return pipe, plan_of(pipe, config)


def plan_of(pipe, config):
    """The Schedule of a Config for a pipeline. Raises ValueError if they do not go together."""
    cell = 8 * pipe.vae_scale_factor  # the UNet halves its maps up to three times
    if config.resolution % cell:
        raise ValueError(f"--resolution {config.resolution}: must be a multiple of {cell} for this model")
    return schedule(pipe.scheduler, config.num_steps)


def add_adapter(unet, name, rank, cross_attention=True):
    """A new LoRA adapter (fp32, alpha = rank, B = 0) on every attention projection of the UNet, or, without cross_attention,
    on self-attention's only; returns its parameters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is what is wanted
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS, init_lora_weights="gaussian",
                                    exclude_modules=None if cross_attention else r".*\.attn2\..*"), name)
    parameters = [p for n, p in unet.named_parameters() if f".{name}." in n]
    for p in parameters:
        p.data = p.data.float()
    return parameters


@contextmanager
def adapter(unet, name):
    """Within the context the UNet runs with one adapter, or, if name is None, as the original model. Run a graph's backward
    inside the context that made it: a checkpointed block recomputes with whatever adapter is active then."""
    active = [] if not getattr(unet, "_hf_peft_config_loaded", False) else unet.active_adapters()
    if name is None and active:
        unet.disable_adapters()
    elif name is not None:
        unet.enable_adapters(), unet.set_adapter(name)
    try:
        yield
    finally:
        if active:
            unet.enable_adapters(), unet.set_adapter(active)


@contextmanager
def merged(unet, name):
    """Within the context the UNet runs with an adapter merged into copies of its weights: no products of the LoRA's own, but
    W + BA is rounded to the base's dtype. The frozen weights themselves wait beside and come back untouched."""
    layers = [m for m in unet.modules() if isinstance(m, LoraLayer) and name in m.lora_A]
    frozen = [m.get_base_layer().weight.data for m in layers]
    try:
        with torch.no_grad():
            for m, w in zip(layers, frozen):
                m.get_base_layer().weight.data = (w.float() + m.get_delta_weight(name).float()).to(w.dtype)
        with adapter(unet, None):
            yield
    finally:
        for m, w in zip(layers, frozen):
            m.get_base_layer().weight.data = w


@contextmanager
def visiting(device, *models):
    """Within the context the models are on the device; those that were parked elsewhere (--offload) go back after it."""
    parked = {m: p.device for m in models if m is not None and (p := next(m.parameters())).device != device}
    try:
        for m in parked:
            m.to(device)
        yield
    finally:
        for m, home in parked.items():
            m.to(home)


def save_lora(pipe, folder, name):
    """Writes an adapter in diffusers' own format: `pipe.load_lora_weights(folder)` reads it anywhere."""
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet, adapter_name=name))
    pipe.save_lora_weights(folder, unet_lora_layers={k: v.contiguous() for k, v in state.items()})


# ---------------------------------------------------------------------------------------------------------------------
# Text

@dataclass
class Text:
    """Encoded prompts: embeddings (B, tokens, dim) and, where the UNet takes one, the pooled embedding (B, dim); each
    also for the empty prompt, as the pipeline itself makes it (for SDXL: zeros)."""
    conditional: tuple
    unconditional: tuple

    def guided(self):
        """Both halves in one batch, unconditional first."""
        return tuple(u if c is None else torch.cat([u, c]) for u, c in zip(self.unconditional, self.conditional))

    def expand(self, batch):
        return Text(*(tuple(x if x is None else x.expand(batch, *x.shape[1:]) for x in half)
                      for half in (self.conditional, self.unconditional)))


@torch.no_grad()
def encode(pipe, prompts, empty=None):
    """Prompts -> Text, by the pipeline's own encoder or encoders. empty: the Text of [""], to encode it only once."""
    with visiting(pipe.unet.device, *text_encoders(pipe)):
        conditional, unconditional, *pooled = pipe.encode_prompt(
            prompt=[p[:MAX_CHARS] for p in prompts], device=pipe.unet.device,
            num_images_per_prompt=1, do_classifier_free_guidance=not empty)
    pooled = pooled or (None, None)
    if empty:
        return Text((conditional, pooled[0]), empty.expand(len(prompts)).unconditional)
    return Text((conditional, pooled[0]), (unconditional, pooled[1]))


def text_encoders(pipe):
    return pipe.text_encoder, getattr(pipe, "text_encoder_2", None)


def predict(pipe, z, timestep, embeddings, pooled=None):
    """The UNet's output (B, 4, h, w) in fp32 (fp64 stays) for latents z, with SDXL's size conditioning if it has one."""
    unet, added = pipe.unet, None
    dtype = next(unet.parameters()).dtype  # unet.dtype looks through all modules, twice a pass: a tenth of the shapes world's
    if unet.config.addition_embed_type == "text_time":
        height, width = (n * pipe.vae_scale_factor for n in z.shape[-2:])
        size = torch.tensor([height, width, 0, 0, height, width], device=z.device, dtype=dtype)
        added = {"text_embeds": pooled, "time_ids": size.expand(len(z), -1)}
    output = unet(z.to(dtype), timestep, embeddings, added_cond_kwargs=added).sample
    return output.to(torch.promote_types(output.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# The sampler as a linear recurrence

@dataclass
class Schedule:
    """z_{i+1} = a z_i + b output_i + c n_i for i < T; the UNet sees scale * z_i at timesteps[i]; z_0 = start * n."""
    timesteps: list
    a: list
    b: list
    c: list
    scale: list
    start: float
    noisy: bool


def schedule(scheduler, num_steps):
    """The coefficients of a DDPM (Ho 2020, eq. 7), DDIM (Song 2021, eq. 12, eta = 0) or Euler (Karras 2022, alg. 1) sampler
    with num_steps steps, epsilon or v prediction. A sampler that is not linear in the UNet's output raises ValueError."""
    kind, config = type(scheduler), scheduler.config
    if kind not in SCHEDULERS.values():
        raise ValueError(f"{kind.__name__} is not linear in the UNet's output; use one of {', '.join(SCHEDULERS)}")
    for option in ("thresholding", "clip_sample"):
        if config.get(option):
            raise ValueError(f"the scheduler's {option} is not linear in the UNet's output; set it to false in its config")
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {config.prediction_type!r} is not supported; use epsilon or v_prediction")
    if config.get("variance_type", "fixed_small") != "fixed_small":
        raise ValueError(f"variance_type {config.variance_type!r} is not supported; use fixed_small")
    if num_steps > config.num_train_timesteps:
        raise ValueError(f"{num_steps} denoising steps: the model was trained with {config.num_train_timesteps}")
    scheduler.set_timesteps(num_steps)
    velocity = config.prediction_type == "v_prediction"
    timesteps = scheduler.timesteps.tolist()
    if kind is EulerDiscreteScheduler:
        sigmas = scheduler.sigmas.double().tolist()
        rows = [_euler(s, s_next, velocity) for s, s_next in zip(sigmas, sigmas[1:])]
        return Schedule(timesteps, *map(list, zip(*rows)), start=float(scheduler.init_noise_sigma), noisy=False)
    alphas = scheduler.alphas_cumprod.double().tolist()
    rows = []
    for t in timesteps:
        before = scheduler.previous_timestep(t) if kind is DDPMScheduler else t - config.num_train_timesteps // num_steps
        final = 1.0 if kind is DDPMScheduler else float(scheduler.final_alpha_cumprod)
        rows.append(_ancestral(alphas[t], alphas[before] if before >= 0 else final, velocity, kind is DDPMScheduler))
    return Schedule(timesteps, *map(list, zip(*rows)), start=1.0, noisy=kind is DDPMScheduler)


def _ancestral(alpha, alpha_next, velocity, ddpm):
    """(a, b, c, scale) from cumulative alphas: z' = p x0 + q eps, or p x0 + q z + noise; x0, eps linear in the output."""
    s, n = alpha ** 0.5, (1 - alpha) ** 0.5  # z = s x0 + n eps;  x0 = x_z z + x_o output;  eps = e_z z + e_o output
    (x_z, x_o), (e_z, e_o) = ((s, -n), (n, s)) if velocity else ((1 / s, -n / s), (0.0, 1.0))
    if not ddpm:
        p, q = alpha_next ** 0.5, (1 - alpha_next) ** 0.5
        return p * x_z + q * e_z, p * x_o + q * e_o, 0.0, 1.0
    beta = 1 - alpha / alpha_next
    p, q = alpha_next ** 0.5 * beta / (1 - alpha), (1 - beta) ** 0.5 * (1 - alpha_next) / (1 - alpha)
    return p * x_z + q, p * x_o, max((1 - alpha_next) / (1 - alpha) * beta, 1e-20) ** 0.5, 1.0


def _euler(sigma, sigma_next, velocity):
    """(a, b, c, scale): z' = z + (sigma' - sigma) eps in the variance-exploding scale."""
    scale = (sigma ** 2 + 1) ** -0.5
    e_z, e_o = (sigma * scale ** 2, scale) if velocity else (0.0, 1.0)
    return 1 + (sigma_next - sigma) * e_z, (sigma_next - sigma) * e_o, 0.0, scale


def guided(pipe, plan, i, z, text, guidance_scale):
    """eps_u + w (eps_c - eps_u) at step i, both halves in one forward pass (Ho & Salimans 2022)."""
    output = predict(pipe, torch.cat([z, z]) * plan.scale[i], plan.timesteps[i], *text.guided())
    unconditional, conditional = output.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def initial_noise(pipe, size, generators):
    """Standard normal latents for images of `size` = (height, width) pixels, one generator per image."""
    shape = (len(generators), pipe.unet.config.in_channels, *(n // pipe.vae_scale_factor for n in size))
    return randn_tensor(shape, generators, pipe.unet.device)


@torch.no_grad()
def sample(pipe, plan, text, noise, generators, guidance_scale, keep=()):
    """Denoises `noise` (B, 4, h, w) along a Schedule with the UNet's active adapter, without gradient.

    generators: one per image, for the sampler's own noise, so that an image depends on its seed and not on its batch.
    Returns z_T and the states {i: z_i} for i in keep."""
    z, states = noise * plan.start, {}
    for i, t in enumerate(plan.timesteps):
        if i in keep:
            states[i] = z
        z = plan.a[i] * z + plan.b[i] * guided(pipe, plan, i, z, text, guidance_scale)
        if plan.noisy and t > 0:
            z = z + plan.c[i] * randn_tensor(z.shape, generators, z.device, z.dtype)
    return z, states


def replay(pipe, plan, text, states, gradient, guidance_scale, attention_steps=(), attention_blocks=(), attention_loss=None,
           through_inputs=False):
    """Adds to the active adapter's .grad the gradient of a loss on z_T through the UNet at the kept steps, one step and one
    graph at a time, so that memory does not grow with their number.

    gradient: dL/dz_T (B, 4, h, w). On attention_steps, attention_loss(maps) of the conditional half's cross-attention in the
    named blocks is added. through_inputs: let the gradient also flow through the UNet's input between the kept steps, as the
    official SD1.5 recipe does (the paper's SDXL recipe does not)."""
    batch, aspect = len(gradient), gradient.shape[-1] / gradient.shape[-2]
    for i in reversed(range(len(plan.timesteps))):
        through = 0
        if i in states:
            z = states[i].detach().requires_grad_(through_inputs)
            blocks = attention_blocks if i in attention_steps else ()
            with attention.uncompiled() if blocks else nullcontext():  # also what --checkpointing runs again, backwards
                with attention.capture(pipe.unet, blocks) as captured:
                    output = guided(pipe, plan, i, z, text, guidance_scale)
                loss = (plan.b[i] * gradient * output).sum()
                if captured:
                    loss = loss + attention_loss(attention.attention_maps(captured, batch, aspect))
                loss.backward()
            through = z.grad if through_inputs else 0
        gradient = plan.a[i] * gradient + through  # dL/dz_i from dL/dz_{i+1}


def decode(pipe, z):
    """Latents (B, 4, h, w) -> images (B, 3, H, W) in [0, 1], fp32, differentiable."""
    with visiting(z.device, pipe.vae):
        images = pipe.vae.decode((z / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)).sample
    return (images.to(torch.promote_types(images.dtype, torch.float32)) / 2 + 0.5).clamp(0, 1)

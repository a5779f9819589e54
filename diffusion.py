"""The sampler with gradient: adapters, encode, `sample` without gradient, `replay` of chosen steps
with gradient, decode.

The UNet's input is detached at every step (as in the paper's SDXL recipe), so sampling is linear in
the UNet's outputs:

    z_{i+1} = a_i z_i + b_i eps_i + c_i n_i      eps_i = eps_u + w (eps_c - eps_u), n_i ~ N(0, 1)

and the gradient of a loss on z_T falls into small exact pieces, one per trained step i, each with a
graph of its own:

    dL/dtheta = sum_i  < b_i (prod_{j>i} a_j) dL/dz_T,  d eps_i / d theta >
"""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

import attention
from entities import MAX_CHARS

SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}
ADAPTER = "comat"  # the online model's adapter
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


# --------------------------------------------------------------------------------------------------
# Adapters


def add_adapter(unet, name, rank, cross_attention=True):
    """A new LoRA adapter (fp32, alpha = rank, B = 0) on every attention projection of the UNet, or,
    without cross_attention, on self-attention's only. Returns its parameters."""
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=LORA_TARGETS,
        exclude_modules=None if cross_attention else r".*\.attn2\..*",
        init_lora_weights="gaussian",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        unet.add_adapter(lora, name)
    return adapter_in_fp32(unet, name)


class Projection(torch.nn.Module):
    """A matrix of a LoRA: an fp32 weight whose products are made in the base's dtype."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.data.float(), weight.requires_grad)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def adapter_in_fp32(unet, name):
    """Makes an adapter's parameters fp32, whatever the base's dtype, and returns them."""
    for layer in unet.modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            layer.cast_input_dtype_enabled = False  # peft would make the input fp32, too
            for matrices in (layer.lora_A, layer.lora_B):
                matrices[name] = Projection(matrices[name].weight)
    return [p for key, p in unet.named_parameters() if f".{name}." in key]


@contextmanager
def adapter(unet, name):
    """Within the context the UNet runs with one adapter or, if name is None, as the original model.
    A graph's backward pass belongs inside the context that made it: a checkpointed block is run
    again with whatever adapter is active then."""
    loaded = getattr(unet, "_hf_peft_config_loaded", False)
    before = unet.active_adapters() if loaded else []
    if name is not None:
        unet.enable_adapters()
        unet.set_adapter(name)
    elif loaded:
        unet.disable_adapters()
    try:
        yield
    finally:
        if before:
            unet.enable_adapters()
            unet.set_adapter(before)


@contextmanager
def merged(unet, name):
    """Within the context the UNet runs with an adapter merged into copies of its weights: fewer
    products, but W + BA is rounded to the base's dtype. The frozen weights come back untouched."""
    layers = [m for m in unet.modules() if isinstance(m, LoraLayer) and name in m.lora_A]
    bases = [layer.get_base_layer().weight for layer in layers]
    frozen = [base.data for base in bases]
    try:
        with torch.no_grad():
            for layer, base in zip(layers, bases):
                total = base.data.float() + layer.get_delta_weight(name).float()
                base.data = total.to(base.dtype)
        with adapter(unet, None):
            yield
    finally:
        for base, weight in zip(bases, frozen):
            base.data = weight


# --------------------------------------------------------------------------------------------------
# Text and the UNet


class Embedding(NamedTuple):
    """Encoded prompts: tokens (B, L, dim) and, where the UNet takes one, pooled (B, dim)."""

    tokens: torch.Tensor
    pooled: torch.Tensor | None

    def expand(self, batch):
        """One prompt's embedding for a batch."""
        return Embedding(*(x if x is None else x.expand(batch, *x.shape[1:]) for x in self))


@dataclass
class Text:
    """Prompts, their embeddings, and those of the null prompt as the pipeline makes it (SDXL:
    zeros)."""

    prompts: list[str]
    prompt: Embedding
    null: Embedding

    def both(self):
        """Null prompt and prompts in one batch of 2 B, in this order."""
        pairs = zip(self.null, self.prompt)
        return Embedding(*(u if u is None else torch.cat([u, c]) for u, c in pairs))


@torch.no_grad()
def encode(pipe, prompts, negative=""):
    """Prompts -> Text, by the pipeline's own encoders. negative: in the null prompt's place."""
    tokens, null_tokens, *pooled = pipe.encode_prompt(
        prompt=[p[:MAX_CHARS] for p in prompts],
        negative_prompt=[negative[:MAX_CHARS]] * len(prompts) if negative else None,
        device=pipe.unet.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
    )
    pooled, null_pooled = pooled or (None, None)
    return Text(prompts, Embedding(tokens, pooled), Embedding(null_tokens, null_pooled))


def predict(pipe, z, timestep, embedding):
    """The UNet's output (B, 4, h, w), at least fp32, for latents z, with SDXL's size conditioning
    where the UNet takes it."""
    unet, conditioning = pipe.unet, None
    dtype = next(unet.parameters()).dtype  # unet.dtype would walk through all modules
    if unet.config.addition_embed_type == "text_time":
        height, width = (n * pipe.vae_scale_factor for n in z.shape[-2:])
        size = torch.tensor([height, width, 0, 0, height, width], device=z.device, dtype=dtype)
        conditioning = {"text_embeds": embedding.pooled, "time_ids": size.expand(len(z), -1)}
    output = unet(z.to(dtype), timestep, embedding.tokens, added_cond_kwargs=conditioning).sample
    return at_least_fp32(output)


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def guided(pipe, step, z, text, guidance_scale):
    """eps_u + w (eps_c - eps_u) at one Step, both in one forward pass (Ho & Salimans 2022). With
    w <= 1 it is the prompt's output alone, as in diffusers."""
    if guidance_scale <= 1:
        return predict(pipe, z * step.scale, step.t, text.prompt)
    output = predict(pipe, torch.cat([z, z]) * step.scale, step.t, text.both())
    null, prompt = output.chunk(2)
    return null + guidance_scale * (prompt - null)


# --------------------------------------------------------------------------------------------------
# The sampler as a linear recurrence


@dataclass
class Step:
    """z' = a z + b output + c n, with n ~ N(0, 1). The UNet sees scale * z at timestep t."""

    t: float
    a: float
    b: float
    c: float = 0.0
    scale: float = 1.0


@dataclass
class Schedule:
    """The steps of a sampler; z_0 = start * n."""

    steps: list[Step]
    start: float = 1.0


class Linear(NamedTuple):
    """A quantity linear in the latents and the UNet's output: z * latents + out * output."""

    z: float
    out: float


def schedule(scheduler, num_steps):
    """The Schedule of a DDPM, DDIM (eta = 0) or Euler sampler with epsilon or v prediction."""
    scheduler.set_timesteps(num_steps)
    kind, timesteps = scheduler.config.prediction_type, scheduler.timesteps.tolist()
    if isinstance(scheduler, EulerDiscreteScheduler):
        sigmas = scheduler.sigmas.double().tolist()
        steps = [euler_step(*step, kind) for step in zip(timesteps, sigmas, sigmas[1:])]
        return Schedule(steps, start=float(scheduler.init_noise_sigma))
    alphas = scheduler.alphas_cumprod.double().tolist()
    if isinstance(scheduler, DDPMScheduler):
        step, last = ddpm_step, 1.0
        following = [scheduler.previous_timestep(t) for t in timesteps]
    else:
        step, last = ddim_step, float(scheduler.final_alpha_cumprod)
        following = [t - scheduler.config.num_train_timesteps // num_steps for t in timesteps]
    alphas_next = [alphas[t] if t >= 0 else last for t in following]
    return Schedule([step(t, alphas[t], after, kind) for t, after in zip(timesteps, alphas_next)])


def prediction(alpha, kind):
    """x0 and eps of z = sqrt(alpha) x0 + sqrt(1 - alpha) eps, each linear in z and the output."""
    signal, noise = alpha**0.5, (1 - alpha) ** 0.5
    if kind == "v_prediction":
        return Linear(z=signal, out=-noise), Linear(z=noise, out=signal)
    return Linear(z=1 / signal, out=-noise / signal), Linear(z=0.0, out=1.0)


def ddpm_step(t, alpha, alpha_next, kind):
    """z' = p x0 + q z + sqrt(beta~) n (Ho 2020, eq. 7); the last step adds no noise."""
    x0, _ = prediction(alpha, kind)
    beta = 1 - alpha / alpha_next
    p = alpha_next**0.5 * beta / (1 - alpha)
    q = (1 - beta) ** 0.5 * (1 - alpha_next) / (1 - alpha)
    variance = (1 - alpha_next) / (1 - alpha) * beta
    return Step(t, a=p * x0.z + q, b=p * x0.out, c=variance**0.5)


def ddim_step(t, alpha, alpha_next, kind):
    """z' = p x0 + q eps (Song 2021, eq. 12, eta = 0)."""
    x0, eps = prediction(alpha, kind)
    p = alpha_next**0.5
    q = (1 - alpha_next) ** 0.5
    return Step(t, a=p * x0.z + q * eps.z, b=p * x0.out + q * eps.out)


def euler_step(t, sigma, sigma_next, kind):
    """z' = z + (sigma' - sigma) eps for z = x0 + sigma eps (Karras 2022, alg. 1)."""
    scale = (sigma**2 + 1) ** -0.5
    eps = Linear(z=0.0, out=1.0)
    if kind == "v_prediction":
        eps = Linear(z=sigma * scale**2, out=scale)
    a = 1 + (sigma_next - sigma) * eps.z
    b = (sigma_next - sigma) * eps.out
    return Step(t, a, b, scale=scale)


def initial_noise(pipe, size, generators):
    """Standard normal latents for images of `size` = (height, width) pixels, a generator each."""
    height, width = (n // pipe.vae_scale_factor for n in size)
    shape = len(generators), pipe.unet.config.in_channels, height, width
    return randn_tensor(shape, generators, pipe.unet.device)


@torch.no_grad()
def sample(pipe, plan, text, noise, generators, guidance_scale, keep=(), nudge=None):
    """Denoises `noise` (B, 4, h, w) along a Schedule with the UNet's active adapter, no gradient.

    generators: one per image, for the sampler's own noise, so that an image depends on its seed and
    not on its batch; nudge(i, z_i): what to put in z_i's place. Returns z_T and the states {i: z_i}
    for i in keep."""
    z, states = noise * plan.start, {}
    for i, step in enumerate(plan.steps):
        z = nudge(i, z) if nudge else z
        if i in keep:
            states[i] = z
        z = step.a * z + step.b * guided(pipe, step, z, text, guidance_scale)
        if step.c:
            z = z + step.c * randn_tensor(z.shape, generators, z.device, z.dtype)
    return z, states


@dataclass
class AttentionLoss:
    """Losses on some of the trained steps, `losses(maps) -> ({name: loss}, note)`. maps: the
    prompts' cross-attention in the named blocks, {layer: (B, heads, h, w, tokens)}; note: numbers
    to log. If `measured` parameters are given, the note gets the norm of each loss's gradient."""

    steps: list
    blocks: tuple
    losses: object
    measured: list = ()


def replay(pipe, plan, text, states, gradient, guidance_scale, attended=None, through_inputs=False):
    """Adds to the active adapter's .grad the gradient of a loss on z_T through the UNet at the kept
    steps, one step and one graph at a time, so that memory does not grow with their number.

    states: {i: z_i} of `sample`; gradient: dL/dz_T (B, 4, h, w); attended: an AttentionLoss to add.
    through_inputs: let the gradient also flow through the UNet's input between the kept steps.
    Returns the notes of the attention loss, one per attended step."""
    batch, aspect = len(gradient), gradient.shape[-1] / gradient.shape[-2]
    notes = []
    for i, step in reversed(list(enumerate(plan.steps))):
        through = 0
        if i in states:
            z = states[i].detach().requires_grad_(through_inputs)
            blocks = attended.blocks if attended and i in attended.steps else ()
            with attention.capture(pipe.unet, blocks) as captured:
                output = guided(pipe, step, z, text, guidance_scale)
            losses = {"latents": (step.b * gradient * output).sum()}
            if captured:
                maps = attention.attention_maps(captured, batch, aspect)
                attention_losses, note = attended.losses(maps)
                losses |= attention_losses
                norms = gradient_norms(losses, attended.measured)
                notes.append(note | norms)
            sum(losses.values()).backward()
            through = z.grad if through_inputs else 0
        gradient = step.a * gradient + through  # dL/dz_i from dL/dz_{i+1}
    return notes


def gradient_norms(losses, parameters):
    """The norm of each loss's own gradient on the parameters; adds nothing to .grad."""
    norms = {}
    for name, loss in losses.items() if parameters else ():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        norms[f"lora_gradient_norm_{name}"] = torch.nn.utils.get_total_norm(gradients).item()
    return norms


def decode(pipe, z):
    """Latents (B, 4, h, w) -> images (B, 3, H, W) in [0, 1], at least fp32, differentiable."""
    vae = pipe.vae
    latents = z / vae.config.scaling_factor
    images = vae.decode(latents.to(vae.dtype)).sample
    return (at_least_fp32(images) / 2 + 0.5).clamp(0, 1)

"""The discriminator: the frozen UNet with an adapter of its own and a small head, on latents (section 3.4).

It shares the base weights with the model it judges: the adapter `discriminator` is switched on for its passes only.
"""
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

import config as configuration
import diffusion

ADAPTER = "discriminator"


class Head(nn.Module):
    """UNet output (B, 4, h, w) -> logits (B, 1, h, w). Its last layer starts at zero: before it has learned anything, the
    discriminator has no opinion and so gives the generator no gradient, rather than a random one."""

    def __init__(self, channels=4, width=64):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 1))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x):
        return self.layers(x.float())


def logits(pipe, head, latents, timestep, empty):
    """One logit per latent pixel, (B, 1, h, w): positive where the latents (B, 4, h, w) look like the original model's.

    timestep: the least noisy of the sampler; empty: the Text of the empty prompt (it judges the picture, not the prompt)."""
    with diffusion.adapter(pipe.unet, ADAPTER):
        return head(diffusion.predict(pipe, latents, timestep, *empty.expand(len(latents)).unconditional))


def add_adapter(pipe, rank):
    """The discriminator's adapter; returns its parameters. SDXL's empty prompt is a zero embedding, on which cross-attention
    adds nothing: there it gets none, for half of the adapter would never see a gradient."""
    return diffusion.add_adapter(pipe.unet, ADAPTER, rank, not pipe.config.get("force_zeros_for_empty_prompt"))


def reference_latents(pipe, plan, config, prompts):
    """z_T of the original model for each prompt (B, 4, h, w), the real examples: from a seed of the prompt's own, made once and
    kept in config.references, one safetensors file a prompt in a folder a recipe."""
    c = config
    fingerprint = [w.weight.double().sum().item() for w in (pipe.unet.conv_in, pipe.unet.conv_out)]  # retrained: made anew
    recipe = (*fingerprint, c.model, c.unet, c.revision, c.resolution, c.scheduler, c.num_steps, c.guidance_scale, c.dtype)
    folder = Path(c.references) / sha256(repr(recipe).encode()).hexdigest()[:16]
    names = {p: sha256(p.encode()).hexdigest()[:16] for p in prompts}
    missing = {p for p, name in names.items() if not (folder / f"{name}.safetensors").exists()}
    if missing:  # all are drawn: an image's last digits depend on its batch, and after a crash they have to be the same
        generators = [torch.Generator().manual_seed(int(name[:14], 16)) for name in names.values()]
        noise = diffusion.initial_noise(pipe, (c.resolution, c.resolution), generators)
        with diffusion.adapter(pipe.unet, None):
            z, _ = diffusion.sample(pipe, plan, diffusion.encode(pipe, names), noise, generators, c.guidance_scale)
        for p, latent in zip(names, z):
            if p in missing:
                configuration.write(folder / f"{names[p]}.safetensors", save({"z": latent.cpu().contiguous()}))
    return torch.stack([load_file(folder / f"{names[p]}.safetensors")["z"] for p in prompts]).to(pipe.unet.device)

"""The discriminator: the frozen UNet with an adapter of its own and a small head, on latents
(section 3.4). It shares the base weights with the model it judges."""

from torch import nn

import diffusion
import losses

ADAPTER = "discriminator"


class Head(nn.Module):
    """UNet output (B, 4, h, w) -> logits (B, 1, h, w). Its last layer starts at zero: before it has
    learned anything, the discriminator has no opinion and gives the generator no gradient."""

    def __init__(self, channels=4, width=64):
        super().__init__()
        inner = nn.Conv2d(channels, width, 3, padding=1)
        outer = nn.Conv2d(width, 1, 1)
        self.layers = nn.Sequential(inner, nn.SiLU(), outer)
        nn.init.zeros_(outer.weight)
        nn.init.zeros_(outer.bias)

    def forward(self, x):
        return self.layers(x.float())


class Discriminator:
    """Tells the original model's latents from the online model's. It judges the picture and not the
    prompt: at the sampler's least noisy timestep, with the null prompt (an Embedding)."""

    def __init__(self, pipe, plan, null, rank):
        self.pipe, self.null = pipe, null
        self.timestep = plan.steps[-1].t
        self.head = Head(pipe.unet.config.out_channels).to(pipe.unet.device)
        # SDXL's null prompt is a zero embedding, on which cross-attention adds nothing
        attends = not pipe.config.get("force_zeros_for_empty_prompt")
        adapter = diffusion.add_adapter(pipe.unet, ADAPTER, rank, cross_attention=attends)
        self.parameters = [*adapter, *self.head.parameters()]

    def active(self):
        """Around its passes, forwards and backwards: the UNet runs with its adapter."""
        return diffusion.adapter(self.pipe.unet, ADAPTER)

    def logits(self, latents):
        """One logit per latent pixel, (B, 1, h, w): positive where the latents (B, 4, h, w) look
        like the original model's."""
        null = self.null.expand(len(latents))
        return self.head(diffusion.predict(self.pipe, latents, self.timestep, null))

    def generator_loss(self, z, images=None, prompts=None):
        """The online model's side: how well its latents (B, 4, h, w) pass for real ones."""
        return losses.generator_loss(self.logits(z))

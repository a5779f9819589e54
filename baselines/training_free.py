"""Training-free methods that CoMat is compared with: other samplers of the same model.

    structured                  Feng et al. 2023 (arXiv 2212.05032)
    syngen                      Rassin et al. 2023 (arXiv 2306.08877)
    attend-and-excite           Chefer et al. 2023 (arXiv 2301.13826), without its refinement
    attend-and-excite-refined   the same with it
    random-direction            a control: the first one's steps, as long, in a random direction

Each takes and returns what `diffusion.sample` does, so that it goes with any adapter. The authors'
step numbers out of 50 are shares of T here. The entity finder chooses nouns and attributes.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torchvision.transforms.functional as TF

import attention
import diffusion
from entities import find_all, fit, load_parser

ROWS = 16  # of the attention maps that the authors look at, at 512 px

# --------------------------------------------------------------------------------------------------
# Gradient steps on the latents


@dataclass
class Nudge:
    """For diffusion.sample: moves what the UNet sees against the gradient of loss(maps) (B,) before
    each of the first `until` of the steps. maps: (B, h, w, tokens), see mean_maps.

    The step at i is step_size * sqrt(f_i), f falling linearly from 1 to `decay` over all steps.
    goals {share of the steps: value}: there an image makes more steps, at most `tries`, until its
    loss is no larger. The images of a batch do not see each other. at_random: steps as long, in a
    random direction."""

    pipe: object
    plan: diffusion.Schedule
    text: diffusion.Text
    loss: object
    step_size: float = 20.0
    until: float = 0.5
    decay: float = 1.0
    goals: dict = field(default_factory=dict)
    tries: int = 20
    at_random: bool = False

    def __call__(self, i, z):
        steps = self.plan.steps
        if i >= self.until * len(steps):
            return z
        part = i / max(1, len(steps) - 1)
        factor = 1 + (self.decay - 1) * part
        size = self.step_size * factor**0.5
        x = z * steps[i].scale
        values, gradient = self.look(x, steps[i].t)
        goals = {round(share * len(steps)): value for share, value in self.goals.items()}
        for _ in range(self.tries if i in goals else 0):
            behind = values > goals[i]
            if not behind.any():
                break
            x = x - size * behind.view(-1, 1, 1, 1) * gradient
            values, gradient = self.look(x, steps[i].t)
        return (x - size * gradient) / steps[i].scale

    @torch.enable_grad()
    def look(self, x, t):
        """(the loss (B,), its gradient (B, 4, h, w)) at what the UNet sees."""
        unet = self.pipe.unet
        x = x.detach().requires_grad_()
        with attention.capture(unet, attention.all_blocks(unet)) as captured:
            diffusion.predict(self.pipe, x, t, self.text.prompt)
        batch, _, height, width = x.shape
        maps = mean_maps(captured, batch, width / height)
        values = self.loss(maps)
        (gradient,) = torch.autograd.grad(values.sum(), x)
        if self.at_random:
            generator = torch.Generator().manual_seed(round(t))
            noise = torch.randn(x.shape[1:], generator=generator).to(x)
            lengths = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True)
            gradient = lengths * noise / noise.norm()
        return values.detach(), gradient


def mean_maps(captured, batch, aspect):
    """Attention (B, h, w, tokens), the mean over heads and layers: of those with the least rows
    that are at least ROWS, or, where all have less, with the most."""
    rows = {}
    for name, layer in captured.items():
        pixels = layer["query"].shape[1]
        rows[name] = round((pixels / aspect) ** 0.5)
    enough = [count for count in rows.values() if count >= ROWS]
    chosen = min(enough) if enough else max(rows.values())
    layers = {}
    for name, layer in captured.items():
        if rows[name] == chosen:
            layers[name] = layer
    maps = attention.attention_maps(layers, batch, aspect)
    over_heads = [layer.mean(1) for layer in maps.values()]
    return torch.stack(over_heads).mean(0)


# --------------------------------------------------------------------------------------------------
# Losses of attention maps (B, h, w, tokens) -> (B,)


def neglect(maps, nouns):
    """1 - the largest attention, over the smoothed map, of the noun that has least (Attend-and-
    Excite, eq. 1). Attention is normalised anew without the start token, by a sharp softmax.

    nouns: (B, tokens), whether a token is a noun's. A prompt without one has 0."""
    sharp = 100 * maps[..., 1:-1]
    shares = sharp.softmax(-1).movedim(-1, 1)
    smooth = TF.gaussian_blur(shares, 3, 0.5**0.5)  # the official 0.5, whose exponent lacks a half
    largest = smooth.amax((2, 3))
    of_nouns = largest.where(nouns[:, 1:-1], 1.0)
    return 1 - of_nouns.amin(1)


def misbinding(maps, pairs, words):
    """For each attribute the distance of its map from its noun's, minus the mean distance of both
    from all other words (SynGen, eqs. 3 and 4).

    pairs: per prompt [(noun's token, its attributes' tokens)]; words: per prompt all tokens."""
    losses = []
    for distances, own, every in zip(symmetric_kl(maps), pairs, words):
        total = 0 * distances.sum()
        for noun, attributes in own:
            others = [word for word in every if word != noun and word not in attributes]
            for attribute in attributes:
                total = total + distances[attribute, noun]
                if others:
                    total = total - distances[[attribute, noun]][:, others].mean()
        losses.append(total)
    return torch.stack(losses)


def symmetric_kl(maps):
    """(KL(p | q) + KL(q | p)) / 2 of each two tokens' maps, normalised: (B, tokens, tokens)."""
    p = maps.flatten(1, 2).mT + 1e-9
    p = p / p.sum(2, keepdim=True)
    crossed = p @ p.log().mT
    own = crossed.diagonal(dim1=1, dim2=2)
    both = crossed + crossed.mT
    return (own[:, :, None] + own[:, None] - both) / 2


# --------------------------------------------------------------------------------------------------
# The methods


def attend_and_excite(pipe, plan, text, *how, parser=None, **settings):
    """Chefer et al. 2023: no noun may be neglected."""
    tokens = text.prompt.tokens
    nouns = torch.zeros(tokens.shape[:2], dtype=bool, device=tokens.device)
    for row, entities in zip(nouns, find_all(text.prompts, parser, pipe.tokenizer)):
        for entity in entities:
            row[list(entity.noun_tokens)] = True
    nudge = Nudge(pipe, plan, text, partial(neglect, nouns=nouns), **settings)
    return diffusion.sample(pipe, plan, text, *how, nudge=nudge)


def syngen(pipe, plan, text, *how, parser=None, **settings):
    """Rassin et al. 2023: a noun's map is that of its attributes, and of no other word."""
    pairs, words = [], []
    found = find_all(text.prompts, parser, pipe.tokenizer)
    for prompt, entities in zip(text.prompts, found):
        _, offsets = fit(prompt, pipe.tokenizer)
        words.append(range(1, len(offsets) - 1))
        pairs.append([])
        for entity in entities:
            attributes = set(entity.tokens) - set(entity.noun_tokens)
            pairs[-1].append((entity.noun_tokens[-1], sorted(attributes)))
    loss = partial(misbinding, pairs=pairs, words=words)
    nudge = Nudge(pipe, plan, text, loss, **settings)
    return diffusion.sample(pipe, plan, text, *how, nudge=nudge)


def structured(pipe, plan, text, *how, parser=None):
    """Feng et al. 2023: the keys are the prompt's; the values are the mean over the prompt's and
    those in which one noun phrase has been read alone. Values are linear in the embeddings, so the
    mean of the embeddings gives them at no cost."""
    means = [versions.mean(0) for versions in embedding_versions(pipe, text, parser)]
    with values_from(pipe.unet, torch.stack(means)):
        return diffusion.sample(pipe, plan, text, *how)


def embedding_versions(pipe, text, parser=None):
    """Per prompt (1 + phrases, L, dim): as it is, and with one noun phrase read alone."""
    found = find_all(text.prompts, parser, pipe.tokenizer)
    for prompt, entities, whole in zip(text.prompts, found, text.prompt.tokens):
        _, offsets = fit(prompt, pipe.tokenizer)
        versions = [whole]
        for entity in entities:
            first, last = entity.tokens[0], entity.tokens[-1]
            phrase = prompt[offsets[first][0] : offsets[last][1]]
            alone = diffusion.encode(pipe, [phrase]).prompt.tokens[0]
            version = whole.clone()
            version[first : last + 1] = alone[1 : last - first + 2]  # after its start token
            versions.append(version)
        yield torch.stack(versions)


@contextmanager
def values_from(unet, embeddings):
    """Within the context the prompts' cross-attention takes its values from other embeddings (B, L,
    dim). With guidance the batch is 2 B, the null prompt first: that half stays."""

    def swap(module, inputs):
        null = inputs[0][: -len(embeddings)]
        return torch.cat([null, embeddings.to(null.dtype)])

    layers = attention.cross_attention_layers(unet, attention.all_blocks(unet))
    handles = [layer.to_v.register_forward_pre_hook(swap) for layer in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


EXCITE = {"step_size": 20.0, "until": 0.5, "decay": 0.5}
METHODS = {  # a method's keywords are its settings
    "structured": partial(structured),
    "syngen": partial(syngen, step_size=20.0, until=0.5),
    "attend-and-excite": partial(attend_and_excite, **EXCITE),
    "attend-and-excite-refined": partial(
        attend_and_excite, **EXCITE, goals={0.0: 0.95, 0.2: 0.5, 0.4: 0.2}, tries=20
    ),
    "random-direction": partial(attend_and_excite, **EXCITE, at_random=True),
}


def check(names):
    """Raises ValueError if a method is not one of METHODS."""
    if unknown := set(names) - set(METHODS):
        raise ValueError(f"--method {min(unknown)}: unknown, there are {', '.join(METHODS)}")


def describe(name):
    """A method and its settings in words."""
    return f"{name} {METHODS[name].keywords}" if name else "none"


def sides(adapters, methods, parser):
    """{label: (adapter, sampler)} of {label: adapter}: each adapter with the plain sampler, then
    with each of the methods. parser: the name of a spaCy pipeline."""
    samplers = {"": diffusion.sample}
    for name in methods:
        samplers[f"+{name}"] = partial(METHODS[name], parser=load_parser(parser))
    pairs = {}
    for suffix, sampler in samplers.items():
        for label, adapter in adapters.items():
            pairs[label + suffix] = adapter, sampler
    return pairs

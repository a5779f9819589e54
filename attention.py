"""Capture of cross-attention maps, by module and by name, in one forward pass.

Nothing is swapped and nothing slows down: two forward hooks keep a layer's queries and keys while
SDPA computes its output as always, and the probabilities softmax(QK^T / sqrt(d)) are made from them
afterwards, by whoever asks. Outside the context no hook exists. Layers are found by the name of
their block, so any resolution and any UNet works.
"""

from contextlib import contextmanager
from functools import partial

import torch


def all_blocks(unet):
    """Names of the UNet's blocks that have cross-attention, sorted."""
    layers = [name for name, _ in unet.named_modules() if name.endswith("attn2")]
    return sorted({name.split(".attentions")[0] for name in layers})


def cross_attention_layers(unet, blocks):
    """The cross-attention modules of the named blocks ("mid_block", "up_blocks.0") as
    {name: module}, in the UNet's order. Raises ValueError if a block has none."""
    missing = set(blocks) - set(all_blocks(unet))
    if missing:
        raise ValueError(
            f"--attention-blocks: {min(missing)!r} has no cross-attention; this UNet has it in "
            f"{', '.join(all_blocks(unet))}"
        )
    prefixes = tuple(f"{block}." for block in blocks)
    modules = unet.named_modules()
    return {n: m for n, m in modules if n.endswith("attn2") and n.startswith(prefixes)}


@contextmanager
def capture(unet, blocks):
    """Within the context every forward pass of `unet` refills the yielded dict
    {layer name: {"query", "key", "heads", "scale"}}."""
    captured, handles = {}, []

    def keep(record, name, module, inputs, output):
        record[name] = output

    for name, layer in cross_attention_layers(unet, blocks).items():
        record = captured[name] = {"heads": layer.heads, "scale": layer.scale}
        handles.append(layer.to_q.register_forward_hook(partial(keep, record, "query")))
        handles.append(layer.to_k.register_forward_hook(partial(keep, record, "key")))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def attention_maps(captured, batch, aspect=1.0):
    """{layer name: attention probabilities (batch, heads, h, w, tokens)}, fp32, of the last `batch`
    samples of the pass (with guidance: the prompts, not the null prompt), normalised over all text
    tokens. aspect: the image's width / height."""
    maps = {}
    for name, layer in captured.items():
        query = split_heads(layer["query"][-batch:], layer["heads"])
        key = split_heads(layer["key"][-batch:], layer["heads"])
        scores = query @ key.transpose(-1, -2)
        probabilities = (layer["scale"] * scores).softmax(-1)
        pixels = query.shape[2]
        height = round((pixels / aspect) ** 0.5)
        maps[name] = probabilities.unflatten(2, (height, -1))
    return maps


def split_heads(x, heads):
    """(B, n, heads * d) -> (B, heads, n, d), fp32."""
    split = x.float().unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


@torch.no_grad()
def token_activation(maps):
    """Mean cross-attention per token over space, heads and layers: (B, tokens), of sum 1."""
    layers = [layer.mean((1, 2, 3)) for layer in maps.values()]
    return torch.stack(layers).mean(0)


def entity_activation(activations, entities):
    """Mean activation of the tokens of a prompt's entities, nouns and attributes alike: (B,), NaN
    where a prompt has none. activations: (B, tokens); entities: per prompt a list of Entity."""
    means = []
    for row, own in zip(activations.cpu(), entities):
        tokens = []
        for entity in own:
            tokens += entity.tokens
        means.append(row[tokens].mean())
    return torch.stack(means)

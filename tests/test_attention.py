"""Captured maps equal a softmax computed by hand, and capturing leaves no trace."""

import dataclasses
import math
import re

import pytest
import torch
from conftest import BLOCKS, PROMPTS, tiny_pipeline

import attention
import config
import diffusion
import images
from entities import Entity


@pytest.fixture(scope="module")
def world():
    pipe, _ = tiny_pipeline()
    text = diffusion.encode(pipe, PROMPTS)
    generator = torch.Generator().manual_seed(0)
    return pipe, text, torch.randn(2, 4, 16, 8, generator=generator)  # not square


@torch.no_grad()
def guided_pass(pipe, text, z):
    return diffusion.predict(pipe, torch.cat([z, z]), 500, text.both())


def captured_maps(pipe, text, z, blocks=BLOCKS):
    with attention.capture(pipe.unet, blocks) as captured:
        guided_pass(pipe, text, z)
    return list(attention.attention_maps(captured, len(z), aspect=0.5).values())


def weight(linear):
    """A projection's weight with its LoRA (alpha = rank) added."""
    up, down = linear.lora_B[diffusion.ADAPTER].weight, linear.lora_A[diffusion.ADAPTER].weight
    return (linear.base_layer.weight + up @ down).detach()


def by_hand(layer, hidden, words):
    """softmax(Q K^T / sqrt(d)), one head at a time: (batch, heads, queries, tokens)."""
    d = layer.to_q.base_layer.out_features // layer.heads
    q, k = hidden @ weight(layer.to_q).T, words @ weight(layer.to_k).T
    heads = [slice(h * d, (h + 1) * d) for h in range(layer.heads)]
    return torch.stack([(q[..., h] @ k[..., h].mT / d**0.5).softmax(-1) for h in heads], 1)


def test_maps_equal_a_plain_softmax_of_the_prompts_half(world):
    layers = attention.cross_attention_layers(world[0].unet, BLOCKS)
    seen, handles = {}, []

    def see(layer, arguments, options):
        seen[layer] = arguments[0], options["encoder_hidden_states"]

    for layer in layers.values():
        handles.append(layer.register_forward_pre_hook(see, with_kwargs=True))
    maps = captured_maps(*world)
    for handle in handles:
        handle.remove()
    assert len(maps) == len(layers) >= 3
    for found, layer in zip(maps, layers.values()):
        expected = by_hand(layer, *seen[layer])
        assert found.shape == (2, layer.heads, 8, 4, 77)
        torch.testing.assert_close(found.flatten(2, 3), expected[2:], rtol=1e-5, atol=1e-6)
        assert (expected[:2] - expected[2:]).abs().max() > 1e-3  # the null prompt's differ
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))


def test_rows_and_columns_are_the_images(world):
    """What changes far down in the image changes far down in the map."""
    pipe, text, z = world
    changed = z.clone()
    changed[:, :, -2:] += 3  # the last rows
    before, after = (captured_maps(pipe, text, x, ("up_blocks.0",))[0] for x in (z, changed))
    moved = (after - before).abs().sum((0, 1, 3, 4))  # per row
    assert moved.argmax() >= len(moved) - 2


def hooks(unet):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


def test_capture_changes_no_output_and_leaves_no_hook(world):
    unet, plain, before = world[0].unet, guided_pass(*world), hooks(world[0].unet)
    with attention.capture(unet, BLOCKS):
        assert hooks(unet) > before
        assert torch.equal(guided_pass(*world), plain)
    assert hooks(unet) == before
    with pytest.raises(RuntimeError), attention.capture(unet, BLOCKS):
        raise RuntimeError
    assert hooks(unet) == before


def test_only_the_named_blocks_are_captured(world):
    with attention.capture(world[0].unet, ("mid_block",)) as captured:
        guided_pass(*world)
    assert captured and all(name.startswith("mid_block.") for name in captured)
    with attention.capture(world[0].unet, ()) as captured:
        guided_pass(*world)
    assert captured == {}


def test_a_block_without_cross_attention_is_named_with_those_that_have_it(world):
    flags = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(config.Config)}
    message = r"up_blocks\.1.*mid_block.*up_blocks\.0"
    with pytest.raises(ValueError, match=message) as caught:
        attention.cross_attention_layers(world[0].unet, ("mid_block", "up_blocks.1"))
    assert set(re.findall(r"--[a-z-]+", str(caught.value))) <= flags


def test_the_gradient_flows_through_the_maps_into_the_adapter(world):
    pipe, text, z = world
    with attention.capture(pipe.unet, BLOCKS) as captured:
        diffusion.predict(pipe, torch.cat([z, z]), 500, text.both())
    *_, last = attention.attention_maps(captured, 2, aspect=0.5).values()
    last[..., 3].sum().backward()
    gradients = {n: p.grad for n, p in pipe.unet.named_parameters() if p.grad is not None}
    pipe.unet.zero_grad()
    assert all(f".{diffusion.ADAPTER}." in name for name in gradients)
    assert any("to_q" in n and g.abs().max() > 0 for n, g in gradients.items())


def test_activations(world):
    activations = attention.token_activation(dict(enumerate(captured_maps(*world))))
    assert activations.shape == (2, 77)
    torch.testing.assert_close(activations.sum(-1), torch.ones(2))
    two = [Entity("circle", ("red",), (2, 3), (3,)), Entity("ring", (), (7,), (7,))]
    mean, none = attention.entity_activation(activations, [two, []]).tolist()
    assert mean == pytest.approx(activations[0, [2, 3, 7]].mean().item()) and math.isnan(none)


def test_the_share_of_a_map_inside_a_mask():
    corner = torch.zeros(4, 4)
    corner[0, 0] = 1
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    assert images.share_inside(corner, left) == pytest.approx(1)
    assert images.share_inside(corner, 1 - left) == pytest.approx(0)
    assert images.share_inside(torch.ones(4, 4), left) == pytest.approx(0.5)
    assert math.isnan(images.share_inside(corner, 0 * left))

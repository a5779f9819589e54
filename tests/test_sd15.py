"""Stable Diffusion 1.5's architecture, tiny and random, through the same functions: one text encoder, no size conditioning."""

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import diffusion
import pretrain


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    tokenizer = pretrain.build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
    ).save_pretrained(tmp_path / "sd")
    return str(tmp_path / "sd")


def test_sample_and_replay_and_a_lora_that_the_stock_pipeline_loads(folder, tmp_path):
    pipe = diffusion.load(folder)
    plan = diffusion.schedule(pipe.scheduler, 4)
    parameters = diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, 2)
    text = diffusion.encode(pipe, ["a red circle", "a blue ring"])
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    z, states = diffusion.sample(
        pipe,
        plan,
        text,
        diffusion.initial_noise(pipe, (16, 16), generators),
        generators,
        5.0,
        [0, 2],
    )
    assert z.shape == (2, 4, 8, 8) and sorted(states) == [0, 2]
    seen = []
    diffusion.replay(
        pipe,
        plan,
        text,
        states,
        torch.ones_like(z),
        5.0,
        [2],
        ["up_blocks.1"],
        lambda maps: seen.extend(maps) or sum(m[..., 1].mean() for m in maps),
    )
    assert seen and all(m.shape == (2, 2, 8, 8, 77) for m in seen)
    assert all(p.grad.abs().sum() > 0 for p in parameters[1::2])  # every lora_B
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    models.save_adapter(pipe, tmp_path / "lora", diffusion.ADAPTER)

    stock = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, scheduler=pipe.scheduler
    )

    def draw():
        return stock(
            "a red circle",
            height=16,
            width=16,
            num_inference_steps=4,
            guidance_scale=5.0,
            output_type="latent",
            generator=[torch.Generator().manual_seed(0)],
        ).images

    base = draw()
    stock.load_lora_weights(tmp_path / "lora")
    generators = [torch.Generator().manual_seed(0)]
    ours, _ = diffusion.sample(
        pipe,
        plan,
        diffusion.encode(pipe, ["a red circle"]),
        diffusion.initial_noise(pipe, (16, 16), generators),
        generators,
        5.0,
    )
    torch.testing.assert_close(draw(), ours, rtol=1e-3, atol=1e-3)
    assert (draw() - base).abs().max() > 1e-2

"""What saves time or memory leaves the gradient as it is: judging in parts, checkpointing, merged sampling, torch.compile."""
import pytest
import torch
from conftest import ALL_LOSSES, randomise, small_config

import diffusion
import discriminator
import train


def gradients_of_a_step(folder, prepare=lambda run: None, **changes):
    """(the gradients that both optimisers would get in one step, what it logged), with adapters that do something."""
    run = train.setup(small_config(folder, **{**ALL_LOSSES, "adversarial_cap": 0.5, **changes}))
    randomise(run.parameters, 5)
    randomise(run.discriminator_parameters, 6)
    prepare(run)
    found = []
    for optimizer in (run.optimizer, run.discriminator_optimizer):
        optimizer.register_step_pre_hook(
            lambda o, *_: found.extend(p.grad.clone() for group in o.param_groups for p in group["params"]))
    log = train.train_step(run)
    return found, log


@pytest.fixture
def plain(tmp_path):
    return gradients_of_a_step(tmp_path)


def same(found, expected):
    (gradients, log), (wanted, logged) = found, expected
    assert len(gradients) == len(wanted) >= 100 and log.keys() == logged.keys()
    for a, b in zip(gradients, wanted):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6
    for key, value in logged.items():
        assert log[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_judging_image_by_image_is_judging_all_at_once(tmp_path, plain):
    asked = []
    def prepare(run):
        decoder = run.pipe.vae.decoder
        decoder.register_forward_hook(lambda m, inputs, output: asked.append(len(output)))
    same(gradients_of_a_step(tmp_path, prepare, judge_batch=1), plain)
    assert asked == [1, 1]


def test_checkpointing_recomputes_with_the_right_adapter(tmp_path, plain):
    passes = []
    def prepare(run):
        run.pipe.unet.mid_block.resnets[-1].register_forward_pre_hook(lambda *_: passes.append(1))
    same(gradients_of_a_step(tmp_path, prepare, checkpointing=True), plain)
    c = small_config(tmp_path)
    without = c.num_steps * 2 + c.grad_steps + 2  # references are cached: the fixture drew them
    assert len(passes) > without - c.num_steps


def test_merged_sampling_is_the_adapters_and_leaves_the_weights_alone(tmp_path):
    run = train.setup(small_config(tmp_path, adversarial_weight=1.0))
    randomise(run.parameters, 5)
    randomise(run.discriminator_parameters, 6)
    before = {n: p.detach().clone() for n, p in run.pipe.unet.named_parameters()}
    z, text = torch.randn(2, 4, 16, 16), diffusion.encode(run.pipe, ["a red ring", "a blue cross"], run.empty)
    outputs = []
    with torch.no_grad():
        for context in (diffusion.adapter, diffusion.merged):
            with context(run.pipe.unet, diffusion.ADAPTER):
                outputs.append(diffusion.guided(run.pipe, run.plan, 0, z, text, 2.0))
        with diffusion.adapter(run.pipe.unet, None):
            base = diffusion.guided(run.pipe, run.plan, 0, z, text, 2.0)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    assert (outputs[0] - base).abs().max() > 0.01
    assert all(torch.equal(p, before[n]) for n, p in run.pipe.unet.named_parameters())
    assert run.pipe.unet.active_adapters() == [diffusion.ADAPTER]
    with pytest.raises(KeyError), diffusion.merged(run.pipe.unet, diffusion.ADAPTER):
        raise KeyError
    assert all(torch.equal(p, before[n]) for n, p in run.pipe.unet.named_parameters())


def test_a_step_with_merged_sampling_has_the_same_gradient(tmp_path, plain):
    same(gradients_of_a_step(tmp_path, merge=True), plain)


def test_compiled_blocks_give_the_same_and_are_compiled_once(tmp_path, plain):
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    same(gradients_of_a_step(tmp_path, compile=True), plain)
    torch._dynamo.reset()
    run = train.setup(small_config(tmp_path, **ALL_LOSSES, compile=True))
    graphs = []
    for run.step in range(4):
        train.train_step(run)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1] == graphs[3], graphs


class Recorder(torch.nn.Linear):
    """A module that says it is elsewhere and writes down where it is sent."""

    def __init__(self, where):
        super().__init__(1, 1)
        self.where, self.sent = torch.device(where), []

    def parameters(self):
        return iter([type("P", (), {"device": self.where})()])

    def to(self, device):
        self.where = torch.device(device)
        self.sent.append(str(device))


def test_parked_models_visit_and_go_back():
    parked, resident, gpu = Recorder("cpu"), Recorder("cuda"), torch.device("cuda")
    with pytest.raises(KeyError), diffusion.visiting(gpu, parked, resident, None):
        assert parked.where == gpu
        raise KeyError
    assert parked.sent == ["cuda", "cpu"] and resident.sent == []


def test_no_adapter_where_the_empty_prompt_is_zero(tmp_path):
    run = train.setup(small_config(tmp_path, adversarial_weight=1.0))
    names = [n for n, _ in run.pipe.unet.named_parameters() if f".{discriminator.ADAPTER}." in n]
    assert run.pipe.config.force_zeros_for_empty_prompt and not run.empty.unconditional[0].any()
    assert names and not any("attn2" in n for n in names)
    assert any("attn2" in n for n, _ in run.pipe.unet.named_parameters() if f".{diffusion.ADAPTER}." in n)
    run.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    run.pipe.unet.delete_adapters(discriminator.ADAPTER)
    assert len(discriminator.add_adapter(run.pipe, 2)) == 2 * len(names)

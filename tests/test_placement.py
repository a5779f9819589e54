"""Without a GPU: no function of torch would get tensors of two devices, in a run and after it.

A pretended GPU: all tensors are the CPU's and every value is true, but what is made on "cuda" or
moved there, and what is computed from that, is marked; a function that gets both kinds raises, as
on a GPU. A GPU's kernels, memory, streams and loading of files are not seen."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import ALL_LOSSES, PROMPTS, small_config, watched_step
from torch.overrides import TorchFunctionMode

import build
import evaluate
import sample
import train
import utils
from config import Config

if not "2.11" <= torch.__version__ < "2.15":
    pytest.skip("the pretended GPU replaces private functions of torch", allow_module_level=True)

CUDA, T = torch.device("cuda:0"), torch.Tensor
CROSSING = T.copy_, T.data.__set__, torch._has_compatible_shallow_copy_type
INDEXING = T.__getitem__, T.__setitem__, T.index_put_  # the indices may be the CPU's
JOINING = torch.cat, torch.stack  # all others take single numbers of the CPU


def tensors(tree):
    """Those in nested lists, tuples and dictionaries."""
    if isinstance(tree, T):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    nested = isinstance(tree, (dict, list, tuple))
    return [x for part in parts for x in tensors(part)] if nested else []


def on_gpu(x):
    return getattr(x.untyped_storage(), "on_gpu", False)


class Places(TorchFunctionMode):
    """Says where tensors are, moves them, checks that all of a function's are in one place."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tensors([args, kwargs])
        gpu = any(map(on_gpu, inputs))
        if function == T.device.__get__:
            return CUDA if gpu else function(*args)
        if function == T.is_cuda.__get__:
            return gpu
        if function in (T.to, T.cpu):
            return move(*args, **kwargs) if function is T.to else move(*args, "cpu")
        check(function, args, inputs)
        if function is T.copy_:
            gpu = on_gpu(args[0])
        device = torch.device(kwargs.get("device") or "meta")
        if device.type != "meta":
            gpu = device.type == "cuda"
            kwargs = kwargs | {"device": "cpu"}
        output = function(*args, **kwargs)
        for x in tensors(output) if gpu else ():
            x.untyped_storage().on_gpu = True
        return output


def move(x, *where, copy=False, **options):
    """Tensor.to: a device, a dtype, both, or another tensor, which has both."""
    gpu = on_gpu(x)
    if where and isinstance(where[0], T):
        gpu, where = on_gpu(where[0]), (where[0].dtype,)
    device, dtype, *_ = torch._C._nn._parse_to(*where, **options)
    if device and device.type == "meta":
        return x.to(device, dtype)
    if device:
        gpu = device.type == "cuda"
    moved = x.to(dtype or x.dtype, copy=copy or gpu != on_gpu(x))
    moved.untyped_storage().on_gpu = gpu
    return moved


def check(function, args, inputs):
    """Raises RuntimeError, as torch on a GPU does, if the inputs are of two devices."""
    here = [x for x in inputs if not on_gpu(x) and (x.dim() or function in JOINING)]
    there = [x for x in inputs if on_gpu(x)]
    allowed = function in CROSSING or function in INDEXING and on_gpu(args[0])
    if here and there and not allowed or there and function in (T.numpy, T.__array__):
        shapes = [[tuple(x.shape) for x in place] for place in (here, there)]
        raise RuntimeError(f"{function.__name__}: on the CPU {shapes[0]}, on the GPU {shapes[1]}")


@contextmanager
def pretended_gpu():
    places, backward = Places(), torch.autograd._engine_run_backward

    def run_backward(*args, **kwargs):
        with places:  # a checkpointed block runs again
            return backward(*args, **kwargs)

    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns  # also of devices
    card = {"is_available": lambda: True, "device_count": lambda: 1}
    card |= {"set_device": lambda index: None, "synchronize": lambda: None}
    with (
        mock.patch.multiple(torch.cuda, **card),
        mock.patch.object(torch.accelerator, "current_accelerator", lambda **_: None),
        mock.patch.object(torch.autograd, "_engine_run_backward", run_backward),
        mock.patch.dict(checks, default=T.size),
        mock.patch.object(torch, "set_num_threads"),
        places,
    ):
        yield


PLACES = {"cpu": nullcontext, "cuda": pretended_gpu}


def step_on(device, folder, **changes):
    """(the gradients that the optimiser gets; what the step logs)."""
    changes = {**ALL_LOSSES, "adversarial_cap": 0.5, "device": device, **changes}
    with PLACES[device]():
        run = build.setup(small_config(folder / device, **changes))
        run.measuring = True
        gradients, log = watched_step(run)
        assert {gradient.device.type for gradient in gradients} == {device}
    return gradients, log


@pytest.mark.parametrize("changes", [{}, {"merge": False, "checkpointing": True}], ids=str)
def test_a_step_mixes_no_devices(tmp_path, changes):
    gradients, log = step_on("cuda", tmp_path, **changes)
    expected, expected_log = step_on("cpu", tmp_path, **changes)
    assert all(map(torch.equal, gradients, expected))
    assert log == expected_log and "lora_gradient_norm_pixel" in log


def test_a_run_its_resumption_its_images_and_scores_mix_no_devices(tmp_path):
    c = small_config(tmp_path, **ALL_LOSSES, device="cuda", steps=1, sample_every=2)
    drawing = {"prompt": PROMPTS[:1], "attention": True, "to": tmp_path / "images"}
    with pretended_gpu():
        train.main(c)
        resumed = build.begin(replace(c, steps=2, resume=True))
        train.train(resumed)
        sample.main(sample.Options(c.out, **drawing))
        evaluate.main(evaluate.Options(c.out, count=2))
        momenta = [state["exp_avg"] for state in resumed.optimizer.state.values()]
        assert {tensor.device.type for tensor in momenta} == {"cuda"}
    assert (tmp_path / "images/000-attention.png").exists()
    assert (c.out / "results.json").exists()


def test_what_is_left_on_the_cpu_is_noticed(tmp_path, monkeypatch):
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, device=None, **more: tensor(*args, **more))
    with pytest.raises(RuntimeError, match="on the CPU"):
        step_on("cuda", tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_rank_has_its_own_gpu_and_float32_is_no_tf32(monkeypatch, dtype):
    chosen, c = [], Config(dtype=dtype)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    card = {"is_available": lambda: True, "device_count": lambda: 2, "set_device": chosen.append}
    with mock.patch.multiple(torch.cuda, **card), utils.without_tf32():
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert utils.choose_device(c) == torch.device("cuda:1") and chosen == [1]
        assert matmul.allow_tf32 == cudnn.allow_tf32 == (dtype == "bfloat16")
        with utils.without_tf32():
            assert not matmul.allow_tf32 and not cudnn.allow_tf32
        assert matmul.allow_tf32 == cudnn.allow_tf32 == (dtype == "bfloat16")
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(ValueError, match="torch sees 2 GPUs here; start at most as many ranks"):
            utils.choose_device(c)

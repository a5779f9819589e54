"""What goes wrong on the way, each fault of docs/faults.md: kills, full disks, bad numbers, ranks
that are lost or disagree."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ALL_LOSSES, ROOT, command, forked, randomise, same, small_config
from safetensors.torch import load_file

import config as configuration
import diffusion
import discriminator
import losses
import rewards
import train
import utils
from prompts import batch_of

OPTIONS = {
    **ALL_LOSSES,
    "beta1": 0.5,
    "warmup": 1,
    "lr_end": 0.5,
    "steps": 3,
    "num_steps": 2,
    "grad_steps": 1,
    "checkpoint_every": 1,
    "eval_prompts": "",
}


def state_of(out):
    """All that a run has learned and logged, but for seconds and memory."""
    newest = utils.newest_checkpoint(out)
    rows = [json.loads(line) for line in open(out / "log.jsonl")]
    for row in rows:
        for name in [name for name in row if "seconds" in name or "memory" in name]:
            del row[name]
    state = torch.load(newest / "state.pt", weights_only=True)
    weights = [load_file(path) for path in sorted(newest.glob("*.safetensors"))]
    assert len(weights) == 2
    return newest.name, state, weights, rows


def finished(c, straight):
    """Whether a run resumed with `c` ends exactly as the run that nothing interrupted."""
    train.main(replace(c, resume=True))
    return same(state_of(c.out), state_of(straight))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run of three steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    train.main(small_config(folder, **OPTIONS))
    name, state, (head, lora), rows = state_of(folder / "run")
    assert name == "step-000003" and state["step"] == 3 and state["optimizer"]["state"]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert any(w.abs().max() > 0 for key, w in lora.items() if "lora.up" in key or "lora_B" in key)
    return folder / "run"


@pytest.fixture
def copied(tmp_path, straight):
    """The configuration that resumes a copy of that run."""
    shutil.copytree(straight, tmp_path / "run", symlinks=True)
    return small_config(tmp_path, **OPTIONS, resume=True)


# --------------------------------------------------------------------------------------------------
# Kills


def strike(number):
    os.kill(os.getpid(), number)


def is_third_reference(source, target):
    return len(list(target.parent.glob("*.safetensors"))) == 2


def is_half_deleted(path, **options):
    if "discarded" in path.name:
        (path / "state.pt").unlink()
        return True


SECOND = "step-000002"
KILLED = {  # the call in whose place kill -9 strikes
    "before the save": (utils, "save_checkpoint", lambda run: run.step == 2),
    "inside the save": (discriminator, "save_file", lambda _, path: SECOND in str(path)),
    "between the save and its link": (Path, "symlink_to", lambda _, target: target == SECOND),
    "while an old checkpoint is deleted": (shutil, "rmtree", is_half_deleted),
    "while a reference is written": (Path, "replace", is_third_reference),
}


@pytest.mark.parametrize("where", KILLED)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, straight, where):
    """A queue may always run the same command: --resume also starts."""
    keep = 1 if "old" in where else 3
    c = small_config(tmp_path, **OPTIONS, keep=keep, resume=True)

    def body():
        owner, name, is_time = KILLED[where]
        plain = getattr(owner, name)

        def call(*args, **options):
            if is_time(*args, **options):
                strike(signal.SIGKILL)
            return plain(*args, **options)

        setattr(owner, name, call)
        train.main(c)

    (ended,) = forked(body)
    assert ended.code == -signal.SIGKILL, ended.output
    assert finished(c, straight)
    names = sorted(path.name for path in (c.out / "checkpoints").iterdir())
    assert names == ["latest", *["step-000001", "step-000002", "step-000003"][-keep:]]


@pytest.mark.slow
def test_random_kills_leave_no_trace(tmp_path):
    kills, rng = int(os.environ.get("KILLS", 12)), random.Random(int(os.environ.get("SEED", 0)))
    changes = OPTIONS | {"steps": kills, "keep": 2, "resume": True}
    straight = small_config(tmp_path / "straight", **changes)
    start = time.monotonic()
    run = train.begin(straight)
    begun = time.monotonic()
    train.train(run)
    step_seconds = (time.monotonic() - begun) / kills
    limit = begun - start + 2 * step_seconds
    c = small_config(tmp_path / "broken", **changes)
    ends = [forked(lambda: train.main(c), timeout=rng.uniform(0, limit)) for _ in range(kills)]
    assert sum(ended.code == -signal.SIGKILL for (ended,) in ends) > kills / 2, ends
    assert finished(c, straight.out)


def before_step(number, action):
    """Lets train_step call action(run) first at one step."""
    plain = train.train_step

    def step(run):
        if run.step == number:
            action(run)
        return plain(run)

    train.train_step = step


def test_sigterm_ends_the_step_saves_and_exits_with_zero(tmp_path, straight):
    c = small_config(tmp_path, **{**OPTIONS, "checkpoint_every": 100})

    def body():
        before_step(1, lambda run: strike(signal.SIGTERM))
        train.main(c)

    (ended,) = forked(body)
    assert ended.code == 0 and "stopped after step 2; --resume goes on" in ended.output
    assert utils.newest_checkpoint(c.out).name == "step-000002"
    assert finished(c, straight)


def test_a_second_signal_stops_at_once(tmp_path):
    c = small_config(tmp_path, **OPTIONS)

    def interrupt_twice(run):
        strike(signal.SIGINT)
        while signal.getsignal(signal.SIGINT) != signal.default_int_handler:
            time.sleep(0.01)  # two at the same time would count as one
        strike(signal.SIGINT)
        time.sleep(60)

    def body():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs have none
        before_step(0, interrupt_twice)
        train.main(c)

    (ended,) = forked(body, timeout=50)
    assert ended.code == 1 and utils.newest_checkpoint(c.out) is None
    assert ended.output.endswith("train.py: stopped at once; the newest checkpoint is whole\n")


# --------------------------------------------------------------------------------------------------
# Disks and files


def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path, straight):
    """From the second step on no file may grow beyond 20 kB, which looks like a full disk."""
    c = small_config(tmp_path, **OPTIONS)

    def body():
        limit = (20_000, 20_000)
        before_step(1, lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
        train.main(c)

    (ended,) = forked(body)
    assert ended.code == 1 and "Traceback" not in ended.output
    line = ended.output.splitlines()[-1]
    assert "step-000002 cannot be written" in line and "make room, then go on with --re" in line
    names = sorted(path.name for path in (c.out / "checkpoints").iterdir())
    assert names == ["latest", "step-000001"]
    assert finished(c, straight)


def test_a_log_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    class Log(utils.Log):
        def __init__(self, run):
            super().__init__(run)
            self.file = open("/dev/full", "w")

    monkeypatch.setattr(utils, "Log", Log)
    reason = r"^train.py: /dev/full: cannot be written \(No space left on device\)$"
    with pytest.raises(SystemExit, match=reason):
        train.main(small_config(tmp_path, **OPTIONS))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    c = small_config(tmp_path, **OPTIONS, resume=True)
    utils.save_config(c, c.out / "config.json")
    (c.out / "checkpoints").write_text("in the way")
    with pytest.raises(SystemExit, match="^train.py: .*step-000001 cannot be written .*make room"):
        train.main(c)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_damaged_and_malicious_checkpoints_are_named(copied, straight, tmp_path):
    """Cut short, gone, or a pickle that would run code: refused, and the one before is taken."""
    newest = utils.newest_checkpoint(copied.out)
    names = ["discriminator.safetensors", "pytorch_lora_weights.safetensors", "state.pt"]
    assert sorted(path.name for path in newest.iterdir()) == names
    marker = tmp_path / "marker"
    torch.save({"step": Payload(marker)}, tmp_path / "payload.pt")
    payloads = [(tmp_path / "payload.pt").read_bytes(), pickle.dumps(Payload(marker), 2)]
    assert all(b"system" in payload for payload in payloads)
    run = train.setup(copied)
    for name in names:
        path = newest / name
        whole = path.read_bytes()
        for data in [None, whole[: len(whole) // 2], b"", *payloads]:
            path.unlink() if data is None else path.write_bytes(data)
            with pytest.raises(ValueError, match=f"^{newest}: not a whole checkpoint of this mode"):
                utils.load_checkpoint(run, newest)
        path.write_bytes(whole)
    utils.load_checkpoint(run, newest)
    assert run.step == 3 and not marker.exists()
    (newest / "state.pt").unlink()
    mend = "^train.py: .*step-000003: not a whole .*; delete it, and --resume takes the one before$"
    with pytest.raises(SystemExit, match=mend):
        train.main(copied)
    shutil.rmtree(newest)
    assert finished(copied, straight)


def test_what_would_not_be_the_same_run_is_not_resumed(copied, tmp_path):
    with pytest.raises(SystemExit, match=r"^train.py: .*--lr \(0.003 then, 0.5 now\)$"):
        train.main(replace(copied, lr=0.5))
    with pytest.raises(SystemExit, match="^train.py: --steps 1: .*run is at step 3 already$"):
        train.main(replace(copied, steps=1))
    newest, run = utils.newest_checkpoint(copied.out), train.setup(copied)
    run.config = replace(copied, batch=3)
    with pytest.raises(ValueError, match="made with 2 prompts a step, .* now these are 3 x 1 x 1$"):
        utils.load_checkpoint(run, newest)
    (tmp_path / "my prompts.txt").write_text("a red ring\na blue cross\n")
    run.config = replace(copied, prompts=tmp_path / "my prompts.txt")
    with pytest.raises(ValueError, match="the content of .*my prompts.txt has changed since"):
        utils.load_checkpoint(run, newest)


# --------------------------------------------------------------------------------------------------
# Bad numbers

FINITE_AND_NAN = torch.tensor([1.0, float("nan")])


@pytest.fixture
def run(tmp_path):
    run = train.setup(small_config(tmp_path, **OPTIONS))
    randomise(run.trainables(), 5)
    return run


def weights(run):
    return [p.detach().clone() for p in run.trainables()]


def times(factor):
    """A spoiler: the function's result, or the first of several, times a factor for each prompt."""

    def spoil(plain):
        def spoilt(*args, **options):
            result = plain(*args, **options)
            shape = [-1] + [1] * (result.dim() - 1)
            return result * factor.view(shape) if result.dim() else result * factor[-1]

        return spoilt

    return spoil


def spoil_latents(plain):
    def sample(*args, **options):
        z, states = plain(*args, **options)
        z[1, 0, 0, 0] = float("inf")
        return z, states

    return sample


NAN = times(FINITE_AND_NAN)
ALL = "the gradient of its batch is not finite"
SPOILT = {  # owner and name of a function, what makes a bad number of its result, what is said
    "loss": (rewards.Blip, "__call__", NAN, "a loss or its gradient is not finite"),
    "latents": (diffusion, "sample", spoil_latents, "the sampled latents are not finite"),
    "image": (diffusion, "decode", NAN, "the VAE's image is not finite"),
    "attention": (None, "token", NAN, ALL),
    "discriminator": (losses, "discriminator_loss", NAN, ALL),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(run, monkeypatch, capsys, what):
    owner, name, spoil, reason = SPOILT[what]
    before = weights(run)
    with monkeypatch.context() as patch:
        if what == "attention":
            weight, formula = run.attention_terms[name]
            patch.setitem(run.attention_terms, name, (weight, spoil(formula)))
        else:
            patch.setattr(owner, name, spoil(getattr(owner, name)))
        log, troubles = train.train_step(run)
    assert same(weights(run), before) and not run.optimizer.state and log["skipped"] == 1
    named = batch_of(run.prompts, 0, 2, 0)[0 if reason == ALL else 1 :]
    assert [trouble.prompt for trouble in troubles] == named
    assert all(trouble.reason.startswith(reason) and trouble.fatal for trouble in troubles)
    train.handle_troubles(run, troubles, skipped=True)
    said = capsys.readouterr().err
    assert run.skipped == 1 and all(f"{prompt!r}: {reason}" in said for prompt in named)
    run.step += 1
    log, troubles = train.train_step(run)
    train.handle_troubles(run, troubles, skipped="skipped" in log)
    assert "skipped" not in log and run.skipped == 0 and not same(weights(run), before)


def test_too_many_skipped_steps_end_the_run_and_keep_the_checkpoint(tmp_path, monkeypatch):
    c = small_config(tmp_path, steps=9, checkpoint_every=1, max_skips=3, num_steps=2, grad_steps=1)
    plain, calls = rewards.Blip.__call__, []

    def reward(*args):
        calls.append(1)
        return plain(*args) * (1.0 if len(calls) in (1, 4) else float("nan"))

    monkeypatch.setattr(rewards.Blip, "__call__", reward)
    reason = "3 steps in a row had a loss or gradient that is not finite .*lower --lr"
    with pytest.raises(SystemExit, match=reason):
        train.main(c)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in open(c.out / "log.jsonl")]
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 1, 0, 1, 1, 1]
    assert rows[1]["loss_blip"] == "nan" and "troubles" not in rows[0]
    prompts = batch_of(train.prompt_lists.read(c.prompts), 1, 2, 0)
    reason = "a loss or its gradient is not finite"
    assert rows[1]["troubles"] == [[prompt, reason, True] for prompt in prompts]
    assert utils.newest_checkpoint(c.out).name == "step-000006"


def test_black_images_are_named_but_do_no_harm(run, monkeypatch):
    black = times(torch.tensor([1.0, 0.0]))
    monkeypatch.setattr(diffusion, "decode", black(diffusion.decode))
    log, (trouble,) = train.train_step(run)
    prompt = batch_of(run.prompts, 0, 2, 0)[1]
    assert trouble == (prompt, "the VAE's image is black", False) and "skipped" not in log


def test_there_is_no_half_precision_that_needs_loss_scaling(capsys):
    with pytest.raises(SystemExit) as stop:
        configuration.parse(["shapes", "--dtype", "float16"])
    assert stop.value.code == 2 and "bfloat16" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Ranks


@pytest.mark.parametrize("how", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)])
def test_a_lost_rank_ends_the_others_in_one_line(tmp_path, how):
    c = small_config(tmp_path, **OPTIONS, timeout=0.5)

    def body():
        before_step(1, lambda run: run.rank == 1 and strike(getattr(signal, how)))
        train.main(c)

    first, second = forked(body, 2, timeout=70)
    assert (first.code, second.code) == (1, -signal.SIGKILL)
    line = first.output.splitlines()[-1]
    assert line.startswith("train.py: another rank has gone or does not answer")
    assert "Traceback" not in first.output
    assert utils.newest_checkpoint(c.out).name == "step-000001"


def test_ranks_that_disagree_are_stopped_at_the_start(tmp_path):
    """They get different learning rates and prompt files and resume from different checkpoints."""
    c = small_config(tmp_path, **OPTIONS)

    def body():
        rank, plain = int(os.environ["RANK"]), train.setup

        def setup(c):
            run = plain(c)
            run.step = rank
            return run

        train.setup, utils.hash_of = setup, lambda path: f"file of {rank}"
        train.main(replace(c, lr=c.lr * (1 + rank)))

    for ended in forked(body, 2):
        assert ended.code == 1 and ended.output.splitlines()[-1] == (
            "train.py: the ranks do not agree: --lr is 0.003 and 0.006; the content of --prompts "
            "is file of 0 and file of 1; the checkpoint to go on from is 0 and 1"
        )
    assert not c.out.exists()


def test_ranks_that_drift_apart_are_stopped(tmp_path):
    """Each changes one weight by a small amount of its own before the first checkpoint."""
    c = small_config(tmp_path, **OPTIONS)

    def drift(run):
        run.parameters[0].data[0, 0] += 1e-6 * run.rank

    def body():
        before_step(0, drift)
        train.main(c)

    for ended in forked(body, 2):
        assert ended.code == 1
        assert "train.py: step 1: the ranks' weights have drifted apart" in ended.output
    assert not (c.out / "checkpoints").exists()


RESTARTED = """
import os, signal, sys
from pathlib import Path

sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import test_faults, train
from conftest import small_config

folder = Path({folder!r})

def die_once(run):
    if run.rank == 1 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

test_faults.before_step(2, die_once)
train.main(small_config(folder, **test_faults.OPTIONS))
"""


@pytest.mark.slow
def test_torchrun_restarts_and_goes_on_by_itself(tmp_path):
    straight = small_config(tmp_path / "straight", **OPTIONS)
    assert [ended.code for ended in forked(lambda: train.main(straight), 2)] == [0, 0]
    script = tmp_path / "script.py"
    script.write_text(RESTARTED.format(root=str(ROOT), folder=str(tmp_path)))
    flags = ["--standalone", "--nproc_per_node", 2, "--max-restarts", 1]
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see docs/faults.md
    done = command("-m", "torch.distributed.run", *flags, script, env=own_store)
    assert done.returncode == 0 and (tmp_path / "killed").exists(), done.stderr
    assert same(state_of(tmp_path / "run"), state_of(straight.out))


def test_other_ranks_may_take_up_the_run(tmp_path, straight):
    """Two ranks begin, one with two batches a step goes on: the same prompts, noise and steps, with
    other rounding."""
    c = small_config(tmp_path, **{**OPTIONS, "batch": 1})

    def body():
        before_step(1, lambda run: strike(signal.SIGTERM))
        train.main(c)

    ends = forked(body, 2)
    assert [ended.code for ended in ends] == [0, 0], ends
    assert "3 steps of 1 x 1 x 2 = 2 prompts" in ends[0].output
    assert "steps of" not in ends[1].output
    train.main(replace(c, resume=True, accumulate=2))
    name, _, (_, lora), rows = state_of(c.out)
    expected_name, _, (_, expected_lora), expected_rows = state_of(straight)
    assert name == expected_name
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row["loss_blip"] == pytest.approx(expected["loss_blip"], rel=0.02)
    moved = torch.cat([w.flatten() for w in lora.values()])
    wanted = torch.cat([w.flatten() for w in expected_lora.values()])
    assert (moved - wanted).norm() < 0.05 * wanted.norm()

"""What goes wrong on the way, each fault of docs/faults.md: kills, full disks, bad numbers, lost or disagreeing processes."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ALL_LOSSES, ROOT, command, randomise, same, small_config, watched_step
from safetensors.torch import load_file

import config as configuration
import diffusion
import losses
import output
import parallel
import train

OPTIONS = dict(
    ALL_LOSSES, beta1=0.5, steps=3, checkpoint_every=1, eval_prompts="", num_steps=2, grad_steps=1
)


slow = pytest.mark.skipif(
    "KILLS" not in os.environ, reason="slow: KILLS=30 python -m pytest tests/test_faults.py"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the programs that `command` starts: sums depend on the number of threads in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_script(folder, body, **changes):
    """A program that runs `body` with `c`, a small configuration, and the modules at hand."""
    script = folder / f"script{len(list(folder.glob('script*')))}.py"
    script.write_text(f"""
import os, resource, signal, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path, PosixPath
from conftest import randomise, small_config, watched_step
import torch
import config, diffusion, losses, output, parallel, train
folder = Path({str(folder)!r})
c = small_config(folder, **{changes!r})
{body}
""")
    return script


def state_of(out):
    """Everything that a run has learned and written down, but for seconds and memory."""
    newest = output.newest(out)
    rows = [json.loads(line) for line in open(out / "log.jsonl")]
    logs = [
        {k: v for k, v in row.items() if "seconds" not in k and "memory" not in k} for row in rows
    ]
    return (
        newest.name,
        *(
            load_file(newest / f"{n}.safetensors")
            for n in ("pytorch_lora_weights", "discriminator")
        ),
        torch.load(newest / "state.pt", weights_only=True),
        logs,
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What a run of three steps leaves that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    train.main(small_config(folder, **OPTIONS))
    found = state_of(folder / "run")
    assert found[0] == "step-000003" and [row["step"] for row in found[-1]] == [0, 1, 2]
    assert any(w.abs().max() > 0 for k, w in found[1].items() if "lora.up" in k or "lora_B" in k)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Kills

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
KILLED = {  # where kill -9 strikes while the second step is being saved
    "before the save": f"""
plain = output.save_checkpoint
output.save_checkpoint = lambda run: {KILL} if run.step == 2 else plain(run)
""",
    "inside the save": f"""
plain = output.save_file
output.save_file = lambda *a: {KILL} if "step-000002" in str(a[1]) else plain(*a)
""",
    "between the save and its link": f"""
plain = Path.symlink_to
PosixPath.symlink_to = lambda self, name: {KILL} if name == "step-000002" else plain(self, name)
""",
    "while an old checkpoint is deleted": f"""
output.shutil.rmtree = lambda path, **_: (Path(path) / "state.pt").unlink() or {KILL} if "discarded" in str(path) else None
c.keep = 1
""",
    "while reference latents are written": f"""
plain, count = config.write, []
def write(path, data):
    count.append(path.suffix == ".safetensors")
    plain(path, data)
    if sum(count) == 3: {KILL}
config.write = write
""",
}


@pytest.mark.parametrize(
    "where", [*list(KILLED)[:3], *(pytest.param(where, marks=slow) for where in list(KILLED)[3:])]
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, straight, where):
    done = command(write_script(tmp_path, KILLED[where] + "\ntrain.main(c)", **OPTIONS))
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    keep = 1 if "old" in where else 3
    train.main(small_config(tmp_path, **OPTIONS, keep=keep, resume=True))
    assert same(state_of(tmp_path / "run"), straight)
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["latest", *[f"step-00000{i}" for i in (1, 2, 3)][-keep:]]


@slow
def test_random_kills_leave_no_trace(tmp_path):
    kills, rng = int(os.environ["KILLS"]), random.Random(int(os.environ.get("KILLS_SEED", 0)))
    flags = [
        "shapes",
        "--steps",
        max(6, kills // 2),
        "--batch",
        2,
        "--num-steps",
        3,
        "--grad-steps",
        2,
        "--rank",
        4,
        "--eval-prompts",
        "",
        "--checkpoint-every",
        1,
        "--keep",
        2,
        "--sample-every",
        0,
        "--references",
        tmp_path / "references",
    ]
    done = command("train.py", *flags, "--out", tmp_path / "straight")
    assert done.returncode == 0, done.stderr[-2000:]
    log = tmp_path / "broken/log.jsonl"
    line = [
        sys.executable,
        str(ROOT / "train.py"),
        *map(str, flags),
        "--out",
        str(tmp_path / "broken"),
        "--resume",
    ]
    for _ in range(kills):
        before = log.read_text().count("\n") if log.exists() else 0
        process = subprocess.Popen(
            line,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        late = rng.random() < 0.7  # most kills strike while it trains, the others while it starts
        while (
            process.poll() is None
            and late
            and (not log.exists() or log.read_text().count("\n") <= before)
        ):
            time.sleep(0.05)
            before = min(before, log.read_text().count("\n") if log.exists() else 0)
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.wait()
    done = command("train.py", *flags, "--out", tmp_path / "broken", "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(state_of(tmp_path / "broken"), state_of(tmp_path / "straight"))


def test_sigterm_ends_the_step_saves_and_exits_with_zero(tmp_path, straight):
    body = """
plain = train.train_step
def step(run):
    if run.step == 1: os.kill(os.getpid(), signal.SIGTERM)
    return plain(run)
train.train_step = step
train.main(c)
"""
    done = command(write_script(tmp_path, body, **{**OPTIONS, "checkpoint_every": 100}))
    assert done.returncode == 0 and "stopped after step 2 of 3; --resume goes on" in done.stderr, (
        done.stderr[-2000:]
    )
    assert output.newest(tmp_path / "run").name == "step-000002"
    train.main(small_config(tmp_path, **OPTIONS, resume=True))
    assert same(state_of(tmp_path / "run"), straight)


def test_a_second_signal_stops_at_once(tmp_path):
    body = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without
def step(run):
    os.kill(os.getpid(), signal.SIGINT)
    while signal.getsignal(signal.SIGINT) != signal.default_int_handler:  # two at the same time would count as one
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
train.train_step = step
train.main(c)
"""
    done = command(write_script(tmp_path, body, **OPTIONS))
    assert done.returncode != 0 and output.newest(tmp_path / "run") is None
    assert "Traceback" not in done.stderr, done.stderr[-2000:]


# ---------------------------------------------------------------------------------------------------------------------
# Disks and files


def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path, straight):
    """After the first checkpoint no file may grow beyond 20 kB: to a program this looks like a full disk."""
    body = """
plain = output.save_checkpoint
def save(run):
    if run.step == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    plain(run)
output.save_checkpoint = save
train.main(c)
"""
    done = command(write_script(tmp_path, body, **OPTIONS))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    said = done.stderr.strip().splitlines()[-1]
    assert "step-000002 cannot be written" in said and "step-000001 is intact" in said
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [
        "latest",
        "step-000001",
    ]
    train.main(small_config(tmp_path, **OPTIONS, resume=True))
    assert same(state_of(tmp_path / "run"), straight)


def test_a_log_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    class Log(output.Log):
        def __init__(self, run):
            super().__init__(run)
            self.file = open("/dev/full", "w")

    monkeypatch.setattr(output, "Log", Log)
    with pytest.raises(
        SystemExit,
        match=r"^train.py: /dev/full: cannot be written \(No space left on device\); make room",
    ):
        train.main(small_config(tmp_path, **OPTIONS))


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    configuration.save(small_config(tmp_path, **OPTIONS), tmp_path / "run/config.json")
    (tmp_path / "run/checkpoints").write_text("in the way")
    with pytest.raises(SystemExit, match="^train.py: .*step-000001 cannot be written .*make room"):
        train.main(small_config(tmp_path, **OPTIONS, resume=True))


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_checkpoint_from_a_stranger_runs_no_code(tmp_path, straight):
    c = small_config(tmp_path, **OPTIONS)
    train.main(replace(c, steps=1))
    state = output.newest(c.out) / "state.pt"
    torch.save({"step": Payload(tmp_path / "ran")}, state)
    with open(state, "rb") as file:
        assert b"system" in file.read()
    with pytest.raises(SystemExit, match="step-000001: not a whole checkpoint of this model"):
        train.main(replace(c, resume=True))
    state.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(SystemExit, match="step-000001: not a whole checkpoint of this model"):
        train.main(replace(c, resume=True))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["state.pt", "pytorch_lora_weights.safetensors", "discriminator.safetensors"]
)
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named(tmp_path, name, harm):
    c = small_config(tmp_path, **OPTIONS)
    train.main(replace(c, steps=1))
    path = output.newest(c.out) / name
    data = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        SystemExit,
        match="step-000001: not a whole checkpoint .*delete it, and --resume takes the one before",
    ):
        train.main(replace(c, resume=True))


def test_where_a_damaged_checkpoint_is_deleted_the_one_before_is_taken(tmp_path, straight):
    c = small_config(tmp_path, **OPTIONS)
    train.main(replace(c, steps=2))
    (output.newest(c.out) / "state.pt").write_bytes(b"")
    with pytest.raises(SystemExit, match="step-000002: not a whole checkpoint"):
        train.main(replace(c, resume=True))
    shutil.rmtree(output.newest(c.out))
    train.main(replace(c, resume=True))
    assert same(state_of(c.out), straight)


def test_what_would_not_be_the_same_run_is_not_resumed(tmp_path):
    listed = tmp_path / "my prompts.txt"
    listed.write_text("a red ring\na blue cross\na white circle\n")
    c = small_config(tmp_path, **{**OPTIONS, "steps": 1, "prompts": listed})
    train.main(c)
    again = replace(c, resume=True, steps=2)
    with pytest.raises(SystemExit, match="made with 2 prompts a step, .* now these are 3 x 1 x 1"):
        train.main(replace(again, batch=3))
    with pytest.raises(SystemExit, match="--lr .*then.*now"):
        train.main(replace(again, lr=0.5))
    listed.write_text("a red ring\na blue cross\na black circle\n")
    with pytest.raises(
        SystemExit, match="the content of .*my prompts.txt is not what it was at step-000001"
    ):
        train.main(again)
    assert output.newest(c.out).name == "step-000001"


def test_resuming_where_nothing_is_starts(tmp_path, capsys):
    c = small_config(tmp_path, **{**OPTIONS, "steps": 2}, resume=True)
    train.main(c)
    assert output.newest(c.out).name == "step-000002"
    with pytest.raises(SystemExit, match="--steps 1: .*run is at step 2 already"):
        train.main(replace(c, steps=1))


# ---------------------------------------------------------------------------------------------------------------------
# Bad numbers


@pytest.fixture
def run(tmp_path):
    run = train.setup(small_config(tmp_path, **OPTIONS))
    randomise(run.parameters, 5)
    randomise(run.discriminator_parameters, 6)
    return run


def weights(run):
    return [p.detach().clone() for p in run.parameters + run.discriminator_parameters]


def spoil_loss(run, monkeypatch):
    plain = losses.caption_loss

    def loss(captioner, tokenizer, images, prompts, *rest):
        return plain(captioner, tokenizer, images, prompts, *rest) * torch.tensor(
            [1.0, float("nan")]
        )

    monkeypatch.setattr(losses, "caption_loss", loss)


def spoil_latents(run, monkeypatch):
    plain = diffusion.sample

    def sampled(*args, **more):
        z, states = plain(*args, **more)
        z[1, 0, 0, 0] = float("inf")
        return z, states

    monkeypatch.setattr(diffusion, "sample", sampled)


def spoil_images(run, monkeypatch):
    plain, factor = diffusion.decode, torch.tensor([1.0, float("nan")]).view(2, 1, 1, 1)
    monkeypatch.setattr(diffusion, "decode", lambda pipe, z: plain(pipe, z) * factor)


def spoil_replay(run, monkeypatch):
    plain = diffusion.replay

    def replayed(*args):
        plain(*args)
        run.parameters[3].grad[0] = float("inf")

    monkeypatch.setattr(diffusion, "replay", replayed)


def spoil_attention(run, monkeypatch):
    plain = losses.token_loss
    monkeypatch.setattr(losses, "token_loss", lambda *args: plain(*args) * float("nan"))


def spoil_discriminator(run, monkeypatch):
    plain = losses.discriminator_loss
    monkeypatch.setattr(losses, "discriminator_loss", lambda *args: plain(*args) * float("nan"))


BATCH = "the gradient of its batch is not finite"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (spoil_loss, "a loss or its gradient is not finite"),
        (spoil_latents, "the sampled latents are not finite"),
        (spoil_images, "the VAE's image is not finite"),
        (spoil_replay, BATCH),
        (spoil_attention, BATCH),
        (spoil_discriminator, BATCH),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(
    run, monkeypatch, capsys, spoil, why
):
    before, moments = (
        weights(run),
        [dict(o.state) for o in (run.optimizer, run.discriminator_optimizer)],
    )
    with monkeypatch.context() as patch:
        spoil(run, patch)
        log = train.train_step(run)
    assert same(weights(run), before) and moments == [
        dict(o.state) for o in (run.optimizer, run.discriminator_optimizer)
    ]
    assert log["skipped"] == 1 and run.skipped == 1
    named = train.prompt_lists.batch_of(run.prompts, 0, 2, 0)[0 if why == BATCH else 1 :]
    assert [prompt for prompt, *_ in log["trouble"]] == named
    assert all(said.startswith(why) and fatal for _, said, fatal in log["trouble"])
    train.check_trouble(run, log)
    assert all(prompt in said for said in [capsys.readouterr().err] for prompt in named)
    run.step += 1
    log = train.train_step(run)
    assert "skipped" not in log and run.skipped == 0 and not same(weights(run), before)


def test_too_many_skipped_steps_end_the_run_and_keep_the_checkpoint(tmp_path, monkeypatch):
    c = small_config(tmp_path, **{**OPTIONS, "steps": 9, "max_skips": 3, "caption_weight": 1.0})
    plain = losses.caption_loss
    calls = []

    def loss(*args, **more):
        calls.append(1)
        return plain(*args, **more) * (1.0 if len(calls) in (1, 4) else float("nan"))

    monkeypatch.setattr(losses, "caption_loss", loss)
    with pytest.raises(
        SystemExit, match="3 steps in a row had a loss or gradient that is not finite .*lower --lr"
    ):
        train.main(c)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in open(c.out / "log.jsonl")]
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 1, 0, 1, 1, 1] and rows[1][
        "loss_caption"
    ] == "nan"
    assert output.newest(c.out).name == "step-000006"


def test_black_images_are_named_but_do_no_harm(run, monkeypatch):
    plain = diffusion.decode
    monkeypatch.setattr(
        diffusion,
        "decode",
        lambda pipe, z: plain(pipe, z) * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1),
    )
    log = train.train_step(run)
    ((prompt, why, fatal),) = log["trouble"]
    assert why == "the VAE's image is black" and not fatal and "skipped" not in log


def test_there_is_no_half_precision_that_needs_loss_scaling(capsys):
    with pytest.raises(SystemExit) as stop:
        configuration.parse(["shapes", "--dtype", "float16"])
    assert stop.value.code == 2 and "bfloat16" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Batches and processes


def gradients_of_a_step(folder, **changes):
    run = train.setup(small_config(folder, **{**OPTIONS, **changes}))
    randomise(run.parameters, 5)
    randomise(run.discriminator_parameters, 6)
    return watched_step(run)


def close(found, expected):
    """Equal up to rounding: 1e-3 of each tensor's norm."""
    assert len(found) == len(expected) >= 100
    for a, b in zip(found, expected):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The gradients of a step of four prompts in one batch, and its log."""
    return gradients_of_a_step(tmp_path_factory.mktemp("large"), batch=4)


def test_accumulated_batches_are_the_large_batch(tmp_path, large):
    found, log = gradients_of_a_step(tmp_path, batch=2, accumulate=2)
    close(found, large[0])
    for key, value in large[1].items():
        if key.startswith("loss") or "norm" in key:
            assert log[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    alone, _ = gradients_of_a_step(tmp_path, batch=2)
    assert any((a - b).norm() > 0.1 * b.norm() for a, b in zip(alone, large[0]))


def start_ranks(script, processes=2):
    """Starts the processes by hand, as torchrun would, but with nobody to watch over them."""
    port = str(20000 + random.SystemRandom().randrange(20000))
    return [
        subprocess.Popen(
            [sys.executable, str(script)],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RANK": str(i),
                "LOCAL_RANK": str(i),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for i in range(processes)
    ]


def ranks_of(folder, body, **changes):
    """(stderr, exit code) of two processes that ran `body`."""
    processes = start_ranks(write_script(folder, body, **{**OPTIONS, **changes}))
    return [(p.communicate(timeout=200)[1][-2000:], p.returncode) for p in processes]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A step that one of two processes spoils, and the same step again: what each logged, and its gradients."""
    folder = tmp_path_factory.mktemp("two")
    body = """
run = train.setup(c)
randomise(run.parameters, 5)
randomise(run.discriminator_parameters, 6)
start = [p.detach().clone() for p in run.parameters + run.discriminator_parameters]
plain = losses.caption_loss
losses.caption_loss = lambda *a: plain(*a) * (float("nan") if run.process == 1 else 1)
skipped = train.train_step(run)
assert all(torch.equal(a, b) for a, b in zip(start, run.parameters + run.discriminator_parameters))
parallel.check_agreement(run)
losses.caption_loss = plain
found, _ = watched_step(run)
torch.save((skipped, found), folder / f"rank{run.process}.pt")
parallel.leave(run.processes)
"""
    ends = ranks_of(folder, body)
    assert [code for _, code in ends] == [0, 0], ends
    return [torch.load(folder / f"rank{i}.pt") for i in range(2)]


def test_two_processes_are_one_with_the_double_batch(two_processes, large):
    (_, first), (_, second) = two_processes
    assert same(first, second)
    close(first, large[0])


def test_a_bad_number_in_one_process_skips_the_step_in_all(two_processes):
    listed = train.prompt_lists.read(configuration.PRESETS["shapes"][1].prompts)
    spoilt = train.prompt_lists.batch_of(listed, 0, 2, 0, process=1, processes=2)
    for log, _ in two_processes:
        assert log["skipped"] and log["trouble"] == [
            (p, "a loss or its gradient is not finite", True) for p in spoilt
        ]


@pytest.mark.parametrize("how", ["SIGKILL", pytest.param("SIGSTOP", marks=slow)])
def test_a_lost_process_ends_the_others_in_one_line(tmp_path, how):
    body = f"""
plain = train.train_step
def step(run):
    if run.step == 1 and run.process == 1: os.kill(os.getpid(), signal.{how})
    return plain(run)
train.train_step = step
train.main(c)
"""
    first, second = start_ranks(write_script(tmp_path, body, **{**OPTIONS, "timeout": 0.5}))
    said = first.communicate(timeout=200)[1]
    second.kill()
    second.communicate()
    assert first.returncode == 1
    assert (
        "Traceback" not in said and "train.py: another process has gone or does not answer" in said
    ), said[-2000:]
    assert output.newest(tmp_path / "run").name == "step-000001"


def test_processes_that_disagree_are_stopped_at_the_start(tmp_path):
    """They were given other learning rates and prompt files, and resume from other checkpoints."""
    body = """
own, plain = int(os.environ["RANK"]), train.setup
def setup(c):
    run = plain(c)
    run.step = own
    return run
train.setup, parallel.hash_of = setup, lambda path: f"file of {own}"
c.lr *= 1 + own
train.main(c)
"""
    ends = ranks_of(tmp_path, body)
    assert [code for _, code in ends] == [1, 1], ends
    named = (
        "--lr is 0.003 and 0.006; the content of --prompts is file of 0 and file of 1; "
        "the checkpoint to go on from is 0 and 1\n"
    )
    assert all(f"train.py: the processes do not agree: {named}" in said for said, _ in ends), ends
    assert not (tmp_path / "run").exists()


@slow
def test_torchrun_restarts_and_goes_on_by_itself(tmp_path, straight):
    body = f"""
plain = train.train_step
def step(run):
    if run.step == 2 and not (folder / "killed").exists():
        (folder / "killed").touch()
        {KILL}
    return plain(run)
train.train_step = step
train.main(c)
"""
    done = command(
        write_script(tmp_path, body, **OPTIONS),
        modules=(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            1,
            "--max-restarts",
            1,
        ),
    )
    assert done.returncode == 0 and (tmp_path / "killed").exists(), done.stderr[-2000:]
    assert same(state_of(tmp_path / "run"), straight)


def test_other_processes_may_take_up_the_run(tmp_path, straight):
    """Two processes begin, one with two batches a step goes on: the same prompts, noise and steps, other rounding."""
    c = small_config(tmp_path, **{**OPTIONS, "batch": 1})
    ends = ranks_of(tmp_path, "train.main(c)", batch=1, steps=1)
    assert [code for _, code in ends] == [0, 0], ends
    train.main(replace(c, resume=True, accumulate=2))
    name, lora, _, _, logs = state_of(tmp_path / "run")
    assert name == straight[0]
    for row, expected in zip(logs, straight[-1], strict=True):
        assert row["loss_caption"] == pytest.approx(expected["loss_caption"], rel=0.02)
    moved = torch.cat([w.flatten() for w in lora.values()])
    wanted = torch.cat([w.flatten() for w in straight[1].values()])
    assert (moved - wanted).norm() < 0.05 * wanted.norm()


def test_agreement_is_checked_by_value(monkeypatch):
    monkeypatch.setattr(
        parallel, "gather", lambda rows, processes: [rows[0], {**rows[0], "--seed": "1"}]
    )
    monkeypatch.setattr(parallel, "hash_of", lambda path: "equal")
    run = type("R", (), {"config": configuration.PRESETS["shapes"][1], "step": 0, "processes": 2})
    with pytest.raises(ValueError, match="do not agree: --seed is 0 and 1$"):
        parallel.check_alike(run)

"""train.py: what it trains and evaluates, what its figures mean, what its flags do, and that nothing is lost."""

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, folder, log_lines
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import train
from mod import MoD, MoDConfig
from prepare_data import UserError, load_data

SMALL = dict(vocab_size=257, block_size=32, n_layer=4, n_head=2, n_embd=16, capacity=0.25)


def load(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def same(a, b):
    """Two dicts of tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def forwards(monkeypatch):
    """A list of what each forward of the model was given, and in which state."""
    forward, seen = MoD.forward, []

    def record(model, idx, targets=None, **options):
        state = {"training": model.training, "seed": torch.initial_seed(), "autocast": torch.is_autocast_enabled("cpu")}
        weights = sum(p.double().abs().sum().item() for p in model.parameters())
        seen.append(SimpleNamespace(idx=idx, targets=targets, weights=weights, **state))
        return forward(model, idx, targets, **options)

    monkeypatch.setattr(MoD, "forward", record)
    return seen


# ---------------------------------------------------------------------------------------------------------
# What is trained on and evaluated on, and what is reported


def test_trains_on_the_training_text_and_evaluates_on_the_other(run_train, forwards):
    """In small_data the one has no upper-case letter, the other no lower-case one. Targets are the next tokens."""
    last = run_train("--steps=60", "--eval_interval=30")
    letters = {True: b"", False: b""}
    for call in forwards:
        letters[call.training] += bytes(call.idx.flatten().tolist())
        assert torch.equal(call.idx[:, 1:], call.targets[:, :-1])
    assert letters[True].islower() and letters[False].isupper()
    assert last["loss"] < last["val_causal"] - 1
    assert len({call.seed for call in forwards if call.training}) == 60  # so random routing draws anew in each step


@pytest.mark.parametrize("flags", [dict(), dict(predictor=True), dict(routing="random")])
def test_an_evaluation_reports_what_it_says(small_data, flags):
    """Each figure again, one window at a time, for a model that decides both ways in each block."""
    torch.manual_seed(1)
    model = MoD(MoDConfig(**SMALL, **flags))
    for p in model.parameters():
        p.data.normal_(std=p.size(-1) ** -0.5)
    data, autocast = load_data(small_data)[1], contextlib.nullcontext
    before = torch.get_rng_state()
    result = train.evaluate(model, data, 1000, autocast, batch_size=1)
    assert torch.equal(before, torch.get_rng_state())
    text, expected = train.spread_windows(data, 32, 1000), []
    assert len(text) == 31 and text[0, 0] == data[0] and text[-1].tolist() == data[-33:].tolist()
    torch.manual_seed(0)
    for window in text[:, None]:
        x, y = window[:, :-1], window[:, 1:]
        _, val_topk, topk = model(x, y)
        _, val_causal, causal = model(x, y, causal=True)
        _, val_skip, skip = model(x, y, causal=True, threshold=math.inf)
        assert not skip.taken.any()
        yes, taken = topk.logit > 0, topk.taken
        figures = {"val_topk": val_topk, "val_causal": val_causal, "val_skip": val_skip}
        figures["agree"] = (yes == taken).float().mean(dim=(1, 2))
        figures["recall"] = (yes & taken).sum(dim=(1, 2)) / 8  # of the 8 tokens that each block takes
        figures["share"] = causal.taken.float().mean(dim=(1, 2))
        expected.append(figures)
    for name in result:
        assert result[name] == pytest.approx(torch.stack([figures[name] for figures in expected]).mean(dim=0).tolist())
    assert len({tuple(result[name]) for name in ("agree", "recall", "share")}) == 3  # or they might be mixed up
    batched = train.evaluate(model, data, 1000, autocast, batch_size=7)
    if not flags.get("routing"):  # whose noise depends on the batch
        assert batched["val_causal"] == pytest.approx(result["val_causal"])


def test_a_log_line_says_what_happened_since_the_last(run_train, tmp_path, forwards):
    """loss and choice_loss are means over the steps since the line before; FLOPs by the formula, Muon's included."""
    run_train("--steps=6", "--accumulate=2", "--eval_interval=1", name="each")
    run_train("--steps=6", "--accumulate=2", "--eval_interval=3", name="third")
    assert max(len(call.idx) for call in forwards) == 2  # so an evaluation takes no more memory than a training step
    header, *each = log_lines(tmp_path / "each")
    _, *third = log_lines(tmp_path / "third")
    for i, line in enumerate(third):
        for name in ("loss", "choice_loss"):
            assert line[name] == pytest.approx(sum(entry[name] for entry in each[3 * i : 3 * i + 3]) / 3)
    model = MoD(MoDConfig(**header["model"]))
    with FlopCounterMode(display=False) as counter:  # it counts attention in full, and no optimizer
        model(torch.zeros(4, 32, dtype=torch.long))
    expected = 3 * counter.get_total_flops() + train.step_flops(model, tokens=0)
    assert third[-1]["flops"] == 6 * train.step_flops(model, 128) == pytest.approx(6 * expected, rel=0.1)
    assert header["params"] == sum(p.numel() for p in model.parameters()) and header["steps"] == 6


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_a_line_at_once_and_then_each_second(run_train, monkeypatch, terminal):
    """Elsewhere, as beside it, there are whole lines: one after a hundredth of the run, then one each tenth."""
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    run_train("--steps=30")
    shown = stderr.getvalue()
    line = r"\rstep 1/30  loss \d.\d{3}  [\d,]+ tokens/s  \d+ s left\x1b\[K"
    assert bool(re.search(line, shown)) == ("\r" in shown) == terminal
    assert shown.count("\rstep ") < 30 / 2
    assert [int(step) for step in re.findall(r"step (\d+)/30 [^\r\n]* bits/byte", shown)] == [1, *range(3, 31, 3)]


def test_a_report_counts_bits_per_byte_and_shows_a_text_drawn_in_eval_mode():
    """What counts in training, as dropout or a balance of experts in a fork, once ran while a text was drawn."""
    model, modes = MoD(MoDConfig(**SMALL)), []
    model.blocks[0].register_forward_pre_hook(lambda block, _: modes.append(block.training))
    entry = {"loss": 1.0, "val_causal": 3 * math.log(2), "timing": {"tokens_per_second": 1000.0}}
    meta = {"bytes_per_val_token": 4, "tokenizer": "bytes", "prompt": "def"}
    run = SimpleNamespace(log=[entry], seconds=1, step=1, steps=2, model=model, meta=meta, config=train.TrainConfig())
    line, text = train.report(run).splitlines()
    assert line == "step 1/2  loss 1.0000  val 2.0794 (0.750 bits/byte)  1,000 tokens/s  1 s left"
    assert "def" in text and len(modes) == 60 and not any(modes) and model.training


@pytest.mark.parametrize("flags", ["--capacity=1", "--route_every=5"])
def test_a_dense_run_has_one_validation_loss(run_train, capfd, flags):
    """Also where no block happens to be routed, which is said."""
    last = run_train("--steps=4", flags)
    assert last["val_topk"] == last["val_causal"] == last["val_skip"] and "agree" not in last
    assert ("no block is routed" in capfd.readouterr().err) == (flags == "--route_every=5")


# ---------------------------------------------------------------------------------------------------------
# What each flag does


@pytest.fixture
def observe(run_train, forwards, tmp_path, monkeypatch):
    """A function that trains three steps with the flags given; returns a dict of all that a flag may change."""
    compiled = []

    def compile(model, **options):
        compiled.append(options)
        return torch._dynamo.OptimizedModule(model, lambda f: f)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(shutil, "which", lambda name: name)  # a C++ compiler, say

    def call(*flags):
        forwards.clear()
        budget = [] if any(flag.startswith("--flops") for flag in flags) else ["--steps=3"]
        run_train(*budget, "--eval_interval=3", "--overwrite", *flags)
        checkpoint, (header, *lines) = load(tmp_path / "run"), log_lines(tmp_path / "run")
        assert "_orig_mod" not in "".join(checkpoint["model"])  # also of a compiled run
        groups = [group for optimizer in checkpoint["optimizers"] for group in optimizer["param_groups"]]
        trained = [call for call in forwards if call.training]
        return {
            "model": header["model"],
            "weights": forwards[0].weights,
            "steps": header["steps"],
            "evaluated": [line["step"] for line in lines],
            "figures": sorted(lines[-1]),
            "batches": torch.cat([call.idx for call in trained]).tolist(),
            "parts": [call.idx.shape for call in trained],
            "noise": [call.seed for call in trained],
            "dtype": {call.autocast for call in trained},
            "compiled": {"fullgraph": True} in compiled,
            "peak": groups[0]["lr"],  # reached in the last of so few steps
            "rates": [group["lr"] / groups[0]["lr"] for group in groups],
            "decay": [group["weight_decay"] for group in groups],
        }

    return call


FLAGS = {field.name for field in dataclasses.fields(train.TrainConfig)}
SHAPE, LENGTH = {"model", "weights"}, {"steps", "batches", "parts", "noise", "evaluated"}
EFFECTS = {  # of each flag: a value that is not the usual one, and what it changes, and nothing else
    "preset": ("gpu", {"peak", "rates"}),  # with the sizes given
    "steps": ("4", LENGTH),
    "flops": ("2.4e7", LENGTH),
    "capacity": ("0.5", {"model"}),
    "route_every": ("4", SHAPE),
    "routing": ("random", {"model", "figures"}),  # there is nothing to learn about the choice
    "gate": ("raw", {"model"}),
    "predictor": (None, SHAPE | {"rates", "decay"}),
    "n_layer": ("2", SHAPE),
    "n_head": ("4", {"model"}),
    "n_embd": ("32", SHAPE),
    "block_size": ("16", {"model", "batches", "parts"}),
    "batch_size": ("2", {"batches", "parts"}),
    "accumulate": ("2", {"parts", "noise"}),
    "lr": ("0.1", {"peak"}),
    "router_lr_scale": ("0.3", {"rates"}),
    "routed_lr_scale": ("0.3", {"rates"}),
    "weight_decay": ("0.3", {"decay"}),
    "seed": ("5", {"weights", "batches", "noise"}),
    "eval_interval": ("1", {"evaluated"}),
    "dtype": ("bfloat16", {"dtype"}),
    "compile": (None, {"compiled"}),
}


@pytest.mark.parametrize("flag", sorted(FLAGS - {"data", "out", "device", "resume", "overwrite"}))  # have other tests
def test_a_flag_changes_what_it_says_and_nothing_else(observe, flag):
    value, effects = EFFECTS[flag]
    usual, other = observe(), observe(f"--{flag}" if value is None else f"--{flag}={value}")
    assert {key for key in usual if usual[key] != other[key]} == effects


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--flops=10"], "less than one step"),
        (["--steps=0"], "--steps 0 must be above 0"),
        (["--steps=5", "--flops=1e12"], "two budgets"),
        (["--steps=1", "--weight_decay=-0.1"], "--weight_decay -0.1"),
        (["--steps=1", "--seed=-1"], "--seed -1"),
        (["--steps=1", "--n_embd=17"], "n_embd 17 must be a multiple"),
        (["--steps=1", "--batch_size=5", "--accumulate=2"], "--batch_size 5 doesn't divide"),
        (["--steps=1", "--block_size=100000"], "--block_size 100000 needs more tokens for validation than"),
        (["--steps=1", "--device=nonsense"], "device 'nonsense'"),
        (["--steps=1", "--compile"], "needs a C++ compiler"),
        (["--resume", "--out=no where"], "train one with `python train.py --out 'no where'`"),
    ],
)
def test_a_flag_that_cannot_work_is_refused_in_one_line(run_train, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(shutil, "which", lambda name: None)  # no compiler
    with pytest.raises(UserError, match=re.escape(message)):
        run_train(*flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("native, dtype", [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_that_only_emulates_bfloat16_trains_in_float32(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert train.fill_in(train.TrainConfig(), torch.device("cuda")).dtype == dtype


# ---------------------------------------------------------------------------------------------------------
# The parts of a step


def test_each_step_draws_its_own_windows_up_to_the_last():
    data = np.arange(18)
    starts = {train.get_batch(data, 16, 1, seed=0, step=step)[0][0, 0].item() for step in range(40)}
    assert starts == {0, 1}  # of the two that there are


def test_the_schedule_rises_for_a_hundredth_and_falls_to_nothing():
    rates = [train.learning_rate(step, 10_000, 2.0) for step in range(10_000)]
    assert rates[0] == pytest.approx(0.02) and rates[99] == rates[100] == 2.0
    assert rates[5050] == pytest.approx(1.0) and rates[-1] == pytest.approx(2 / 9900)
    assert train.learning_rate(0, 100, 1.0) == 1 / 20 and train.learning_rate(0, 5, 1.0) == 1 / 5


def test_every_parameter_has_one_optimizer_and_its_own_rate():
    model = MoD(MoDConfig(**SMALL, predictor=True))
    model.blocks[0].gain = torch.nn.Parameter(torch.ones(16))  # a fork's: no matrix, so not for Muon
    muon, adamw = train.make_optimizers(model, router_lr_scale=0.1, routed_lr_scale=0.5, weight_decay=0.3)
    assert isinstance(muon, train.Muon) and adamw.defaults["betas"] == (0.9, 0.95)
    found = {}
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert id(p) not in found
                found[id(p)] = optimizer is muon, group["scale"], group["weight_decay"]
    for name, p in model.named_parameters():
        dense_matrix = name.startswith(("blocks.0", "blocks.2")) and p.dim() == 2
        scale = 0.1 if ".router." in name else 0.5 if ".block." in name else 1.0
        decay = 0.0 if ".router." in name or p.dim() < 2 else 0.3
        assert found[id(p)] == (dense_matrix, scale, decay), name
    every_block = MoD(MoDConfig(**SMALL, route_every=1))
    assert [type(optimizer) for optimizer in train.make_optimizers(every_block, 0.1, 1, 0.3)] == [torch.optim.AdamW]


def test_muon_is_torchs_but_for_rounding():
    """torch's multiplies in bfloat16; older versions of it have none. What has no gradient is skipped, as there."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("no torch.optim.Muon")
    torch.manual_seed(0)
    start = [torch.randn(48, 16), torch.randn(16, 64), torch.randn(16, 16), torch.randn(16, 8)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = [
        train.Muon([{"params": ours}], lr=0.02, weight_decay=0.5),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        for a, b in zip(ours[:3], theirs, strict=False):
            a.grad = b.grad = torch.randn_like(a)
        for optimizer in optimizers:
            optimizer.step()
    for a, b, p in zip(ours[:3], theirs, start, strict=False):
        assert (a - b).norm() < 0.02 * (b - p).norm()
    assert torch.equal(ours[3], start[3])


@pytest.mark.parametrize("capacity", [0.25, 1])
def test_muon_costs_what_the_formula_says(capacity):
    """Against torch's own counter: what a FLOPs budget would otherwise not see."""
    model = MoD(MoDConfig(**{**SMALL, "capacity": capacity}))
    muon, _ = train.make_optimizers(model, 0.1, 1, 0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert counter.get_total_flops() == train.step_flops(model, tokens=0)


def test_the_body_does_not_feel_the_choice_loss(run_train, tmp_path, monkeypatch):
    """Trap: one gradient-norm clip over both rescales the body's step by it. So each part is clipped to 1 by itself."""
    run_train("--steps=5", "--predictor", name="with")
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def look(parameters, limit):
        clip(parameters, limit)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters]).item())

    monkeypatch.setattr(train, "choice_loss", lambda route: 1e4 * route.logit.square().sum())
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    run_train("--steps=5", "--predictor", name="other")
    assert len(norms) == 5 * 3 and max(norms) == pytest.approx(1, abs=1e-3)
    a, b = load(tmp_path / "with")["model"], load(tmp_path / "other")["model"]
    assert {".predictor." in name for name in a if not torch.equal(a[name], b[name])} == {True}


# ---------------------------------------------------------------------------------------------------------
# Nothing lost: stopped, killed, resumed, refused


@pytest.mark.parametrize(
    "flag, name", [("--seed=0", "SIGINT"), ("--routing=random", "SIGTERM"), ("--predictor", "SIGHUP")]
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(run_train, tmp_path, monkeypatch, capfd, flag, name):
    """Bit for bit: weights, optimizers and log, though the signal came between two evaluations."""
    flags, number = [flag, "--steps=20", "--eval_interval=6"], getattr(signal, name)
    training_step = train.training_step

    def signalled_step(run, *args):
        if run.step == 9:
            signal.raise_signal(number)
        training_step(run, *args)

    monkeypatch.setattr(train, "training_step", signalled_step)
    before = signal.signal(number, signal.SIG_IGN)
    run_train(*flags, name="whole")  # started like this, as by nohup, it ignores the signal
    signal.signal(number, signal.default_int_handler)
    with pytest.raises(SystemExit, match="130"):  # `python train.py && python sample.py` ends there
        run_train(*flags, name="parts")
    assert signal.signal(number, before) == signal.default_int_handler
    assert "stopped at step 10, saved; go on with `python train.py --resume" in capfd.readouterr().err
    assert load(tmp_path / "parts")["step"] == 10
    (tmp_path / "parts/log.jsonl").unlink()  # it is written from what the checkpoint holds
    train.main(["--resume", f"--out={tmp_path / 'parts'}"])
    for a, b in zip(log_lines(tmp_path / "whole")[1:], log_lines(tmp_path / "parts")[1:], strict=True):
        assert {**a, "timing": None} == {**b, "timing": None}
    a, b = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert same(a["model"], b["model"])
    for x, y in zip(a["optimizers"], b["optimizers"], strict=True):
        assert all(same(p, q) for p, q in zip(x["state"].values(), y["state"].values(), strict=True))


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_and_ends_the_same(run_train, small_data, tmp_path):
    """SIGKILL, in the middle of a checkpoint too; what is lost is never more than one evaluation interval."""
    flags = ["--steps=600", "--eval_interval=5"]
    run_train(*flags, name="whole")
    out = tmp_path / "killed"
    rng, killed, done = np.random.default_rng(0), 0, 0
    command = [sys.executable, ROOT / "train.py", *TINY, f"--data={small_data}", f"--out={out}", *flags]
    while done < 600:
        resume = ["--resume"] if (out / "ckpt.pt").exists() else []
        process, before = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL), done
        while process.poll() is None and done < before + 60:  # let it get somewhere
            time.sleep(0.02)
            done = load(out)["step"] if (out / "ckpt.pt").exists() else 0
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is None:
            process.kill()
            killed += 1
        assert process.wait() in (0, -signal.SIGKILL)
        done = load(out)["step"]  # whole, whatever happened
        assert done > before
    assert killed >= 3
    for a, b in zip(load(out)["log"], log_lines(tmp_path / "whole")[1:], strict=True):
        assert a["loss"] == b["loss"] and a["val_causal"] == pytest.approx(b["val_causal"], rel=1e-6)
    assert same(load(out)["model"], load(tmp_path / "whole")["model"])
    assert not list(out.glob("*.tmp"))


def test_a_full_disk_costs_no_checkpoint(run_train, tmp_path, monkeypatch):
    run_train("--steps=4")
    before, fsync = folder(tmp_path / "run"), os.fsync

    def full(descriptor):
        if os.fstat(descriptor).st_size > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*ckpt.pt"):  # which is one line by prepare_data.run
        run_train("--resume", "--steps=8")
    after = folder(tmp_path / "run")
    assert after["ckpt.pt"] == before["ckpt.pt"] and set(after) == set(before)


@pytest.mark.parametrize("in_training", [True, False])
def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(run_train, tmp_path, monkeypatch, in_training):
    run_train("--steps=10", "--eval_interval=5")
    before, forward = folder(tmp_path / "run"), MoD.forward

    def poisoned(model, *args, **options):
        logits, loss, route = forward(model, *args, **options)
        return logits, loss + torch.nan if model.training == in_training else loss, route  # gradients stay finite

    monkeypatch.setattr(MoD, "forward", poisoned)
    with pytest.raises(UserError, match=r"loss is nan by step 15; nothing since the last save was saved"):
        run_train("--resume", "--steps=20", "--eval_interval=5")
    assert folder(tmp_path / "run")["ckpt.pt"] == before["ckpt.pt"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA\nSee"), RuntimeError("CPU: can't allocate memory: you")]
)
def test_out_of_memory_says_what_to_do_and_loses_nothing(run_train, tmp_path, monkeypatch, error):
    evaluate = train.evaluate

    def fail_at_the_end(model, data, tokens, *args):
        if tokens == train.FINAL_EVAL_TOKENS:
            raise error
        return evaluate(model, data, tokens, *args)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="out of memory.*--batch_size.*--accumulate"):
        patch.setattr(train, "evaluate", fail_at_the_end)
        run_train("--steps=8", "--eval_interval=4")
    assert load(tmp_path / "run")["step"] == 8
    assert run_train("--resume", "--accumulate=2")["step"] == 8  # it begins with that evaluation


def test_moments_follow_the_memory_order_of_their_parameters(run_train, tmp_path):
    """Fused AdamW walks raw memory: a fork that lays a weight out by columns, or a tool that writes moments back by
    rows, once went on with scrambled moments."""
    run_train("--steps=5", name="rows")
    shutil.copytree(tmp_path / "rows", tmp_path / "columns")
    checkpoint = load(tmp_path / "columns")
    for state in checkpoint["optimizers"][1]["state"].values():
        for name, value in state.items():
            if value.dim() == 2:
                state[name] = value.t().contiguous().t()
    torch.save(checkpoint, tmp_path / "columns/ckpt.pt")
    for name in ("rows", "columns"):
        run_train("--resume", "--steps=10", name=name)
    assert same(load(tmp_path / "rows")["model"], load(tmp_path / "columns")["model"])


def test_a_checkpoint_that_cannot_be_used_is_refused_in_one_line(run_train, tmp_path):
    run_train("--steps=2")
    path = tmp_path / "run" / "ckpt.pt"
    whole, checkpoint = path.read_bytes(), load(tmp_path / "run")
    for broken, reason in (
        (whole[: len(whole) // 2], ""),
        ({"model": {}}, "train"),
        ({"model": print}, "Weights only load failed"),  # or a checkpoint could run any code
        ({**checkpoint, "config": {**checkpoint["config"], "of_another_version": 1}}, "of_another_version"),
        ({**checkpoint, "config": {**checkpoint["config"], "n_embd": 32}}, "size mismatch"),
    ):
        path.write_bytes(broken) if isinstance(broken, bytes) else torch.save(broken, path)
        with pytest.raises(UserError, match=rf"damaged, or not of this version(?s:.)*{reason}.*--overwrite"):
            train.load_checkpoint(tmp_path / "run", "cpu")
    torch.save({key: value for key, value in checkpoint.items() if key != "seconds"}, path)
    with pytest.raises(UserError, match="damaged, or not of this version.*seconds"):  # which only training needs
        run_train("--resume", "--steps=4")
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="ckpt.pt"):  # not "damaged", which would have a good one overwritten
        train.load_checkpoint(tmp_path / "run", "cpu")


def test_a_run_is_neither_overwritten_nor_changed_by_accident_nor_by_two_at_once(run_train, tmp_path):
    run_train("--steps=2")
    before = folder(tmp_path / "run")
    for flags, message in (
        (["--steps=2"], "holds a run"),
        (["--resume", "--lr=0.5"], "--lr 0.5 differs"),
        (["--resume", "--steps=1"], "--steps 1 differs.* can only be raised"),
        (["--resume", "--overwrite", "--steps=4"], "give one of them"),
    ):
        with pytest.raises(UserError, match=message):
            run_train(*flags)
    assert folder(tmp_path / "run") == before
    (tmp_path / "run/log.jsonl").unlink()  # as if killed before it was written
    with pytest.raises(UserError, match="has done 2 of 2 steps"):
        run_train("--resume")
    assert log_lines(tmp_path / "run")[-1]["step"] == 2
    with train.Team("cpu").sole_writer(tmp_path / "run"), pytest.raises(UserError, match="another run is writing into"):
        run_train("--resume", "--steps=4")
    assert run_train("--resume", "--steps=4")["step"] == log_lines(tmp_path / "run")[0]["steps"] == 4
    assert run_train("--steps=3", "--overwrite")["step"] == 3


def test_a_folder_that_cannot_be_written_is_found_out_before_the_first_step(run_train, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "run/log.jsonl").mkdir(parents=True)
    monkeypatch.delattr(train, "training_step")
    for name in ("file/run", "run"):
        with pytest.raises(OSError, match=name):
            run_train("--steps=2", name=name)


def test_a_run_goes_on_when_moved_with_its_own_text_and_a_newer_flag(run_train, small_data, tmp_path, monkeypatch):
    run_train("--steps=2")
    checkpoint = load(tmp_path / "run")
    del checkpoint["train"]["weight_decay"]  # as if that flag were newer than the run
    torch.save(checkpoint, tmp_path / "run/ckpt.pt")
    monkeypatch.chdir(tmp_path)
    shutil.move("run", "out/mod")
    shutil.copytree(small_data, "moved")
    train.main(["--resume", "--data=moved", "--weight_decay=0.1", "--steps=4"])
    assert load(tmp_path / "out/mod")["step"] == 4
    meta = json.loads((tmp_path / "moved/meta.json").read_text(encoding="utf-8"))
    (tmp_path / "moved/meta.json").write_text(json.dumps({**meta, "sha256": "0" * 64}), encoding="utf-8")
    with pytest.raises(UserError, match="not what the run began with"):
        train.main(["--resume", "--steps=6"])


def test_default_data_that_was_not_finished_is_prepared_again(tmp_path, monkeypatch):
    """A folder without meta.json, left by a first run that was stopped, once was an error instead."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/stdlib").mkdir(parents=True)
    monkeypatch.setattr(train, "prepare", lambda: sys.exit("prepared"))
    with pytest.raises(SystemExit, match="prepared"):
        train.main(["--device=cpu"])


def test_a_run_goes_on_when_nobody_reads_along(run_train, tmp_path, monkeypatch):
    """python train.py 2>&1 | head; or the terminal was closed."""

    def gone(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=gone, flush=gone, isatty=lambda: True))
    with contextlib.suppress(OSError):  # of the text that it prints when all is saved
        run_train("--steps=2")
    assert load(tmp_path / "run")["step"] == 2


# ---------------------------------------------------------------------------------------------------------
# Several processes, and compiling


@pytest.mark.parametrize("environment", [{"RANK": "x"}, {"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}])
def test_half_an_environment_of_torchrun_is_refused(run_train, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start with torchrun, or unset RANK"):
        run_train("--steps=1")


def test_two_processes_in_two_parts_each_train_what_one_does(run_train, small_data, tmp_path):
    """torchrun over gloo, 4 of 6 steps, then one process: the losses of one process within rounding, one log."""
    run_train("--steps=6", "--eval_interval=2", name="one")
    (tmp_path / "stopped.py").write_text(
        f"import signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\ntraining_step = train.training_step\n"
        "def stopping(run, *args):\n    if run.step == 3:\n        signal.raise_signal(signal.SIGTERM)\n"
        "    training_step(run, *args)\ntrain.training_step = stopping\ntrain.main(sys.argv[1:])\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [tmp_path / "stopped.py", *TINY, f"--data={small_data}", f"--out={tmp_path / 'two'}"]
    command += ["--steps=6", "--eval_interval=2", "--accumulate=2"]
    result = subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert re.search(r"exitcode *: 130", result.stderr), result.stderr
    assert load(tmp_path / "two")["step"] == 4
    train.main(["--resume", f"--out={tmp_path / 'two'}"])
    for a, b in zip(log_lines(tmp_path / "one")[1:], log_lines(tmp_path / "two")[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["choice_loss"] == pytest.approx(b["choice_loss"])
        assert a["val_topk"] == pytest.approx(b["val_topk"], abs=1e-3)


@pytest.mark.slow
def test_a_compiled_run_compiles_once_and_learns_what_an_eager_one_does(run_train, tmp_path):
    """Over steps, evaluations between them, and top-k routing of other tokens each time."""
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    counters.clear()
    flags = ["--steps=8", "--eval_interval=2"]
    run_train(*flags, "--compile", name="compiled")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch._dynamo.reset()
    run_train(*flags, "--no-compile", name="eager")
    for a, b in zip(log_lines(tmp_path / "compiled")[1:], log_lines(tmp_path / "eager")[1:], strict=True):
        for name in ("loss", "val_topk", "val_causal"):
            assert a[name] == pytest.approx(b[name], rel=1e-2)


@pytest.mark.slow
def test_memory_stays_flat(run_train, tmp_path):
    """Over 600 training steps, and 3,000 tokens; the first ones, which fill caches and pools, don't count."""
    resource = pytest.importorskip("resource")

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    run_train("--steps=200", "--eval_interval=20", name="warm")
    before = peak()
    run_train("--steps=600", "--eval_interval=20", name="long")
    model, _ = train.load_checkpoint(tmp_path / "long", "cpu")
    for _ in model.generate(torch.zeros(2, 5, dtype=torch.long), 3000):
        pass
    assert peak() - before < 30, f"{peak() - before:.0f} MiB more"

"""train.py: what it trains and evaluates, what its figures mean, what its flags do, and that nothing is lost."""

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import pty
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
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import prepare_data
import train
from mod import Block, MoD, MoDConfig, choice_loss
from prepare_data import UserError, load_data

SMALL = dict(vocab_size=29, block_size=24, n_layer=4, n_head=2, n_embd=16, capacity=0.25)


def load(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def same(a, b):
    """Two dicts of tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_clock(lines):
    return [{key: value for key, value in line.items() if key not in ("timing", "train")} for line in lines]


@pytest.fixture
def forwards(monkeypatch):
    """A list of what each forward of the model was given: (training, idx, targets)."""
    forward, seen = MoD.forward, []

    def record(model, idx, targets=None, **options):
        seen.append((model.training, idx.clone(), targets))
        return forward(model, idx, targets, **options)

    monkeypatch.setattr(MoD, "forward", record)
    return seen


def stop_at(monkeypatch, step, number):
    """Raise a signal in that step of every run."""
    training_step = train.training_step

    def stopping(run, *args):
        if run.step == step:
            signal.raise_signal(number)
        training_step(run, *args)

    monkeypatch.setattr(train, "training_step", stopping)


# ---------------------------------------------------------------------------------------------------------
# What is trained on and evaluated on, and what is reported


def test_trains_on_the_training_text_and_evaluates_on_the_other(run_train, forwards):
    """In small_data the one has no upper-case letter, the other no lower-case one. Targets are the next tokens."""
    last = run_train("--steps=60", "--eval_interval=30")
    letters = {True: b"", False: b""}
    for training, idx, targets in forwards:
        if targets is not None:  # else it writes a sample
            letters[training] += bytes(idx.flatten().tolist())
            assert torch.equal(idx[:, 1:], targets[:, :-1])
    assert letters[True].islower() and letters[False].isupper()
    assert last["loss"] < last["val_causal"] - 1


@pytest.mark.parametrize("flags", [dict(), dict(predictor=True), dict(routing="random")])
def test_an_evaluation_reports_what_it_says(small_data, flags):
    """Each figure again, by loops over one window at a time; a model that decides both ways in each block."""
    torch.manual_seed(1)
    model = MoD(MoDConfig(vocab_size=257, block_size=32, n_layer=4, n_head=2, n_embd=16, capacity=0.25, **flags))
    for p in model.parameters():
        p.data.normal_(std=p.size(-1) ** -0.5)
    data, autocast = load_data(small_data)[1], contextlib.nullcontext
    before = torch.get_rng_state()
    result = train.evaluate(model, data, 1000, autocast, batch_size=1)
    assert torch.equal(before, torch.get_rng_state())
    text = train.spread_windows(data, 32, 1000)
    assert len(text) == 31 and text[0, 0] == data[0] and text[-1, -1] == data[-1]
    torch.manual_seed(0)
    losses, agree, recall, share, taken_in_all = torch.zeros(3), torch.zeros(2), torch.zeros(2), torch.zeros(2), 0
    for window in text[:, None]:
        x, y = window[:, :-1], window[:, 1:]
        modes = {}, {"causal": True}, {"causal": True, "threshold": math.inf}
        outputs = [model(x, causal=mode.get("causal", False), threshold=mode.get("threshold", 0.0)) for mode in modes]
        losses += torch.stack([F.cross_entropy(logits[0], y[0]) for logits, _, _ in outputs]).detach()
        topk, causal, skip = (route for _, _, route in outputs)
        assert not skip.taken.any()
        for layer in range(2):
            for t in range(32):
                yes, taken = (topk.logit[layer, 0, t] > 0).item(), topk.taken[layer, 0, t].item()
                agree[layer] += yes == taken
                recall[layer] += yes and taken
                share[layer] += causal.taken[layer, 0, t]
        taken_in_all += 8  # of each block
    assert [result[name] for name in ("val_topk", "val_causal", "val_skip")] == pytest.approx((losses / 31).tolist())
    assert result["agree"] == pytest.approx((agree / 31 / 32).tolist())
    assert result["recall"] == pytest.approx((recall / taken_in_all).tolist())
    assert result["share"] == pytest.approx((share / 31 / 32).tolist())
    assert len({tuple(result[name]) for name in ("agree", "recall", "share")}) == 3  # or they might be mixed up
    batched = train.evaluate(model, data, 1000, autocast, batch_size=7)
    if not flags.get("routing"):  # whose noise depends on the batch
        assert batched["val_causal"] == pytest.approx(result["val_causal"])


def test_a_log_line_says_what_happened_since_the_last(run_train, tmp_path, forwards):
    """loss and choice_loss are means over the steps since the line before; FLOPs by the formula, Muon's included."""
    run_train("--steps=6", "--eval_interval=1", name="each")
    run_train("--steps=6", "--eval_interval=3", name="third")
    header, *each = log_lines(tmp_path / "each")
    _, *third = log_lines(tmp_path / "third")
    for i, line in enumerate(third):
        for name in ("loss", "choice_loss"):
            assert line[name] == pytest.approx(sum(entry[name] for entry in each[3 * i : 3 * i + 3]) / 3)
    for name in ("agree", "recall", "share"):
        assert len(third[0][name]) == 2
    model = MoD(MoDConfig(**header["model"]))
    with FlopCounterMode(display=False) as counter:  # it counts attention in full, and no optimizer
        model(torch.zeros(4, 32, dtype=torch.long))
    expected = 3 * counter.get_total_flops() + train.step_flops(model, tokens=0)
    assert third[-1]["flops"] == 6 * train.step_flops(model, 128) == pytest.approx(6 * expected, rel=0.1)
    assert header["params"] == sum(p.numel() for p in model.parameters()) and header["steps"] == 6
    text = {len(idx) for training, idx, targets in forwards if targets is not None and not training}
    assert max(text) == 4  # sequences at once: no more than in a training step


def test_the_report_counts_bits_per_byte_and_fits_a_terminal(run_train, capfd):
    last = run_train("--steps=4", "--eval_interval=2")
    shown = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in shown] == ["2/4", "4/4"] and max(map(len, shown)) <= 100
    assert f"val {last['val_causal']:.4f} ({last['val_causal'] / math.log(2):.3f} bits/byte)" in shown[-1]
    entry = {"loss": 1.0, "val_causal": 3 * math.log(2), "timing": {"tokens_per_second": 1.0}}
    run = SimpleNamespace(log=[entry], seconds=1, step=1, steps=2, model=None, config=SimpleNamespace(seed=0))
    run.meta = {"bytes_per_val_token": 4}
    assert "(0.750 bits/byte)" in train.report(run)


def test_a_terminal_sees_a_line_at_once_and_then_each_second(small_data, tmp_path):
    """In a pseudo-terminal; elsewhere, as the test above shows, there are only whole lines."""
    leader, follower = pty.openpty()
    command = [sys.executable, ROOT / "train.py", *TINY, f"--data={small_data}", f"--out={tmp_path}", "--steps=30"]
    with subprocess.Popen(command, stderr=follower, stdout=subprocess.DEVNULL) as process:
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while part := os.read(leader, 1 << 16):
                shown += part
        os.close(leader)
        assert process.wait() == 0
    assert re.search(rb"\rstep 1/30  loss \d.\d{3}  [\d,]+ tokens/s  \d+ s left\x1b\[K", shown)
    assert shown.count(b"\rstep ") < 30 / 2


def test_a_sample_is_drawn_in_eval_mode_and_training_goes_on():
    """What counts in training, as dropout or a balance of experts in a fork, once ran while a sample was shown."""
    model, modes = MoD(MoDConfig(n_layer=2, n_head=2, n_embd=16)), []
    model.blocks[0].register_forward_pre_hook(lambda block, _: modes.append(block.training))
    text = train.write(model, {"tokenizer": "bytes", "prompt": "def "}, 5, seed=0)
    assert text.startswith("def ") and len(modes) == 5 and not any(modes) and model.training


@pytest.mark.parametrize("flags", ["--capacity=1", "--route_every=5"])
def test_a_dense_run_has_one_validation_loss(run_train, capfd, flags):
    """Also where no block happens to be routed, which is said."""
    last = run_train("--steps=4", flags)
    assert last["val_topk"] == last["val_causal"] == last["val_skip"] and "agree" not in last
    assert ("no block is routed" in capfd.readouterr().err) == (flags == "--route_every=5")


# ---------------------------------------------------------------------------------------------------------
# What each flag does


def observe(monkeypatch, small_data, out, *flags):
    """What can be seen of three steps: a dict of everything that a flag may change."""
    seen = {"batches": [], "parts": [], "noise": [], "rates": [], "dtype": [], "compiled": False}
    training_step, forward, linear = train.training_step, MoD.forward, torch.nn.Linear.forward

    def record_step(run, *args):
        if run.step == 0:
            seen["weights"] = sum(p.double().abs().sum().item() for p in run.model.parameters())
        training_step(run, *args)
        groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
        seen["rates"].append([group["lr"] / groups[0]["lr"] for group in groups])
        seen["peak"] = max(seen.get("peak", 0), groups[0]["lr"])
        seen["decay"] = [group["weight_decay"] for group in groups]

    def record_forward(model, idx, *args, **options):
        if model.training:
            seen["batches"] += idx.tolist()
            seen["parts"].append(tuple(idx.shape))
            seen["noise"].append(torch.initial_seed())
        return forward(model, idx, *args, **options)

    def record_linear(layer, x):
        y = linear(layer, x)
        if layer.training and layer.out_features > 1:
            seen["dtype"].append(y.dtype)
        return y

    def compiled(model, **options):
        seen["compiled"] = options == {"fullgraph": True}
        return model

    with monkeypatch.context() as patch:
        patch.setattr(train, "write", lambda *_: "")
        patch.setattr(train, "training_step", record_step)
        patch.setattr(MoD, "forward", record_forward)
        patch.setattr(torch.nn.Linear, "forward", record_linear)
        patch.setattr(torch, "compile", compiled)
        patch.setattr(shutil, "which", lambda name: name)  # a C++ compiler, say
        given = {flag.split("=")[0] for flag in flags}
        usual = [f for f in [*TINY, f"--data={small_data}", f"--out={out}", "--steps=3", "--eval_interval=3"]]
        with contextlib.suppress(UserError, SystemExit):
            budget = ["--steps=3"] if "--flops" in given else []
            train.main([f for f in usual if f not in budget and f.split("=")[0] not in given] + list(flags))
    header, *lines = log_lines(out)
    seen |= {"model": header["model"], "steps": header["steps"], "evaluated": [line["step"] for line in lines]}
    seen["dtype"] = set(seen["dtype"])
    return {key: repr(value) for key, value in seen.items()}


SHAPE, LENGTH = {"model", "weights"}, {"steps", "batches", "parts", "noise", "rates", "evaluated"}
EFFECTS = {  # of each flag: a value that is not the usual one, and what it changes, and nothing else
    "preset": ("gpu", {"peak", "rates"}),  # with the sizes given
    "steps": ("4", LENGTH),
    "flops": ("2.4e7", LENGTH),
    "capacity": ("0.5", {"model"}),
    "route_every": ("4", SHAPE),
    "routing": ("random", {"model"}),
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


@pytest.mark.parametrize("flag", EFFECTS)
def test_a_flag_changes_what_it_says_and_nothing_else(monkeypatch, small_data, tmp_path, flag):
    value, effects = EFFECTS[flag]
    usual = observe(monkeypatch, small_data, tmp_path / "usual")
    other = observe(monkeypatch, small_data, tmp_path / "other", f"--{flag}" if value is None else f"--{flag}={value}")
    assert {key for key in usual if usual[key] != other[key]} == effects


def test_every_flag_has_a_test():
    """data, out, device, resume and overwrite have tests of their own in this file."""
    others = {"data", "out", "device", "resume", "overwrite"}
    assert set(EFFECTS) | others == {field.name for field in dataclasses.fields(train.TrainConfig)}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps=0"], "--steps 0 must be above 0"),
        (["--flops=10"], "less than one step"),
        (["--steps=5", "--flops=1e12"], "two budgets"),
        (["--n_embd=17"], "n_embd 17 must be a multiple"),
        (["--weight_decay=-0.1"], "--weight_decay -0.1"),
        (["--seed=-1"], "--seed -1"),
        (["--batch_size=5", "--accumulate=2"], "--batch_size 5 doesn't divide"),
        (["--block_size=100000"], "--block_size 100000 needs more tokens for validation than"),
        (["--device=nonsense"], "device 'nonsense'"),
        (["--data=nowhere"], "no prepared data in nowhere"),
        (["--resume", "--out=no where"], "train one with `python train.py --out 'no where'`"),
    ],
)
def test_bad_flags(run_train, tmp_path, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run_train(*flags) if "--flops" in flags[0] else run_train("--steps=1", *flags)
    assert not (tmp_path / "run").exists()


def test_compiling_without_a_compiler_is_refused(run_train, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs a C.. compiler"):
        run_train("--steps=1", "--compile")


def test_a_gpu_that_only_emulates_bfloat16_trains_in_float32(monkeypatch):
    def dtype(native):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
        )
        return train.fill_in(train.TrainConfig(), torch.device("cuda")).dtype

    assert (dtype(native=True), dtype(native=False)) == ("bfloat16", "float32")


# ---------------------------------------------------------------------------------------------------------
# The parts of a step


def test_batches_are_fixed_by_seed_and_step():
    data = np.arange(1000, dtype=np.uint16)
    x, y = train.get_batch(data, 16, 4, seed=1, step=5)
    assert x.shape == (4, 16) and torch.equal(x + 1, y)
    assert torch.equal(x, train.get_batch(data, 16, 4, seed=1, step=5)[0])
    assert not torch.equal(x, train.get_batch(data, 16, 4, seed=1, step=6)[0])
    assert not torch.equal(x, train.get_batch(data, 16, 4, seed=2, step=5)[0])
    starts = {train.get_batch(np.arange(18), 16, 1, 0, step)[0][0, 0].item() for step in range(40)}
    assert starts == {0, 1}  # the last window, which ends with the last token, is drawn too


def test_the_schedule_rises_for_a_hundredth_and_falls_to_nothing():
    rates = [train.learning_rate(step, 10_000, 2.0) for step in range(10_000)]
    assert rates[0] == pytest.approx(0.02) and rates[99] == rates[100] == 2.0
    assert rates[5050] == pytest.approx(1.0) and rates[-1] == pytest.approx(2 / 9900)
    assert train.learning_rate(0, 100, 1.0) == 1 / 20 and train.learning_rate(0, 5, 1.0) == 1 / 5


def test_every_parameter_has_one_optimizer_and_its_own_rate():
    model = MoD(MoDConfig(**SMALL, predictor=True))
    muon, adamw = train.make_optimizers(model, router_lr_scale=0.1, routed_lr_scale=0.5, weight_decay=0.3)
    assert isinstance(muon, train.Muon) and adamw.defaults["betas"] == (0.9, 0.95)
    found = {}
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert id(p) not in found
                found[id(p)] = optimizer is muon, group["scale"], group["weight_decay"]
    for name, p in model.named_parameters():
        dense_matrix = name.startswith(("blocks.0", "blocks.2"))
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


def test_gains_that_a_fork_adds_start_at_one_and_are_no_matrices(monkeypatch):
    class Gained(Block):
        def __init__(self, n_embd, n_head):
            super().__init__(n_embd, n_head)
            self.gain = torch.nn.Parameter(torch.ones(n_embd))

    monkeypatch.setattr("mod.Block", Gained)
    model = MoD(MoDConfig(**SMALL))
    assert all((gain == 1).all() for gain in (model.blocks[0].gain, model.blocks[1].block.gain))
    assert all(p.dim() == 2 for p in train.muon_matrices(model))


@pytest.mark.parametrize("flags, steps, learns", [(["--predictor"], 5, ".predictor."), ([], 1, ".router.")])
def test_the_body_does_not_feel_the_choice_loss(run_train, tmp_path, monkeypatch, flags, steps, learns):
    """Trap: one gradient-norm clip over both rescales the body's step by it. (A router then chooses otherwise.)"""
    run_train(f"--steps={steps}", *flags, name="with")
    monkeypatch.setattr(train, "choice_loss", lambda route: 100 * route.logit.square().sum())
    run_train(f"--steps={steps}", *flags, name="other")
    a, b = load(tmp_path / "with")["model"], load(tmp_path / "other")["model"]
    assert any(not torch.equal(a[name], b[name]) for name in a if learns in name)
    assert all(torch.equal(a[name], b[name]) for name in a if learns not in name)


def test_gradients_are_clipped(run_train, monkeypatch):
    """However large they were: body, routers and predictors have a norm of 1 each."""
    monkeypatch.setattr(train, "choice_loss", lambda route: 1e6 * choice_loss(route))
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def look(parameters, limit):
        parameters = list(parameters)
        before = clip(parameters, limit).item()
        norms.append((before, torch.stack([p.grad.norm() for p in parameters]).norm().item()))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    run_train("--steps=1", "--predictor")
    assert len(norms) == 3 and all(after <= 1.001 for _, after in norms) and any(before > 100 for before, _ in norms)


def test_random_routing_draws_anew_for_each_step(run_train, monkeypatch):
    forward, taken = MoD.forward, []

    def record(model, *args, **options):
        result = forward(model, *args, **options)
        if model.training:
            taken.append(result[2].taken)
        return result

    monkeypatch.setattr(MoD, "forward", record)
    run_train("--steps=3", "--routing=random")
    assert len(taken) == 3 and not any(torch.equal(a, b) for a, b in itertools.combinations(taken, 2))


def test_accumulation_changes_nothing(run_train, tmp_path):
    """But rounding, which Muon makes visible after some steps."""
    whole, parts = (run_train("--steps=2", f"--accumulate={n}", name=f"{n}") for n in (1, 4))
    assert parts["loss"] == pytest.approx(whole["loss"]) and parts["choice_loss"] == pytest.approx(whole["choice_loss"])
    a, b = load(tmp_path / "1")["model"], load(tmp_path / "4")["model"]
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


# ---------------------------------------------------------------------------------------------------------
# Nothing lost: stopped, killed, resumed, refused


@pytest.mark.parametrize("flags", [[], ["--routing=random"], ["--predictor"]])
def test_a_resumed_run_equals_an_uninterrupted_one(run_train, tmp_path, monkeypatch, flags):
    """Bit for bit: weights, optimizers and log, though Ctrl-C came between two evaluations."""
    flags = [*flags, "--steps=20", "--eval_interval=6"]
    run_train(*flags, name="whole")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        stop_at(patch, 9, signal.SIGINT)
        run_train(*flags, name="parts")
    assert load(tmp_path / "parts")["step"] == 10
    (tmp_path / "parts/log.jsonl").unlink()  # it is written from what the checkpoint holds
    train.main(["--resume", f"--out={tmp_path / 'parts'}"])
    assert without_clock(log_lines(tmp_path / "parts")) == without_clock(log_lines(tmp_path / "whole"))
    a, b = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert same(a["model"], b["model"])
    for x, y in zip(a["optimizers"], b["optimizers"], strict=True):
        assert all(same(p, q) for p, q in zip(x["state"].values(), y["state"].values(), strict=True))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_leaves(run_train, tmp_path, monkeypatch, capfd, name):
    number = getattr(signal, name)
    before = signal.signal(number, lambda *_: None)
    stop_at(monkeypatch, 3, number)
    with pytest.raises(SystemExit, match="130"):  # `python train.py && python sample.py` ends there
        run_train("--steps=100")
    assert load(tmp_path / "run")["step"] == 4
    assert "stopped at step 4, saved; go on with `python train.py --resume" in capfd.readouterr().err
    assert signal.signal(number, before) != before


def test_an_ignored_signal_is_ignored(run_train, monkeypatch):
    """nohup python train.py: the run outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop_at(monkeypatch, 3, signal.SIGHUP)
    try:
        assert run_train("--steps=6")["step"] == 6
    finally:
        signal.signal(signal.SIGHUP, before)


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
        with open(tmp_path / "stderr.txt", "wb") as errors:
            process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=errors)
            before = done
            while process.poll() is None and done < before + 60:  # let it get somewhere
                time.sleep(0.02)
                done = load(out)["step"] if (out / "ckpt.pt").exists() else 0
            time.sleep(rng.uniform(0, 0.1))
            if process.poll() is None:
                process.kill()
                killed += 1
            assert process.wait() in (0, -signal.SIGKILL), (tmp_path / "stderr.txt").read_text()
        done = load(out)["step"]  # whole, whatever happened
        assert done > before
    assert killed >= 3
    for a, b in zip(load(out)["log"], log_lines(tmp_path / "whole")[1:], strict=True):
        assert a["loss"] == b["loss"] and a["val_causal"] == pytest.approx(b["val_causal"], rel=1e-6)
    assert same(load(out)["model"], load(tmp_path / "whole")["model"])
    assert not list(out.glob("*.tmp"))


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(run_train, tmp_path, monkeypatch, capfd):
    run_train("--steps=4")
    before = folder(tmp_path / "run")["ckpt.pt"]
    real_fsync = os.fsync

    def full(descriptor):
        if os.fstat(descriptor).st_size > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", f"--out={tmp_path / 'run'}", "--steps=8"])
    with pytest.raises(SystemExit, match="2"):
        prepare_data.run(train.main)
    error = f"error: [Errno 28] No space left on device: {str(tmp_path / 'run' / 'ckpt.pt')!r}"
    assert capfd.readouterr().err.splitlines()[-1] == error
    after = folder(tmp_path / "run")
    assert after["ckpt.pt"] == before and set(after) == {"ckpt.pt", "log.jsonl"}


@pytest.mark.parametrize("in_training", [True, False])
def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(run_train, tmp_path, monkeypatch, in_training):
    run_train("--steps=10", "--eval_interval=5")
    before, forward = load(tmp_path / "run"), MoD.forward

    def poisoned(model, *args, **options):
        logits, loss, route = forward(model, *args, **options)
        return logits, loss * torch.nan if model.training == in_training else loss, route

    monkeypatch.setattr(MoD, "forward", poisoned)
    with pytest.raises(UserError, match=r"loss is nan by step 1[25]; nothing since the last save was saved"):
        train.main(["--resume", "--steps=20", f"--out={tmp_path / 'run'}"])
    after = load(tmp_path / "run")
    assert after["step"] == 10 and same(before["model"], after["model"])


CPU_MEMORY = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nSee"), RuntimeError(CPU_MEMORY)])
def test_out_of_memory_says_what_to_do_and_loses_nothing(run_train, tmp_path, monkeypatch, error):
    """Here in the last evaluation, which the run then goes on with."""
    evaluate = train.evaluate

    def fail(model, data, tokens, *args):
        if tokens == train.FINAL_EVAL_TOKENS:
            raise error
        return evaluate(model, data, tokens, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", fail)
        with pytest.raises(UserError, match=r"out of memory.*--batch_size.*--accumulate"):
            run_train("--steps=8", "--eval_interval=4", name="parts")
    assert load(tmp_path / "parts")["step"] == 8
    train.main(["--resume", "--accumulate=1", f"--out={tmp_path / 'parts'}"])
    run_train("--steps=8", "--eval_interval=4", name="whole")
    assert without_clock(log_lines(tmp_path / "parts")) == without_clock(log_lines(tmp_path / "whole"))


def test_moments_follow_the_memory_order_of_their_parameters(run_train, tmp_path):
    """Fused AdamW walks raw memory: a fork that lays a weight out by columns, or a tool that writes moments back by
    rows, once went on with scrambled moments."""
    run_train("--steps=5", name="rows")
    run_train("--steps=10", name="whole")
    checkpoint = load(tmp_path / "rows")
    for state in checkpoint["optimizers"][1]["state"].values():
        for name, value in state.items():
            if value.dim() == 2:
                state[name] = value.t().contiguous().t()
    torch.save(checkpoint, tmp_path / "rows/ckpt.pt")
    run_train("--steps=5", name="other")  # the same schedule in both
    for name in ("rows", "other"):
        train.main(["--resume", "--steps=10", f"--out={tmp_path / name}"])
    assert same(load(tmp_path / "rows")["model"], load(tmp_path / "other")["model"])
    assert all(p.is_contiguous() for p in load(tmp_path / "rows")["model"].values())


def test_checkpoints_that_cannot_be_used_are_refused_in_one_line(run_train, tmp_path):
    run_train("--steps=2")
    path = tmp_path / "run" / "ckpt.pt"
    whole, checkpoint = path.read_bytes(), load(tmp_path / "run")
    old = {**checkpoint["model"], "mix": checkpoint["model"]["mix.weight"]}
    old.pop("mix.weight")
    for broken, reason in (
        (whole[: len(whole) // 2], ""),
        (b"", ""),
        (b"not a checkpoint", ""),
        ({"model": {}}, "train"),
        ({**checkpoint, "config": {**checkpoint["config"], "of_another_version": 1}}, "of_another_version"),
        ({**checkpoint, "config": {**checkpoint["config"], "n_embd": 32}}, "size mismatch"),
        ({**checkpoint, "model": old}, "mix.weight"),
    ):
        path.write_bytes(broken) if isinstance(broken, bytes) else torch.save(broken, path)
        with pytest.raises(UserError, match=rf"damaged, or not of this version(?s:.)*{reason}.*--overwrite"):
            train.load_checkpoint(tmp_path / "run", "cpu")
    muon, adamw = checkpoint["optimizers"]
    fewer_groups = [muon, {**adamw, "param_groups": adamw["param_groups"][1:]}]
    no_clock = {key: value for key, value in checkpoint.items() if key != "seconds"}
    for broken, reason in (({**checkpoint, "optimizers": fewer_groups}, "group"), (no_clock, "seconds")):
        torch.save(broken, path)
        with pytest.raises(UserError, match=f"damaged, or not of this version.*{reason}"):
            train.main(["--resume", f"--out={tmp_path / 'run'}", "--steps=4"])
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="ckpt.pt"):  # not "damaged", which would have a good one overwritten
        train.load_checkpoint(tmp_path / "run", "cpu")


def test_checkpoints_of_a_compiled_run_are_clean(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: torch._dynamo.OptimizedModule(model, lambda f: f))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    run_train("--steps=2", "--compile")
    assert not any("_orig_mod" in name for name in load(tmp_path / "run")["model"])


def test_an_existing_run_is_neither_overwritten_nor_changed_by_accident(run_train, tmp_path):
    run_train("--steps=2")
    out = f"--out={tmp_path / 'run'}"
    for flags, message in (
        (["--steps=2", out], "holds a run"),
        (["--resume", out, "--lr=0.5"], "--lr 0.5 differs"),
        (["--resume", out, "--steps=1"], "--steps 1 differs.* can only be raised"),
        (["--resume", out], "has done 2 of 2 steps"),
        (["--resume", "--overwrite", out, "--steps=4"], "give one of them"),
    ):
        (tmp_path / "run/log.jsonl").unlink(missing_ok=True)  # as if killed before it was written
        with pytest.raises(UserError, match=message):
            train.main(flags)
        assert (tmp_path / "run/log.jsonl").exists() == (message == "has done 2 of 2 steps")
    train.main(["--resume", out, "--steps=4"])
    assert log_lines(tmp_path / "run")[0]["steps"] == load(tmp_path / "run")["step"] == 4
    assert run_train("--steps=3", "--overwrite")["step"] == 3


def test_two_runs_do_not_write_into_one_folder(run_train, tmp_path):
    with train.Team("cpu").sole_writer(tmp_path / "run"), pytest.raises(UserError, match="another run is writing into"):
        run_train("--steps=2")
    assert run_train("--steps=2")["step"] == 2


def test_a_folder_that_cannot_be_written_is_found_out_before_the_first_step(run_train, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "run/log.jsonl").mkdir(parents=True)
    monkeypatch.delattr(train, "training_step")
    for name in ("file/run", "run"):
        with pytest.raises(OSError, match=name):
            run_train("--steps=2", name=name)


def test_a_run_goes_on_with_its_own_text_wherever_that_was_moved(run_train, small_data, tmp_path, monkeypatch):
    run_train("--steps=2")
    shutil.copytree(small_data, tmp_path / "moved")
    train.main(["--resume", f"--out={tmp_path / 'run'}", f"--data={tmp_path / 'moved'}", "--steps=4"])
    meta = json.loads((tmp_path / "moved/meta.json").read_text(encoding="utf-8"))
    (tmp_path / "moved/meta.json").write_text(json.dumps({**meta, "sha256": "0" * 64}), encoding="utf-8")
    with pytest.raises(UserError, match="not what the run began with"):
        train.main(["--resume", f"--out={tmp_path / 'run'}", "--steps=6"])
    monkeypatch.chdir(tmp_path)  # the run itself may move, too
    shutil.move("run", "out/mod")
    train.main(["--resume", f"--data={small_data}", "--steps=6"])
    assert load(tmp_path / "out/mod")["step"] == 6


def test_a_run_that_is_older_than_a_flag_goes_on(run_train, tmp_path):
    run_train("--steps=2")
    checkpoint = load(tmp_path / "run")
    del checkpoint["train"]["weight_decay"]
    torch.save(checkpoint, tmp_path / "run/ckpt.pt")
    train.main(["--resume", f"--out={tmp_path / 'run'}", "--weight_decay=0.1", "--steps=4"])
    assert load(tmp_path / "run")["step"] == 4


def test_default_data_that_was_not_finished_is_prepared_again(tmp_path, monkeypatch):
    """A folder without meta.json, left by a first run that was stopped, once was an error instead."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/stdlib").mkdir(parents=True)
    calls = []
    monkeypatch.setattr(train, "prepare", lambda: calls.append("prepared"))
    with pytest.raises(UserError, match="no prepared data"):
        train.main(["--device=cpu"])
    assert calls == ["prepared"]


def test_a_run_goes_on_when_nobody_reads_along(run_train, tmp_path, monkeypatch):
    """python train.py 2>&1 | head; or the terminal was closed."""

    class Gone:
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        def flush(self):
            pass

        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Gone())
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


def test_two_processes_train_what_one_does(run_train, small_data, tmp_path):
    """torchrun over gloo, 4 of 6 steps, then one process: the losses of one process within rounding, one log."""
    run_train("--steps=6", "--eval_interval=2", name="one")
    (tmp_path / "stopped.py").write_text(
        f"import signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\ntraining_step = train.training_step\n"
        "def stopping(run, *args):\n    if run.step == 3:\n        signal.raise_signal(signal.SIGTERM)\n"
        "    training_step(run, *args)\ntrain.training_step = stopping\ntrain.main(sys.argv[1:])\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [*TINY, f"--data={small_data}", f"--out={tmp_path / 'two'}", "--steps=6", "--eval_interval=2"]
    result = subprocess.run(
        [*command, tmp_path / "stopped.py", *flags], cwd=ROOT, timeout=120, capture_output=True, text=True
    )
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

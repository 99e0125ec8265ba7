"""Train one Mixture-of-Depths model, or with --capacity 1 its dense baseline, in the same code.

    python train.py                                     prepares the default data if need be, suits the machine
    python train.py --capacity 1 --flops 2e13 --out out/dense
    python train.py --resume                            goes on where the run in out/mod was stopped
    torchrun --nproc_per_node=2 train.py                the same run on two devices

Writes out/NAME/ckpt.pt and out/NAME/log.jsonl. Losses are nats per token.
"""

import dataclasses
import io
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mod import CHOICES, Block, MoD, MoDConfig, choice_loss
from prepare_data import UserError, get_tokenizer, load_data, make_parser, option, prepare, run, write_together

# Sizes and rates that TrainConfig leaves None. cpu: minutes on two cores. gpu: as wide as nanoGPT's baby GPT, and four
# times through the default text. (Wide routed blocks want a lower rate: AdamW's steps, unlike Muon's, grow with a
# matrix's width.)
PRESETS = {
    "cpu": dict(n_layer=6, n_head=3, n_embd=96, block_size=256, batch_size=8, lr=8e-3, routed_lr_scale=0.5, steps=3000),
    "gpu": dict(
        n_layer=8, n_head=12, n_embd=384, block_size=256, batch_size=32, lr=4e-3, routed_lr_scale=0.1, steps=4000
    ),
}


@dataclass
class TrainConfig:
    preset: str | None = option(None, "sizes to start from (default: gpu on cuda and mps, else cpu)", ("cpu", "gpu"))
    data: str = option("data/stdlib", "folder that prepare_data.py wrote")
    out: str = option("out/mod", "folder for ckpt.pt and log.jsonl")
    steps: int | None = option(None, "optimizer steps (default: by preset)")
    flops: float | None = option(None, "train to this many training FLOPs instead: the fair way to compare")
    capacity: float = option(0.125, "share of a sequence that a routed block takes; 1 is the dense baseline")
    route_every: int = option(2, "every N-th block is routed")
    routing: str = option("topk", "random is the control: a choice blind to the router", CHOICES["routing"])
    causal: str = option("router", "who chooses without the future, when sampling", CHOICES["causal"])
    gate: str = option("sigmoid", "what scales a routed block's output; raw is the paper's", CHOICES["gate"])
    n_layer: int | None = option(None, "blocks, routed ones included (default: by preset)")
    n_head: int | None = option(None, "attention heads (default: by preset)")
    n_embd: int | None = option(None, "width (default: by preset)")
    block_size: int | None = option(None, "context length in tokens (default: by preset)")
    batch_size: int | None = option(None, "sequences a step, over all devices (default: by preset)")
    accumulate: int = option(1, "compute each device's share of the batch in this many parts, to save memory")
    lr: float | None = option(None, "peak learning rate (default: by preset)")
    router_lr_scale: float = option(0.1, "the routers' learning rate, as a part of the body's")
    routed_lr_scale: float | None = option(None, "the routed blocks', likewise (default: by preset)")
    weight_decay: float = option(0.1, "of matrices, but not of the routers'")
    seed: int = option(0, "of initialisation and batches")
    eval_interval: int | None = option(None, "steps between evaluations, each saved (default: a tenth of the run)")
    device: str | None = option(None, "cuda, mps or cpu (default: the best there is)")
    dtype: str | None = option(
        None, "of matrix products (default: bfloat16 where a GPU has it, else float32)", ("float32", "bfloat16")
    )
    compile: bool | None = option(None, "torch.compile the training step (default: on cuda only)")
    resume: bool = option(False, "go on from out's checkpoint, with its configuration")
    overwrite: bool = option(False, "replace the run that is in out")


# Where and how a run is computed; all else must be as it began. (Rounding may differ, and random routing's noise.)
FREE_ON_RESUME = ("data", "out", "device", "dtype", "compile", "accumulate", "resume", "overwrite")
EVAL_TOKENS, FINAL_EVAL_TOKENS = 2**14, 2**17  # validation tokens used, during the run and at its end

# ---------------------------------------------------------------------------------------------------------
# The parts of a training step


def windows(data, starts, length):
    """Tokens (len(starts), length), int64, of data from each start on."""
    return torch.from_numpy(np.stack([data[i : i + length] for i in starts]).astype(np.int64))


def spread_windows(data, block_size, tokens):
    """About that many tokens of data and the one after each, evenly spread over it: (N, block_size + 1), int64."""
    n = max(1, min(tokens, len(data) - 1) // block_size)
    starts = np.linspace(0, len(data) - 1 - block_size, n).astype(int)
    return windows(data, starts, block_size + 1)


def get_batch(data, block_size, batch_size, seed, step):
    """Random windows (batch_size, block_size) of tokens and of the tokens after them, fixed by seed and step."""
    (state,) = np.random.SeedSequence((seed, step)).generate_state(1)  # a step needs nothing but its number
    generator = torch.Generator().manual_seed(int(state))
    starts = torch.randint(len(data) - block_size, (batch_size,), generator=generator)
    tokens = windows(data, starts.tolist(), block_size + 1)
    return tokens[:, :-1], tokens[:, 1:]


class Muon(torch.optim.Optimizer):
    """Momentum, whose every step has singular values near 1 (https://kellerjordan.github.io/posts/muon/): for matrices.

    As torch.optim.Muon with steps as large as AdamW's; but that one multiplies in bfloat16, which takes a CPU without
    instructions for it ten to twenty times as long.
    """

    def __init__(self, groups, lr=1e-3, momentum=0.95, weight_decay=0.1):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                mean = self.state[p]["momentum_buffer"]
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(mean, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonalize(matrix):
    """A matrix of the same singular vectors, with values of about 0.7 to 1.2: five Newton-Schulz iterations."""
    x = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    if tall := x.size(0) > x.size(1):
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if tall else x).to(matrix.dtype)


def muon_matrices(model):
    """The matrices of the dense blocks, a list of parameters."""
    dense = (block for block in model.blocks if isinstance(block, Block))
    return [p for block in dense for p in block.parameters() if p.dim() == 2]


def make_optimizers(model, router_lr_scale, routed_lr_scale, weight_decay):
    """Muon for the matrices of the dense blocks, AdamW for the rest; "scale" multiplies a group's learning rate.

    Muon costs the same whatever the batch: little for a block that sees every token, more than the block's own FLOPs
    for one that sees an eighth.
    """
    muon = muon_matrices(model)
    of_muon = set(map(id, muon))
    rest = [(name, p) for name, p in model.named_parameters() if id(p) not in of_muon]
    routers = [p for name, p in rest if ".router." in name]
    routed = [p for name, p in rest if ".block." in name]
    others = [p for name, p in rest if ".router." not in name and ".block." not in name]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay, "scale": 1.0},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0, "scale": 1.0},
        {"params": routed, "weight_decay": weight_decay, "scale": routed_lr_scale},
        {"params": routers, "weight_decay": 0.0, "scale": router_lr_scale},
    ]
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), fused=fused)
    if not muon:  # every block is routed
        return [adamw]
    return [Muon([{"params": muon, "weight_decay": weight_decay, "scale": 1.0}]), adamw]


def dense_flops(config, T):
    """What flops_per_token is for a dense model of the same shape."""
    return dataclasses.replace(config, capacity=1.0).flops_per_token(T)


def step_flops(model, tokens):
    """FLOPs of a training step: 3 x forward, and Muon's five Newton-Schulz iterations, whatever the batch."""
    muon = sum(5 * (4 * m * m * n + 2 * m**3) for m, n in (sorted(p.shape) for p in muon_matrices(model)))
    return 3 * model.config.flops_per_token(model.config.block_size) * tokens + muon


def learning_rate(step, steps, peak):
    """Linear warm-up over the first hundredth (at least 20 steps), then a line down to 0 (arXiv:2502.15938)."""
    warmup = min(max(20, steps // 100), steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (1 - progress)


@torch.no_grad()
def evaluate(model, data, tokens, autocast):
    """Losses and routing statistics on about that many tokens, the same ones every time, evenly spread.

    Returns val_topk, val_causal, val_skip (every routed block skipped) in nats per token, and per routed
    block: agree (causal decision equals top-k's), recall (of the taken tokens), share (taken causally).
    """
    size = model.config.block_size
    text = spread_windows(data, size, tokens)
    torch.manual_seed(0)  # random routing draws its noise here
    routed = bool(model.config.routed_layers)
    ways = {"val_topk": {}}
    if routed:
        ways |= {"val_causal": {"causal": True}, "val_skip": {"causal": True, "threshold": math.inf}}
    sums, counts = dict.fromkeys(ways, 0.0), 0
    for batch in text.split(16):
        batch, routes = batch.to(model.rope.device), {}
        for way, options in ways.items():
            with autocast():
                _, loss, routes[way] = model(batch[:, :-1], batch[:, 1:], **options)
            sums[way] += loss.item() * len(batch)
        if routed:
            foreseen, taken = routes["val_topk"].logit > 0, routes["val_topk"].taken
            masks = torch.stack((foreseen == taken, foreseen & taken, taken, routes["val_causal"].taken))
            counts += masks.sum((2, 3)).cpu()  # (4, L)
    result = {way: total / len(text) for way, total in sums.items()}
    if not routed:  # one forward says it all
        return {**result, "val_causal": result["val_topk"], "val_skip": result["val_topk"]}
    agree, hit, taken, causal = counts.double()
    seen = text[:, 1:].numel()
    result["agree"] = (agree / seen).tolist()
    result["recall"] = (hit / taken).tolist()
    result["share"] = (causal / seen).tolist()
    return result


# ---------------------------------------------------------------------------------------------------------
# Checkpoints


def load_checkpoint(out, device):
    """The model in out/ckpt.pt, on device and in eval mode, and the checkpoint, a dict: config, train, step, ...

    Raises UserError if there is none or it is not a whole checkpoint of this program.
    """
    path = Path(out) / "ckpt.pt"
    quoted = shlex.quote(str(out))
    if not path.exists():
        raise UserError(f"no checkpoint {path}; train one with `python train.py --out {quoted}`")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:  # says itself what is wrong
        raise
    except Exception as error:  # whatever a truncated or foreign file makes torch.load raise
        raise UserError(
            f"{path} is damaged or no checkpoint ({type(error).__name__}); "
            f"train again with `python train.py --overwrite --out {quoted}`"
        ) from error
    try:
        model = MoD(MoDConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        checkpoint["train"] = dataclasses.asdict(TrainConfig(**checkpoint["train"]))  # a flag may be newer than the run
        checkpoint["meta"], checkpoint["step"]
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} is not of this version of mod.py and train.py ({type(error).__name__}: {reason}); "
            f"go back to that version, or train again with `python train.py --overwrite --out {quoted}`"
        ) from error
    return model.to(device).eval(), checkpoint


def read_log(out, step):
    """The evaluations in out/log.jsonl up to a step. Raises UserError if it is damaged."""
    path = out / "log.jsonl"
    if not path.exists():
        return []
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [entry for entry in entries if entry.get("step", math.inf) <= step]  # the first line has none
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); move it away to go on with a new log") from error


def pick_device(name):
    """The torch.device called name, or the best there is. Raises UserError if it isn't there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: one each
        name += f":{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device {name!r} can't be used here; cpu always can") from error


# ---------------------------------------------------------------------------------------------------------
# The run


def fill_in(config, device):
    """The same TrainConfig, with what the preset and this device decide filled in where it is None."""
    preset = config.preset or ("cpu" if device.type == "cpu" else "gpu")
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    defaults = {
        "preset": preset,
        "device": device.type,
        "dtype": "bfloat16" if bfloat16 else "float32",
        "compile": device.type == "cuda",
        **PRESETS[preset],
    }
    if config.flops is not None:
        defaults.pop("steps")
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def check(config, world):
    """Raise UserError for a value that no run can have."""
    for name in ("steps", "flops", "batch_size", "accumulate", "eval_interval", "lr"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value} must be above 0 and finite")
    for name in ("router_lr_scale", "routed_lr_scale", "weight_decay"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"--{name} {getattr(config, name)} must be 0 or above")
    if not 0 <= config.seed < 2**31:
        raise UserError(f"--seed {config.seed} must be from 0 to 2**31 - 1")
    if config.resume and config.overwrite:
        raise UserError("--resume goes on with the run in --out, --overwrite begins another; give one of them")
    if config.steps is not None and config.flops is not None:
        raise UserError("--steps and --flops are two budgets; give one of them")
    if config.compile and config.device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise UserError("--compile on a CPU needs a C++ compiler, and there is none on the PATH; take --no-compile")
    if config.batch_size % (world * config.accumulate):
        raise UserError(
            f"--batch_size {config.batch_size} doesn't divide into {world} device(s) x --accumulate {config.accumulate}"
        )


def report(result, steps, bytes_per_token):
    """One line of text for an evaluation."""
    bits = result["val_causal"] / math.log(2) / bytes_per_token
    timing = result["timing"]
    left = timing["seconds"] / result["step"] * (steps - result["step"])
    line = (
        f"step {result['step']:,} ({result['step'] / steps:.0%})  loss {result['loss']:.4f}  "
        f"val causal {result['val_causal']:.4f} ({bits:.3f} bits per byte)"
    )
    if "agree" in result:
        percent = {name: "/".join(f"{100 * x:.0f}" for x in result[name]) for name in ("agree", "recall", "share")}
        line += (
            f" top-k {result['val_topk']:.4f}  agree {percent['agree']} recall {percent['recall']} "
            f"share {percent['share']} %"
        )
    return f"{line}  {timing['tokens_per_second']:,.0f} tokens/s  {left:.0f} s left"


def train(config):
    """One run, from a TrainConfig: trains, evaluates, saves. Returns the last evaluation, a dict, or None if stopped.

    Raises UserError for a configuration or data that can't work, and when the loss is no longer finite.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    main_process = rank == 0
    device = pick_device(config.device)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    config = fill_in(config, device)
    check(config, world)
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out takes a folder")
    checkpoint = None
    if config.resume:
        model, checkpoint = load_checkpoint(out, device)
    elif (out / "ckpt.pt").exists() and not config.overwrite:
        raise UserError(f"{out} holds a run; go on with --resume, replace it with --overwrite, or name another --out")
    train_data, val_data, meta = load_data(config.data, checkpoint and checkpoint["meta"])
    if min(len(train_data), len(val_data)) <= config.block_size:
        raise UserError(
            f"--block_size {config.block_size} needs more tokens for validation than the {len(val_data)} of "
            f"{config.data}; take a shorter context or more text"
        )
    shape = {f.name: getattr(config, f.name) for f in dataclasses.fields(MoDConfig) if f.name != "vocab_size"}
    try:
        model_config = MoDConfig(vocab_size=meta["vocab_size"], **shape)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not checkpoint:
        torch.manual_seed(config.seed)
        model = MoD(model_config).to(device)
    model.train()

    tokens_per_step = config.batch_size * config.block_size
    flops_per_step = step_flops(model, tokens_per_step)
    steps = config.steps or int(config.flops // flops_per_step)
    if steps < 1:
        raise UserError(f"--flops {config.flops:.3g} is less than one step, {flops_per_step:.3g}")
    eval_interval = config.eval_interval or max(1, steps // 10)
    learns_to_choose = config.routing == "topk" and len(model_config.routed_layers) > 0

    # Clipped apart: in one norm, the gradients of what learns to choose would shrink the body's step, and so change the
    # language model.
    routers = [p for name, p in model.named_parameters() if ".router." in name]
    predictors = [p for name, p in model.named_parameters() if ".predictor." in name]
    body = [p for name, p in model.named_parameters() if ".router." not in name and ".predictor." not in name]
    optimizers = make_optimizers(model, config.router_lr_scale, config.routed_lr_scale, config.weight_decay)
    step, spent = 0, 0.0
    loss_sum, loss_count = torch.zeros(2, device=device), 0  # language model's and choice's, since the last report
    if checkpoint:
        try:
            for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            step, loss_count, spent = checkpoint["step"], checkpoint["loss_count"], checkpoint["seconds"]
            loss_sum += torch.tensor(checkpoint["loss_sum"], device=device)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{out / 'ckpt.pt'} is not of this version of train.py ({error}); go back to that version, or train "
                f"again with `python train.py --overwrite --out {shlex.quote(str(out))}`"
            ) from error
        if step >= steps:
            budget = "--steps" if config.flops is None else "--flops"
            raise UserError(
                f"{out} has done {step} of {steps} steps; ask for more with {budget} to go on (the learning rate rises "
                "again: it will not be the run that would have had so many from the start)"
            )

    network = torch.compile(model, fullgraph=True) if config.compile else model
    if world > 1:
        network = DistributedDataParallel(network)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")

    def say(text):
        if main_process:
            with suppress(OSError):  # who reads along may leave, or close the terminal; the run goes on
                print(text, file=sys.stderr, flush=True)

    def any_rank(flag):
        if world == 1:
            return bool(flag)
        flag = torch.tensor(float(bool(flag)), device=device)
        dist.all_reduce(flag)
        return flag.item() > 0

    def finite(losses):
        """The losses, if they all are finite; else UserError, before such a model is saved."""
        if not all(map(math.isfinite, losses)):
            raise UserError(
                f"the loss is {sum(losses)} by step {step}; nothing since the last save was saved: "
                f"{out / 'ckpt.pt'} is as it was. Try a lower --lr"
            )
        return losses

    def mean_losses():
        """Of the steps since the last report; loss_sum is the mean over the devices then, and may be saved."""
        if world > 1:
            dist.all_reduce(loss_sum)
            loss_sum.div_(world)
        return finite((loss_sum / max(1, loss_count)).tolist())

    def save():
        if not main_process:
            return
        checkpoint = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "config": dataclasses.asdict(model_config),
            "train": dataclasses.asdict(config),
            "meta": meta,
            "step": step,
            "loss_sum": loss_sum.tolist(),
            "loss_count": loss_count,
            "seconds": spent + time.perf_counter() - start,
        }
        whole = io.BytesIO()  # written straight to a full disk, torch.save would hide the OSError that says so
        torch.save(checkpoint, whole)
        lines = "".join(json.dumps(entry) + "\n" for entry in log).encode()
        # The log first: if the run is killed between the two, read_log drops the line that the checkpoint lacks.
        write_together({out / "log.jsonl": lines, out / "ckpt.pt": whole.getbuffer()})

    n_params = sum(p.numel() for p in model.parameters())
    relative = model_config.flops_per_token(config.block_size) / dense_flops(model_config, config.block_size)
    say(f"{device}, {config.dtype}, torch {torch.__version__}, {'compiled' if config.compile else 'eager'}")
    say(" ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items() if value is not None))
    say(
        f"{n_params:,} parameters; {steps:,} steps of {tokens_per_step:,} tokens, {steps * flops_per_step:.3g} "
        f"training FLOPs; a token costs {relative:.2f} of what a dense model of this shape spends on it"
    )
    log = [{"train": dataclasses.asdict(config), "model": dataclasses.asdict(model_config), "params": n_params,
            "steps": steps, "data_sha256": meta["sha256"], "torch": torch.__version__}]  # fmt: skip
    if checkpoint:
        log += read_log(out, step)

    out.mkdir(parents=True, exist_ok=True)  # fails now, if it must, not when there is something to lose

    # Ctrl-C and SIGTERM: finish the step, save, and leave.
    stopping = []

    def stop(number, _):
        stopping.append(True)
        say("stopping after this step; once more to stop at once, without saving")
        signal.signal(number, handlers[number])

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    start = tick = time.perf_counter()
    timed_tokens = 0
    part = slice(rank, None, world)
    try:
        while step < steps and not any_rank(stopping):
            rate = learning_rate(step, steps, config.lr)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate * group["scale"]
            x, y = get_batch(train_data, config.block_size, config.batch_size, config.seed, step)
            x, y = x[part].to(device), y[part].to(device)
            # Random routing's noise is of this step and device.
            torch.manual_seed((config.seed << 32) + step * world + rank)
            for x_part, y_part in zip(x.chunk(config.accumulate), y.chunk(config.accumulate), strict=True):
                with autocast():
                    _, loss, route = network(x_part, y_part)
                choice = choice_loss(route) if learns_to_choose else torch.zeros_like(loss)
                ((loss + choice) / config.accumulate).backward()
                loss_sum += torch.stack((loss, choice)).detach() / config.accumulate
            for parameters in (body, routers, predictors):
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step, loss_count, timed_tokens = step + 1, loss_count + 1, timed_tokens + tokens_per_step
            if step % eval_interval and step < steps:
                continue

            train_loss, learned_choice = mean_losses()  # waits for the device: the timing below is right
            seconds = time.perf_counter() - tick
            loss_sum.zero_()
            loss_count = 0
            result = {"step": step, "flops": step * flops_per_step, "loss": train_loss}
            if learns_to_choose:
                result["choice_loss"] = learned_choice
            if main_process:
                model.eval()
                result |= evaluate(model, val_data, EVAL_TOKENS if step < steps else FINAL_EVAL_TOKENS, autocast)
                model.train()
                finite([result["val_topk"], result["val_causal"]])
                elapsed = spent + time.perf_counter() - start
                speed = timed_tokens / seconds
                result["timing"] = {"tokens_per_second": speed, "seconds": elapsed}
                log.append(result)
                save()
                say(report(result, steps, meta["bytes_per_val_token"]))
            tick, timed_tokens = time.perf_counter(), 0
        if world > 1:
            dist.barrier()  # the others wait for the last evaluation: a process group must not end under it
        if step < steps:
            mean_losses()  # over the devices, and nothing is saved unless they are finite
            save()
            say(f"stopped at step {step}, saved; go on with `python train.py --resume --out {shlex.quote(str(out))}`")
            return None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if world > 1:
            network = None  # before the group that it uses, or a thread of gloo may outlive both and abort
            dist.destroy_process_group()
    return result


def resumed(given, out):
    """The configuration of the run in out, with the flags given. UserError for one that would make another run."""
    saved = load_checkpoint(out, "cpu")[1]["train"]
    for name, value in given.items():
        larger = name in ("steps", "flops") and saved[name] is not None and value >= saved[name]
        if name not in FREE_ON_RESUME and value != saved[name] and not larger:
            can = "it can only be raised" if name in ("steps", "flops") and saved[name] else "leave it out"
            raise UserError(f"--{name} {value} differs from the run in {out}, which has {saved[name]}; {can}")
    return TrainConfig(**{**saved, "overwrite": False, **given, "out": out})


def summarize(config, result):
    """Say what the run has come to, and print a sample of its text."""
    model, checkpoint = load_checkpoint(config.out, pick_device(config.device))
    losses = f"{result['val_causal']:.4f}"
    if "agree" in result:
        losses += f" causal, {result['val_topk']:.4f} top-k, {result['val_skip']:.4f} with every routed block skipped"
    print(
        f"done: {result['flops']:.3g} training FLOPs in {result['timing']['seconds']:.0f} s; validation loss {losses}. "
        f"{config.out}/ckpt.pt says, after end-of-text:",
        file=sys.stderr,
    )
    tokenizer = get_tokenizer(checkpoint["meta"]["tokenizer"])
    prompt = torch.tensor([[tokenizer.eot_token]], device=model.rope.device)
    torch.manual_seed(config.seed)
    tokens = [token.item() for token, *_ in model.generate(prompt, 400)]
    print(tokenizer.decode(tokens, errors="replace"))
    print(f"more of it: python sample.py --out {shlex.quote(config.out)}", file=sys.stderr)


def main(argv):
    parser = make_parser(TrainConfig, "Train a Mixture-of-Depths model, or its dense baseline (--capacity 1).")
    given = vars(parser.parse_args(argv))
    out = given.get("out", TrainConfig.out)
    config = resumed(given, out) if given.get("resume") else TrainConfig(**given)
    if config.data == TrainConfig.data and not (Path(config.data) / "meta.json").exists():  # it is written last
        prepare()
    try:
        result = train(config)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory ({str(error).splitlines()[0]}); take a smaller --batch_size, or --accumulate 2 or more"
        ) from error
    rank = int(os.environ.get("RANK", 0))
    if result and rank == 0:
        summarize(config, result)
    # 130 as after any Ctrl-C, so that what was to follow the run does not. (But ranks above 0 leave with 0, or torchrun
    # would end the first while it saves.)
    status = 130 if result is None and rank == 0 else 0
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(status)  # past the interpreter's end, which threads left by gloo abort now and then
    if status:
        sys.exit(status)


if __name__ == "__main__":
    run(main)

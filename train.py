"""Train one Mixture-of-Depths model, or with --capacity 1 its dense baseline, in the same code.

    python train.py                                     prepares the default data if need be, suits the machine
    python train.py --capacity 1 --flops 2e13 --out out/dense
    python train.py --resume                            goes on where the run in out/mod was stopped
    torchrun --nproc_per_node=2 train.py                the same run on two devices

Writes out/NAME/ckpt.pt and out/NAME/log.jsonl. Losses are nats per token. Read train() first.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Before torch is loaded: a thread that waits for others spins for a moment only, then gives its core up. By default it
# spins far longer, and beside other programs a step takes many times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from mod import CHOICES, Block, MoD, MoDConfig, choice_loss, flops_per_token
from prepare_data import Status, UserError, get_tokenizer, load_data, make_parser, option, prepare, write_atomic
from prepare_data import run as run_program

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
    gate: str = option("sigmoid", "what scales a routed block's output; raw is the paper's", CHOICES["gate"])
    predictor: bool = option(False, "a small MLP beside the router, not the router, makes the causal choice")
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
    compile: bool | None = option(
        None, "torch.compile the training step; on a CPU some 1.2 x, after half a minute (default: on cuda only)"
    )
    resume: bool = option(False, "go on from out's checkpoint, with its configuration")
    overwrite: bool = option(False, "replace the run that is in out")


# Where and how a run is computed; all else must be as it began. (Rounding may differ, and random routing's noise.)
FREE_ON_RESUME = ("data", "out", "device", "dtype", "compile", "accumulate", "resume", "overwrite")
ALL_THREADS = torch.get_num_threads()
EVAL_TOKENS, FINAL_EVAL_TOKENS = 2**14, 2**17  # validation tokens used, during the run and at its end

# ---------------------------------------------------------------------------------------------------------
# One training step


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


def learning_rate(step, steps, peak):
    """Linear warm-up over the first hundredth (at least 20 steps), then a line down to 0 (arXiv:2502.15938)."""
    warmup = min(max(20, steps // 100), steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (1 - progress)


def training_step(run, network, train_data, team):
    """One optimizer step of network: run's model, perhaps compiled and distributed. Adds its losses to the run's."""
    config = run.config
    rate = learning_rate(run.step, run.steps, config.lr)
    for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
        group["lr"] = rate * group["scale"]
    x, y = map(team.share, get_batch(train_data, config.block_size, config.batch_size, config.seed, run.step))
    # Random routing's noise is of this step and device.
    torch.manual_seed((config.seed << 32) + run.step * team.world + team.rank)
    for x_part, y_part in zip(x.chunk(config.accumulate), y.chunk(config.accumulate), strict=True):
        with run.autocast():
            _, loss, route = network(x_part, y_part)
        choice = choice_loss(route) if run.learns_to_choose else torch.zeros_like(loss)
        ((loss + choice) / config.accumulate).backward()
        run.loss_sum += torch.stack((loss, choice)).detach() / config.accumulate
    for parameters in run.clipped_apart:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    run.step, run.loss_count = run.step + 1, run.loss_count + 1


# ---------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, data, tokens, autocast, batch_size, status=lambda text: None):
    """Losses and routing statistics on about that many tokens, the same ones every time, evenly spread; batch_size
    sequences at once. status(text) is told how far it is.

    Returns val_topk, val_causal, val_skip (every routed block skipped) in nats per token, and per routed
    block: agree (causal decision equals top-k's), recall (of the taken tokens), share (taken causally).
    """
    size = model.config.block_size
    text = spread_windows(data, size, tokens)
    routed = bool(model.config.routed_layers)
    ways = {"val_topk": {}}
    if routed:
        ways |= {"val_causal": {"causal": True}, "val_skip": {"causal": True, "threshold": math.inf}}
    sums, counts = dict.fromkeys(ways, 0.0), 0
    device = model.rope.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # random routing draws its noise
        for i, batch in enumerate(text.split(batch_size)):
            status(f"evaluating, {i * batch_size / len(text):.0%}")
            batch, routes = batch.to(device), {}
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


def report(run):
    """The last evaluation as a line of text, and a line that the model writes."""
    last, left = run.log[-1], run.seconds / run.step * (run.steps - run.step)
    bits = last["val_causal"] / math.log(2) / run.meta["bytes_per_val_token"]
    losses = f"loss {last['loss']:.4f}  val {last['val_causal']:.4f} ({bits:.3f} bits/byte)"
    speed = f"{last['timing']['tokens_per_second']:,.0f} tokens/s"
    text = write(run.model, run.meta, 60, run.config.seed)
    return f"step {run.step:,}/{run.steps:,}  {losses}  {speed}  {left:.0f} s left\n    {text!r}"


def write(model, meta, num_tokens, seed):
    """A text that the model draws, at temperature 0.8, after a prompt that suits its data."""
    tokenizer = get_tokenizer(meta["tokenizer"])
    prompt = tokenizer.encode_ordinary(meta["prompt"]) or [tokenizer.eot_token]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.eval()  # mod.py's is the same in both modes, but a fork may have dropout
        steps = model.generate(torch.tensor([prompt], device=model.rope.device), num_tokens, temperature=0.8)
        drawn = [step.token.item() for step in steps]
        model.train()
    return meta["prompt"] + tokenizer.decode(drawn, errors="replace")


# ---------------------------------------------------------------------------------------------------------
# What a run is, and its checkpoint


class Run:
    """All that a checkpoint holds: model, optimizers, step, losses since the last evaluation, clock and log."""

    def __init__(self, config, meta, device):
        """A new run of a TrainConfig on data with this meta. Raises UserError for sizes that can't work."""
        shape = {f.name: getattr(config, f.name) for f in dataclasses.fields(MoDConfig) if f.name != "vocab_size"}
        torch.manual_seed(config.seed)
        try:
            self.model = MoD(MoDConfig(vocab_size=meta["vocab_size"], **shape)).to(device)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.config, self.meta = config, meta
        self.optimizers = make_optimizers(
            self.model, config.router_lr_scale, config.routed_lr_scale, config.weight_decay
        )
        self.step, self.log, self.evaluated = 0, [], 0  # evaluated: the step of the last evaluation
        self.loss_sum, self.loss_count = torch.zeros(2, device=device), 0  # language model's and choice's
        self.started = time.perf_counter()  # less the seconds before a resumption

        self.n_params = sum(p.numel() for p in self.model.parameters())
        self.tokens_per_step = config.batch_size * config.block_size
        self.flops_per_step = step_flops(self.model, self.tokens_per_step)
        self.steps = config.steps or int(config.flops // self.flops_per_step)
        if self.steps < 1:
            raise UserError(f"--flops {config.flops:.3g} is less than one step, {self.flops_per_step:.3g}")
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
        self.learns_to_choose = config.routing == "topk" and len(self.model.config.routed_layers) > 0
        # In one norm, the gradients of what learns to choose would shrink the body's step, and so change the language
        # model.
        parts = {"router": [], "predictor": [], "body": []}
        for name, p in self.model.named_parameters():
            parts[next((part for part in parts if f".{part}." in name), "body")].append(p)
        self.clipped_apart = list(parts.values())

    def resume(self, checkpoint):
        """Go on from a checkpoint. Raises UserError if it can't be read, or has nothing left to do."""
        out = self.config.out
        with reading_checkpoint(out):
            self.model.load_state_dict(checkpoint["model"])
            for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
                # Fused AdamW walks raw memory, so a moment must lie there as its parameter does.
                for p, moments in optimizer.state.items():
                    for key, value in moments.items():
                        if value.shape == p.shape:
                            moments[key] = torch.empty_like(p).copy_(value)
            self.step, self.log, self.loss_count = (checkpoint[name] for name in ("step", "log", "loss_count"))
            self.evaluated = self.log[-1]["step"] if self.log else 0
            self.loss_sum += torch.tensor(checkpoint["loss_sum"], device=self.loss_sum.device)
            self.started -= checkpoint["seconds"]
        if self.evaluated >= self.steps:
            self.write_log()  # which a kill may have kept from being written after the checkpoint
            budget = "--steps" if self.config.flops is None else "--flops"
            raise UserError(
                f"{out} has done {self.step} of {self.steps} steps; ask for more with {budget} to go on (the learning "
                "rate rises again: it will not be the run that would have had so many from the start)"
            )

    @property
    def seconds(self):
        return time.perf_counter() - self.started

    def save(self):
        """Write ckpt.pt, whole or not at all, and log.jsonl, which is made of what ckpt.pt holds."""
        checkpoint = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "config": dataclasses.asdict(self.model.config),
            "train": dataclasses.asdict(self.config),
            "meta": self.meta,
            "step": self.step,
            "loss_sum": self.loss_sum.tolist(),
            "loss_count": self.loss_count,
            "seconds": self.seconds,
            "log": self.log,
        }
        whole = io.BytesIO()  # written straight to a full disk, torch.save would hide the OSError that says so
        torch.save(checkpoint, whole)
        with write_atomic(Path(self.config.out) / "ckpt.pt") as file:
            file.write(whole.getbuffer())
        self.write_log()

    def write_log(self):
        """A line of JSON about the run, then one for each evaluation."""
        header = {
            "train": dataclasses.asdict(self.config),
            "model": dataclasses.asdict(self.model.config),
            "params": self.n_params,
            "steps": self.steps,
            "data_sha256": self.meta["sha256"],
            "torch": torch.__version__,
        }
        with write_atomic(Path(self.config.out) / "log.jsonl") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in (header, *self.log)).encode())

    def mean_losses(self, team):
        """The two losses, means over the steps since the last evaluation and the devices. Raises UserError if they are
        not finite, before such a model is saved."""
        team.mean_(self.loss_sum)
        return self.finite((self.loss_sum / max(1, self.loss_count)).tolist())

    def finite(self, losses):
        if not all(map(math.isfinite, losses)):
            raise UserError(
                f"the loss is {sum(losses)} by step {self.step}; nothing since the last save was saved: "
                f"{Path(self.config.out) / 'ckpt.pt'} is as it was. Try a lower --lr"
            )
        return losses

    def due(self):
        """Whether an evaluation is: at each tenth of the run, or as asked, and at first after a hundredth."""
        every = self.config.eval_interval or max(1, self.steps // 10)
        early = self.config.eval_interval is None and self.step == max(1, self.steps // 100)
        return self.evaluated < self.step and (early or self.step % every == 0 or self.step == self.steps)

    def evaluate(self, losses, val_data, batch_size, tokens_per_second, status):
        """Add an entry to the log. losses are mean_losses'; batch_size sequences are evaluated at once."""
        entry = {"step": self.step, "flops": self.step * self.flops_per_step, "loss": losses[0]}
        if self.learns_to_choose:
            entry["choice_loss"] = losses[1]
        tokens = EVAL_TOKENS if self.step < self.steps else FINAL_EVAL_TOKENS
        self.model.eval()
        try:
            entry |= evaluate(self.model, val_data, tokens, self.autocast, batch_size, status)
        except RuntimeError:  # out of memory, say: what was trained is not lost
            self.save()
            raise
        self.model.train()
        self.finite([entry["val_topk"], entry["val_causal"]])
        entry["timing"] = {"tokens_per_second": tokens_per_second, "seconds": self.seconds}
        self.log.append(entry)

    def begin_anew(self):
        """After an evaluation, on every device."""
        self.evaluated = self.step
        self.loss_sum.zero_()
        self.loss_count = 0


@contextmanager
def reading_checkpoint(out):
    """Make one UserError of whatever a truncated, foreign or older checkpoint raises."""
    try:
        yield
    except OSError:  # says itself what is wrong
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{Path(out) / 'ckpt.pt'} is damaged, or not of this version of mod.py and train.py ({reason}); go back to "
            f"that version, or train again with `python train.py --overwrite --out {shlex.quote(str(out))}`"
        ) from error


def read_checkpoint(out):
    """The dict that Run.save wrote into out, on the CPU. Raises UserError if there is none or it can't be read."""
    path = Path(out) / "ckpt.pt"
    if not path.exists():
        raise UserError(f"no checkpoint {path}; train one with `python train.py --out {shlex.quote(str(out))}`")
    with reading_checkpoint(out):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["train"] = dataclasses.asdict(TrainConfig(**checkpoint["train"]))  # a flag may be newer than the run
        return checkpoint


def load_checkpoint(out, device):
    """The model in out/ckpt.pt, on device and in eval mode, and the checkpoint, a dict. Raises UserError as
    read_checkpoint does."""
    checkpoint = read_checkpoint(out)
    with reading_checkpoint(out):
        model = MoD(MoDConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        checkpoint["meta"], checkpoint["step"]
    return model.to(device).eval(), checkpoint


# ---------------------------------------------------------------------------------------------------------
# Who else is running


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


def use_threads(tokens, n_embd):
    """Set the number of threads for steps of that many tokens on a CPU: one for little work, which is faster than two,
    else all. Leaves it as it is where OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if tokens * n_embd < 1024 else ALL_THREADS)


class Team:
    """The processes that train together, a device each: this one alone, or as many as torchrun started."""

    def __init__(self, device_name):
        self.device, self.status = pick_device(device_name), Status()
        try:
            self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
            if not 0 <= self.rank < self.world:
                raise ValueError(f"RANK is {self.rank}, WORLD_SIZE {self.world}")
            if self.world > 1:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        except ValueError as error:
            raise UserError(
                f"the environment is no whole one of torchrun's ({error}); start with torchrun, or unset RANK and "
                "WORLD_SIZE to train in one process"
            ) from error

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if self.world > 1:
            if error is None:
                dist.barrier()  # the others wait for the last evaluation: a group must not end under it
            dist.destroy_process_group()

    @property
    def leads(self):
        return self.rank == 0

    def wrap(self, network):
        return DistributedDataParallel(network) if self.world > 1 else network

    def share(self, tokens):
        """This device's rows of a batch."""
        return tokens[self.rank :: self.world].to(self.device)

    def mean_(self, tensor):
        """Replace tensor by its mean over the devices."""
        if self.world > 1:
            dist.all_reduce(tensor)
            tensor.div_(self.world)

    def any(self, flag):
        """Whether flag is true on any device."""
        if self.world == 1:
            return flag
        count = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(count)
        return count.item() > 0

    def say(self, text):
        """Print lines of text, to standard error."""
        if self.leads:
            self.status.clear()
            with suppress(OSError):  # who reads along may leave, or close the terminal; the run goes on
                print(text, file=sys.stderr, flush=True)

    @contextmanager
    def sole_writer(self, out):
        """Make the folder out, and refuse it while another run writes there (on Windows, which lacks flock, don't)."""
        Path(out).mkdir(parents=True, exist_ok=True)
        if not self.leads or fcntl is None:
            yield
            return
        folder = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing into {out}; wait for it, or name another --out") from error
        try:
            yield
        finally:
            os.close(folder)


# ---------------------------------------------------------------------------------------------------------
# The line on the terminal, and being asked to stop


class Meter:
    """The speed since the last evaluation, and a line about it on a terminal."""

    def __init__(self, run, team):
        self.run, self.team = run, team
        self.begin_anew()

    def begin_anew(self):
        self.since, self.first = time.perf_counter(), self.run.step

    @property
    def tokens_per_second(self):
        return (self.run.step - self.first) * self.run.tokens_per_step / (time.perf_counter() - self.since)

    def show(self):
        run = self.run
        if self.team.leads and self.team.status.due():
            left = run.seconds / run.step * (run.steps - run.step)
            loss = run.loss_sum[0].item() / run.loss_count  # waits for the device
            speed = f"{self.tokens_per_second:,.0f} tokens/s"
            self.team.status(f"step {run.step:,}/{run.steps:,}  loss {loss:.3f}  {speed}  {left:.0f} s left")


class StopSignals:
    """Within it, Ctrl-C, SIGTERM and a terminal that closes set asked; the second of a kind ends the program at once.
    What the program was started to ignore, as nohup does with SIGHUP, it ignores."""

    def __init__(self, say):
        self.asked, self.say, self.before = False, say, {}

    def __enter__(self):
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, _):
        self.asked = True
        self.say("stopping after this step; once more to stop at once, without saving")
        signal.signal(number, self.before[number])

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------
# The command


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
    if config.batch_size % (world * config.accumulate):
        raise UserError(
            f"--batch_size {config.batch_size} doesn't divide into {world} device(s) x --accumulate {config.accumulate}"
        )
    if config.compile and config.device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise UserError("--compile on a CPU needs a C++ compiler, and there is none on the PATH; take --no-compile")


def check_out(config):
    """Raise UserError for flags that contradict each other, or if --out can't take this run."""
    out = Path(config.out)
    if config.steps is not None and config.flops is not None:
        raise UserError("--steps and --flops are two budgets; give one of them")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out takes a folder")
    if config.resume and config.overwrite:
        raise UserError("--resume goes on with the run in --out, --overwrite begins another; give one of them")
    if (out / "ckpt.pt").exists() and not (config.resume or config.overwrite):
        raise UserError(f"{out} holds a run; go on with --resume, replace it with --overwrite, or name another --out")


def open_data(config, meta):
    """The data of a run: (train, val, meta). meta is what a resumed run began with, or None. Raises UserError."""
    train_data, val_data, meta = load_data(config.data, meta)
    if min(len(train_data), len(val_data)) <= config.block_size:
        raise UserError(
            f"--block_size {config.block_size} needs more tokens for validation than the {len(val_data)} of "
            f"{config.data}; take a shorter context or more text"
        )
    return train_data, val_data, meta


def describe(run):
    """What is about to be trained, lines of text."""
    config, shape, size = run.config, run.model.config, run.config.block_size
    how = f"{torch.get_num_threads()} thread(s), " if config.device == "cpu" else ""
    how += "compiled" if config.compile else "eager"
    relative = flops_per_token(shape, size) / dense_flops(shape, size)
    lines = [
        f"{run.loss_sum.device}, {config.dtype}, torch {torch.__version__}, {how}",
        " ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items() if value is not None),
        f"{run.n_params:,} parameters; {run.steps:,} steps of {run.tokens_per_step:,} tokens, "
        f"{run.steps * run.flops_per_step:.3g} training FLOPs",
    ]
    if shape.routed_layers:
        lines.append(f"a token costs {relative:.2f} of what a dense model of this shape spends on it")
    elif shape.capacity < 1:
        lines.append(f"dense: with --n_layer {shape.n_layer} and --route_every {shape.route_every} no block is routed")
    if config.preset == "gpu":
        lines.append("nobody has run the gpu preset to its end yet; --preset cpu makes the model that README shows")
    if run.step:
        lines.append(f"going on after step {run.step:,}")
    return "\n".join(lines)


def train(config, team, checkpoint=None):
    """One run, a new one or what a checkpoint began: trains, evaluates, saves. Returns the Run; it was asked to stop if
    its step is below its steps.

    Raises UserError for a configuration or data that can't work, and when the loss is no longer finite.
    """
    config = fill_in(config, team.device)
    check(config, team.world)
    check_out(config)
    train_data, val_data, meta = open_data(config, checkpoint and checkpoint["meta"])
    run = Run(config, meta, team.device)
    if checkpoint:
        run.resume(checkpoint)
    network = team.wrap(torch.compile(run.model, fullgraph=True) if config.compile else run.model)
    at_once = config.batch_size // (team.world * config.accumulate)  # sequences: what fits in training fits then
    use_threads(at_once * config.block_size, config.n_embd)
    team.say(describe(run))
    with team.sole_writer(config.out), StopSignals(team.say) as stop:
        if team.leads:
            run.write_log()  # fails now, if it must, not when there is something to lose
        meter = Meter(run, team)
        while True:
            if run.due():
                losses = run.mean_losses(team)  # waits for the device: the meter is right
                if team.leads:
                    run.evaluate(losses, val_data, at_once, meter.tokens_per_second, team.status)
                run.begin_anew()
                if team.leads:
                    run.save()
                    team.say(report(run))
                meter.begin_anew()
            if run.step == run.steps or team.any(stop.asked):
                break
            training_step(run, network, train_data, team)
            meter.show()
        if run.step < run.steps:
            leave_early(run, team)
    return run


def leave_early(run, team):
    """Save a run that was asked to stop."""
    run.mean_losses(team)  # nothing is saved unless they are finite
    if team.leads:
        run.save()
    again = f"python train.py --resume --out {shlex.quote(run.config.out)}"
    team.say(f"stopped at step {run.step}, saved; go on with `{again}`")


def resumed(given, out):
    """Of the run in out: its configuration, with the flags given, and its checkpoint. Raises UserError for a flag that
    would make another run."""
    checkpoint = read_checkpoint(out)
    saved = checkpoint["train"]
    for name, value in given.items():
        larger = name in ("steps", "flops") and saved[name] is not None and value >= saved[name]
        if name not in FREE_ON_RESUME and value != saved[name] and not larger:
            can = "it can only be raised" if name in ("steps", "flops") and saved[name] else "leave it out"
            raise UserError(f"--{name} {value} differs from the run in {out}, which has {saved[name]}; {can}")
    return TrainConfig(**{**saved, "overwrite": False, **given, "out": out}), checkpoint


def summarize(run):
    """Say what the run has come to, and print a sample of its text."""
    last, out = run.log[-1], shlex.quote(run.config.out)
    losses = f"{last['val_causal']:.4f}"
    if "agree" in last:
        losses += f" causal, {last['val_topk']:.4f} top-k, {last['val_skip']:.4f} with every routed block skipped"
    print(
        f"done: {last['flops']:.3g} training FLOPs in {last['timing']['seconds']:.0f} s; validation loss {losses}.\n"
        f"{run.config.out}/ckpt.pt writes:",
        file=sys.stderr,
    )
    print(write(run.model, run.meta, 400, run.config.seed))
    print(f"more: python sample.py --out {out}, with --show_depth or --html page.html to see where the compute went",
          file=sys.stderr)  # fmt: skip


@contextmanager
def explained_memory():
    """Make a UserError of running out of memory."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in reason):  # the latter on a CPU
            raise
        raise UserError(f"out of memory ({reason}); take a smaller --batch_size, or --accumulate 2 or more") from error


def main(argv):
    parser = make_parser(TrainConfig, "Train a Mixture-of-Depths model, or its dense baseline (--capacity 1).")
    given = vars(parser.parse_args(argv))
    out = given.get("out", TrainConfig.out)
    config, checkpoint = resumed(given, out) if given.get("resume") else (TrainConfig(**given), None)
    if config.data == TrainConfig.data and not (Path(config.data) / "meta.json").exists():  # it is written last
        prepare()
    with explained_memory(), Team(config.device) as team:
        run = train(config, team, checkpoint)
    ended = run.step == run.steps
    if team.leads and ended:
        summarize(run)
    # 130 as after any Ctrl-C, so that what was to follow the run does not. (But ranks above 0 leave with 0, or torchrun
    # would end the first while it saves.)
    status = 130 if team.leads and not ended else 0
    if team.world > 1:
        sys.stdout.flush()
        os._exit(status)  # past the interpreter's end, which threads left by gloo abort now and then
    if status:
        sys.exit(status)


# ---------------------------------------------------------------------------------------------------------
# FLOPs and optimizers


def dense_flops(config, T):
    """What flops_per_token is for a dense model of the same shape."""
    return flops_per_token(dataclasses.replace(config, capacity=1.0), T)


def step_flops(model, tokens):
    """FLOPs of a training step: 3 x forward, and Muon's five Newton-Schulz iterations, whatever the batch."""
    muon = sum(5 * (4 * m * m * n + 2 * m**3) for m, n in (sorted(p.shape) for p in muon_matrices(model)))
    return 3 * flops_per_token(model.config, model.config.block_size) * tokens + muon


def muon_matrices(model):
    """The matrices of the dense blocks, a list of parameters."""
    dense = (block for block in model.blocks if isinstance(block, Block))
    return [p for block in dense for p in block.parameters() if p.dim() == 2]


def make_optimizers(model, router_lr_scale, routed_lr_scale, weight_decay):
    """Muon for the matrices of the dense blocks, AdamW for the rest; "scale" multiplies a group's learning rate."""
    muon = muon_matrices(model)
    of_muon = set(map(id, muon))
    matrices, vectors, routed, routers = [], [], [], []
    for name, p in model.named_parameters():
        if id(p) in of_muon:
            continue
        group = routers if ".router." in name else routed if ".block." in name else matrices if p.dim() > 1 else vectors
        group.append(p)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "scale": 1.0},
        {"params": vectors, "weight_decay": 0.0, "scale": 1.0},
        {"params": routed, "weight_decay": weight_decay, "scale": routed_lr_scale},
        {"params": routers, "weight_decay": 0.0, "scale": router_lr_scale},
    ]
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), fused=fused)
    if not muon:  # every block is routed
        return [adamw]
    return [Muon([{"params": muon, "weight_decay": weight_decay, "scale": 1.0}]), adamw]


class Muon(torch.optim.Optimizer):
    """Momentum, whose every step has singular values near 1 (https://kellerjordan.github.io/posts/muon/): for matrices.

    Why it is here: at these sizes it learns far more a step than AdamW, for dense and MoD alike. It costs the same
    whatever the batch: little for a block that sees every token, more than the block's own FLOPs for one that sees an
    eighth, so routed blocks have AdamW. It is torch.optim.Muon with steps as large as AdamW's; but that one multiplies
    in bfloat16, which takes a CPU without instructions for it ten to twenty times as long.
    """

    def __init__(self, groups, lr=1e-3, momentum=0.95, weight_decay=0.1):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
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


if __name__ == "__main__":
    run_program(main)

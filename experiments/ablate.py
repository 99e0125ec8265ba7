"""Which recipe makes the router pay? One change at a time, each over several seeds, at equal training FLOPs.

    python experiments/ablate.py                                   all variants, three seeds; hours on two cores
    python experiments/ablate.py --only base centred --budget 2e13 --shape 6x96

Appends a line per run to assets/ablations.csv and goes on where it was stopped. What train.py has no flag for
is patched in here, so that mod.py and train.py stay what they are.
"""

import math
import sys
from pathlib import Path
from statistics import NormalDist, fmean

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mod  # noqa: E402
import train  # noqa: E402
from experiments.isoflop import text_sha256  # noqa: E402
from experiments.sweep import SCHEDULE, dense_half, parse_shape, sweep  # noqa: E402
from prepare_data import Parser, run  # noqa: E402

progress = 0.0  # of the run, 0 to 1: what the annealed variants follow


def follow_progress():
    schedule = train.learning_rate

    def learning_rate(step, steps, peak):
        global progress
        progress = step / steps
        return schedule(step, steps, peak)

    train.learning_rate = learning_rate


def detached():
    """The router learns, but its gradient does not reach the residual stream."""
    score = mod.RoutedBlock.score
    mod.RoutedBlock.score = lambda block, x: score(block, x.detach())


def centred():
    """The gate's gradient is centred over the taken tokens, so that they compete; values stay as they are."""
    gate = mod.RoutedBlock.gate

    def changed(block, r):
        if block.training:
            _, taken = block.topk(r)
            mean = (r * taken).sum() / taken.sum()
            r = r + (mean.detach() - mean)
        return gate(block, r)

    mod.RoutedBlock.gate = changed


def noise_until(end):
    """Selection by r plus Gumbel noise, which fades from nothing but noise, at first, to none at progress end."""
    topk = mod.RoutedBlock.topk

    def changed(block, r):
        share = max(0.0, 1 - progress / end)
        if block.training and share > 0:
            gumbel = -torch.empty_like(r).exponential_().log()
            r = (1 - share) * r / (r.detach().std() + 1e-6) + share * gumbel
        return topk(block, r)

    mod.RoutedBlock.topk = changed


def total_gain(share):
    """For a share of the taken tokens the output is scaled by a uniform random number, and only these teach the router.

    The gate's usual gradient is the gain at the margin, nothing for a block that has found its scale; over scales from
    0 to 1 it adds up to the whole gain over being skipped. It is centred over these tokens, so that they compete.
    """

    def gate(block, r):
        g = r.sigmoid()
        if not block.training:
            return g
        tried = (torch.rand_like(g) < share).float()
        taken = block.topk(r)[1] * tried
        mean = (r * taken).sum() / taken.sum().clamp(min=1)
        lever = (r + (mean.detach() - mean)).sigmoid()
        return g.detach() * (1 - tried * torch.rand_like(g)) + tried * (lever - lever.detach())

    mod.RoutedBlock.gate = gate


def raw_input():
    """The router reads the residual stream itself, not its normalised form. (So does the predictor.)"""

    def score(block, x):
        seen = x.float()
        return block.router(seen).squeeze(-1), (block.predictor or block.router)(seen.detach()).squeeze(-1)

    mod.RoutedBlock.score = score


def straight_through():
    """The gate is 1 for every taken token; the router learns from the gradient that a sigmoid would have had."""

    def gate(block, r):
        g = r.sigmoid()
        return 1 + (g - g.detach())

    mod.RoutedBlock.gate = gate


def small_router(scale):
    """At first r is near 0 for every token, so that their gates are alike. What top-k takes is the same."""
    init = mod.MoD.__init__

    def changed(model, config):
        init(model, config)
        for block in model.blocks:
            if isinstance(block, mod.RoutedBlock):
                block.router.weight.data *= scale

    mod.MoD.__init__ = changed


def into_body():
    """The loss that teaches a router to foresee its choice reaches the residual stream, too, as in the paper."""
    score = mod.RoutedBlock.score
    mod.RoutedBlock.score = lambda block, x: (score(block, x)[0],) * 2


def batch_topk():
    """Top-k over all sequences of the batch at once: each has as many tokens taken as it deserves, not K. (The padding
    of those that have fewer is not counted.)"""

    def topk(block, r):
        n = len(r) * max(1, round(block.capacity * r.size(1)))
        return block.above(r, threshold=r.flatten().topk(n + 1).values[-1])

    mod.RoutedBlock.topk = topk


def annealed(end):
    """Routed blocks take all tokens at first, then fewer, from progress end on their capacity. (A budget counts it.)"""
    flops_per_token = mod.flops_per_token

    def share(config, progress):
        return config.capacity + (1 - config.capacity) * max(0.0, 1 - progress / end)

    def set_capacity(model, idx):
        for i in model.config.routed_layers:
            model.blocks[i].capacity = share(model.config, progress)

    def mean_flops(config, T):
        return fmean(flops_per_token(config, T, share(config, i / 1000)) for i in range(1000))

    each_pass(set_capacity)
    train.flops_per_token = mean_flops


def each_pass(call):
    """call(model, idx) before each pass of a model, with all the text (B, T) that it has seen by then."""
    forward, extend, text = mod.MoD.forward, mod.MoD.extend, []

    def changed_forward(model, idx, *args, **options):
        call(model, idx)
        return forward(model, idx, *args, **options)

    def changed_extend(model, idx, cache, *args):
        text[cache.length :] = idx.unbind(1)
        call(model, torch.stack(text, dim=1))
        return extend(model, idx, cache, *args)

    mod.MoD.forward, mod.MoD.extend = changed_forward, changed_extend


def one_router():
    """The first routed block's router chooses for all of them, and gives their gates."""
    score, first = mod.RoutedBlock.score, []

    def changed(block, x):
        if not first:
            first.append(score(block, x))
        return first[0]

    each_pass(lambda model, idx: first.clear())
    mod.RoutedBlock.score = changed


def given(choice, noise=0.0):
    """Nothing to learn: routed blocks take the tokens whose choice(idx), (B, T), is highest, with some noise, or,
    causally, above 0; with a gate of 1."""
    logit, topk = {}, mod.RoutedBlock.topk
    each_pass(lambda model, idx: logit.update(now=choice(idx)))
    mod.RoutedBlock.score = lambda block, x: (logit["now"][:, -x.size(1) :],) * 2
    mod.RoutedBlock.topk = lambda block, r: topk(block, r + noise * torch.rand_like(r))
    mod.RoutedBlock.gate = lambda block, r: torch.ones_like(r)


def word_ends():
    """The bytes after a word (of a byte-level run), where SpaceByte has its larger blocks (arXiv:2404.14408); top-k
    leaves some out by chance, or takes others, causal does not."""

    def choice(idx):
        word = (idx >= 128) & (idx <= 255)
        for first, last in "09", "AZ", "az", "__":
            word |= (idx >= ord(first)) & (idx <= ord(last))
        after = torch.nn.functional.pad(word[:, :-1], (1, 0))
        return (after & ~word).float() - 0.5

    given(choice, noise=0.1)


def depth_gain():
    """The tokens that depth_gain.py foresaw to gain most from depth. (The FLOPs of foreseeing are not counted.)"""
    from experiments.depth_gain import saved_choice

    given(saved_choice())


def gaussian():
    """The paper's random control: a token's router weight is drawn from a Gaussian, ranks it and gates it. Causally a
    token is taken with probability capacity, as r then exceeds that quantile. Goes with routing=random, where nothing
    learns to choose."""

    def score(block, x):
        block.random = False  # topk ranks by this r
        r = torch.randn(x.shape[:2], device=x.device)
        return r, r - NormalDist().inv_cdf(1 - block.capacity)

    mod.RoutedBlock.score = score


def choice_weight(weight):
    """The loss that teaches the router to foresee its choice counts that much."""
    train.choice_loss = lambda route: weight * mod.choice_loss(route)


def muon_for_all():
    """Muon for the matrices of routed blocks as well. (A budget counts its FLOPs.)"""
    train.muon_matrices = lambda model: [p for b in model.blocks for p in getattr(b, "block", b).parameters()]


def no_mix():
    """A token's embedding has nothing of the three before it."""
    init = mod.MoD.__init__

    def changed(model, config):
        init(model, config)
        model.mix.weight.data[:] = torch.tensor([0.0, 0.0, 0.0, 1.0])
        model.mix.requires_grad_(False)

    mod.MoD.__init__ = changed


VARIANTS = {  # name: (flags, patch or None); a dense half has only the unrouted blocks
    "base": ({}, None),  # train.py's defaults
    "dense_half": ({"capacity": 1}, None),  # what is left without the routed blocks
    "dense_full": ({"capacity": 1}, None),
    "random": ({"routing": "random"}, None),
    "no_mix": ({}, no_mix),
    "no_mix_dense_half": ({"capacity": 1}, no_mix),
    "muon": ({}, muon_for_all),
    "muon_random": ({"routing": "random"}, muon_for_all),
    "gaussian_raw": ({"routing": "random", "gate": "raw"}, gaussian),
    "gaussian_sigmoid": ({"routing": "random"}, gaussian),
    "muon_gaussian_raw": ({"routing": "random", "gate": "raw"}, lambda: (muon_for_all(), gaussian())),
    "detached": ({}, detached),
    "centred": ({}, centred),
    "noise_30": ({}, lambda: noise_until(0.3)),
    "total_gain_0.25": ({}, lambda: total_gain(0.25)),
    "straight_through": ({}, straight_through),
    "small_router_0.1": ({}, lambda: small_router(0.1)),
    "together": ({}, lambda: (straight_through(), noise_until(0.3), one_router())),  # of each one's best
    "raw_gate": ({"gate": "raw"}, None),
    "into_body": ({}, into_body),
    "one_router": ({}, one_router),
    "batch_topk": ({}, batch_topk),
    "word_ends": ({}, word_ends),
    "depth_gain": ({}, depth_gain),
    "choice_0.1": ({}, lambda: choice_weight(0.1)),
    "choice_10": ({}, lambda: choice_weight(10)),
    "router_lr_1": ({"router_lr_scale": 1}, None),
    "capacity_0.03125": ({"capacity": 0.03125}, None),
    "capacity_0.0625": ({"capacity": 0.0625}, None),
    "capacity_0.25": ({"capacity": 0.25}, None),
    "capacity_0.5": ({"capacity": 0.5}, None),
    "capacity_0.999": ({"capacity": 0.999}, None),  # every token is taken, but the gate is still there
    "muon_capacity_0.5": ({"capacity": 0.5}, muon_for_all),
    "muon_capacity_0.999": ({"capacity": 0.999}, muon_for_all),
    "annealed_40": ({}, lambda: annealed(0.4)),
    "route_every_3": ({"route_every": 3}, None),
    "as_in_paper": ({"gate": "raw", "router_lr_scale": 1}, raw_input),  # its router, with --predictor
}


def main(argv):
    parser = Parser(description="Ablations of the routing recipe.")
    parser.add_argument("--budget", type=float, default=6e12, help="training FLOPs of each run")
    parser.add_argument("--shape", default="4x96", help="LAYERSxWIDTH")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.13e-2)
    parser.add_argument("--routed_lr_scale", type=float, default=0.5)
    parser.add_argument("--predictor", action="store_true", help="makes the causal choice, not the router")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default=train.TrainConfig.data, help="folder that prepare_data.py wrote")
    usual = [name for name in VARIANTS if name != "depth_gain"]  # which needs a file that depth_gain.py makes
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=usual, metavar="VARIANT")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--one", action="store_true", help="what each process is started with")
    parser.add_argument("--resume", action="store_true", help="likewise")
    args = parser.parse_args(argv)
    causal = "predictor" if args.predictor else "router"
    table = ROOT / "assets" / "ablations.csv"
    layers, width = parse_shape(args.shape)

    def out_of(name, seed):
        recipe = f"{args.shape}-{args.batch_size}-{args.lr:g}-{SCHEDULE}-{args.routed_lr_scale:g}-{causal}"
        text = "" if args.data == train.TrainConfig.data else f"-{Path(args.data).name}"
        return ROOT / "out" / "ablate" / f"{name}-{recipe}-{args.budget:g}-{seed}{text}"

    if args.one:
        (name,), (seed,) = args.only, args.seeds
        flags, patch = VARIANTS[name]
        flags = {
            "n_layer": dense_half(layers) if "dense_half" in name else layers,
            "n_head": max(2, width // 32),
            "n_embd": width,
            "batch_size": args.batch_size,
            "lr": args.lr,
            "routed_lr_scale": args.routed_lr_scale,
            **flags,
        }
        follow_progress()
        if patch:
            patch()
        argv = [f"--{flag}={value}" for flag, value in flags.items()]
        argv += [f"--seed={seed}", f"--flops={args.budget}", f"--out={out_of(name, seed)}", f"--data={args.data}"]
        train.main(argv + ["--preset=cpu"] + ["--predictor"] * args.predictor + ["--resume"] * args.resume)
        return

    sha256 = text_sha256(args.data)
    jobs = [
        {
            "key": {"variant": name, "budget": f"{args.budget:g}", "shape": args.shape,
                    "batch_size": args.batch_size, "lr": f"{args.lr:g}", "schedule": SCHEDULE,
                    "routed_lr_scale": f"{args.routed_lr_scale:g}", "causal": causal, "seed": seed,
                    "data_sha256": sha256},
            "out": out_of(name, seed),
            "command": ["experiments/ablate.py", *argv, "--one", "--only", name, "--seeds", str(seed)],
        }
        for seed in args.seeds
        for name in args.only
    ]  # fmt: skip

    def row_of(job, log):
        last = log[-1]
        return {
            **job["key"],
            "steps": last["step"],
            "flops": f"{last['flops']:.4g}",
            **{name: f"{last[name]:.4f}" for name in ("val_topk", "val_causal", "val_skip")},
            **{name: f"{fmean(last.get(name, [math.nan])):.4f}" for name in ("agree", "recall", "share")},
        }

    sweep(jobs, table, row_of, args.processes)


if __name__ == "__main__":
    run(main)

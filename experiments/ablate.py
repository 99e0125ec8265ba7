"""Which recipe makes the router pay? One change at a time, each over several seeds, at equal training FLOPs.

    python experiments/ablate.py --budget 4e12 --seeds 0 1 2 3          all variants; two minutes a run and core
    python experiments/ablate.py --only base centred --budget 2e13

Appends a line per run to assets/ablations.csv and goes on where it was stopped. What train.py has no flag for
is patched in here, so that mod.py and train.py stay what they are.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mod  # noqa: E402
import train  # noqa: E402
from experiments.sweep import sweep  # noqa: E402

progress = 0.0  # of the run, 0 to 1: what the annealed variants follow


def follow_progress():
    schedule = train.learning_rate

    def learning_rate(step, steps, peak):
        global progress
        progress = step / steps
        return schedule(step, steps, peak)

    train.learning_rate = learning_rate


def change_score(change):
    """Patch RoutedBlock.score: change(block, x, r, score, logit) returns the three anew."""
    score = mod.RoutedBlock.score
    mod.RoutedBlock.score = lambda block, x: change(block, x, *score(block, x))


def centred(block, x, r, score, logit):
    """The gate's gradient is centred over the taken tokens, so that they compete; values stay as they are."""
    taken = torch.zeros_like(r).scatter(1, score.topk(block.config.k(r.size(1)), dim=1).indices, 1.0)
    mean = (r * taken).sum() / taken.sum()
    return r + (mean.detach() - mean), score, logit


def noise_until(end, start=0.0):
    """Selection by r plus Gumbel noise; the noise fades from all there is, at first, to none at progress end."""

    def change(block, x, r, score, logit):
        share = max(0.0, 1 - max(0.0, progress - start) / (end - start))
        if not block.training or share == 0:
            return r, score, logit
        spread = r.detach().std() + 1e-6
        gumbel = -torch.empty_like(r).exponential_().log()
        return r, (1 - share) * r / spread + share * gumbel, logit

    return change


def raw_input(block, x, r, score, logit):
    """The router reads the residual stream itself, not its normalised form."""
    r = block.router(x.detach().float()).squeeze(-1)
    return r, r, logit


def attached(block, x, r, score, logit):
    """As in the paper: the router's gradient reaches the residual stream too."""
    with torch.autocast(x.device.type, enabled=False):
        r = block.router(mod.norm(x.float())).squeeze(-1)
    return (
        (r, r, r if block.predictor is None else logit)
        if block.config.routing == "topk"
        else (r, score, logit)
    )


def straight_through():
    """The gate is 1 for every taken token; the router learns from the gradient that a sigmoid would have had."""

    def gate(block, r):
        g = r.sigmoid()
        return 1 + (g - g.detach())

    mod.RoutedBlock.gate = gate


def routed_lr(scale):
    groups = train.param_groups

    def param_groups(model, router_lr_scale, weight_decay):
        made = groups(model, router_lr_scale, weight_decay)
        inside = {id(p) for n, p in model.named_parameters() if ".block." in n}
        matrices = made[0]["params"]
        made[0]["params"] = [p for p in matrices if id(p) not in inside]
        made.append({**made[0], "params": [p for p in matrices if id(p) in inside], "scale": scale})
        return made

    train.param_groups = param_groups


VARIANTS = {  # name: (flags, patch or None)
    "base": ({}, None),  # train.py's defaults
    "dense_half": ({"capacity": 1, "n_layer": 4}, None),  # what is left without the routed blocks
    "dense_full": ({"capacity": 1}, None),
    "random": ({"routing": "random"}, None),
    "attached": ({}, lambda: change_score(attached)),
    "attached_raw_gate": ({"gate": "raw"}, lambda: change_score(attached)),  # the paper, to the letter
    "attached_noise_30_centred": (
        {},
        lambda: (change_score(attached), change_score(noise_until(0.3)), change_score(centred)),
    ),
    "centred": ({}, lambda: change_score(centred)),
    "noise_30": ({}, lambda: change_score(noise_until(0.3))),
    "straight_through": ({}, straight_through),
    "raw_gate": ({"gate": "raw"}, None),
    "raw_input": ({}, lambda: change_score(raw_input)),
    "fix_1": ({"causal": "router"}, None),
    "router_lr_1": ({"router_lr_scale": 1}, None),
    "router_lr_0.03": ({"router_lr_scale": 0.03}, None),
    "router_lr_0": ({"router_lr_scale": 0}, None),
    "routed_lr_0.5": ({}, lambda: routed_lr(0.5)),
    "routed_lr_2": ({}, lambda: routed_lr(2.0)),
    "capacity_0.0625": ({"capacity": 0.0625}, None),
    "capacity_0.25": ({"capacity": 0.25}, None),
    "capacity_0.5": ({"capacity": 0.5}, None),
    "route_every_3": ({"route_every": 3}, None),
    "context_1024": ({"block_size": 1024, "batch_size": 1}, None),
    "dense_half_context_1024": ({"capacity": 1, "n_layer": 4, "block_size": 1024, "batch_size": 1}, None),
}


def main():
    parser = argparse.ArgumentParser(description="Ablations of the routing recipe.")
    parser.add_argument("--budget", type=float, default=4e12, help="training FLOPs of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--one", action="store_true", help="what each process is started with")
    parser.add_argument("--resume", action="store_true", help="likewise")
    args = parser.parse_args()
    table = ROOT / "assets" / "ablations.csv"

    def out_of(name, seed):
        return ROOT / "out" / "ablate" / f"{name}-{args.budget:g}-{seed}"

    if args.one:
        (name,), (seed,) = args.only, args.seeds
        flags, patch = VARIANTS[name]
        flags = {
            "n_layer": 8,
            "n_head": 2,
            "n_embd": 64,
            "block_size": 256,
            "batch_size": 4,
            "lr": 4e-3,
            **flags,
        }
        follow_progress()
        if patch:
            patch()
        argv = [f"--{flag}={value}" for flag, value in flags.items()]
        argv += [f"--seed={seed}", f"--flops={args.budget}", f"--out={out_of(name, seed)}", "--preset=cpu"]
        train.main(argv + (["--resume"] if args.resume else []))
        return

    jobs = [
        {
            "key": {"variant": name, "budget": f"{args.budget:g}", "seed": seed},
            "out": out_of(name, seed),
            "command": ["experiments/ablate.py", "--one", "--only", name, "--seeds", str(seed),
                        "--budget", str(args.budget)],
        }
        for seed in args.seeds
        for name in args.only
    ]  # fmt: skip

    def row_of(job, log):
        last = log[-1]
        mean = {name: sum(last[name]) / len(last[name]) if name in last else math.nan
                for name in ("agree", "recall", "share")}  # fmt: skip
        return {
            **job["key"],
            "steps": last["step"],
            "flops": f"{last['flops']:.4g}",
            **{name: f"{last[name]:.4f}" for name in ("val_topk", "val_causal", "val_skip")},
            **{name: f"{value:.4f}" for name, value in mean.items()},
        }

    sweep(jobs, table, row_of, args.processes)


if __name__ == "__main__":
    main()

"""What does sparsity give in this harness? Experts, alone and in both of the paper's ways to join them with MoD.

    python experiments/mode.py --only experts_4 experts_8 --shape 2x96          three seeds, counted in both ways
    python experiments/mode.py --only staged_4 --shape 4x96 --lr 8e-3 --seeds 0 --counting forward

An *expert* is an MLP of the usual size. A block with experts has several in the place of its MLP, and a token uses the
one that the block's router picks: it costs what it costs without experts, but for the product with that router. The
variants, with N experts a block:

experts_N         A plain mixture of experts: dense, with experts in every block.
staged_N          Experts in every block, and MoD around every second: a token that passes by a routed block skips its
                  attention, too. So we read the paper, which adds MoD to a model with experts.
staged_routed_N   The same, but the blocks that are not routed have a plain MLP.
integrated_N      Experts in every block and a *no-op* beside them: half of the tokens pick it and pass by the MLP, but
                  not by the attention. In 3x96 a token then costs 9 % more than in dense 2x96.

Every matrix of a block has Muon, also in routed blocks. With the ending _adamw, experts and routed blocks have AdamW at
half the rate instead. The experts' routers have train.py's rate for routers, a tenth of the body's.

The paper says that staged MoDE routes tokens around or towards a block ahead of its self-attention, and that integrated
MoDE has no-op experts among the conventional ones. It leaves open how many experts there are and in which blocks,
whether tokens pick experts or experts tokens, how many no-ops there are and how many tokens they get, how loads are
balanced and outputs gated, how a no-op's score learns, and how to sample. Our no-op has a bias, but no weights, since a
gate gives no gradient to what adds nothing: a token passes by if no expert's affinity, plus its bias, is above that.

Sampling is exact, since a token picks its expert alone: one pass over a text and the same text token by token give the
same logits, staged in MoD's causal mode, the others always.

Muon costs the same for an expert that sees few tokens, so the budget is counted in two ways. It pays forward, backward
and Muon ("training": equal training FLOPs), or forward, backward and the Muon of the model without experts ("forward":
as many steps as that one makes, but for what the experts' routers cost and the no-op saves). Appends a line per run to
assets/mode.csv: flops are of forward and backward, optimizer_flops of Muon; what other tables call flops is the sum.
"""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mod  # noqa: E402
import train  # noqa: E402
from experiments.sweep import parse_shape, sweep  # noqa: E402
from prepare_data import Parser, run  # noqa: E402

BIAS_STEP, NOOP_STEP = 0.001, 0.01  # DeepSeek-V3's; a no-op's bias is faster, since its share decides the FLOPs
muon_without_experts = train.muon_matrices


class Recipe(NamedTuple):
    experts: int  # of a block; each gets as many tokens as another
    noop: float = 0.0  # share of the tokens that pick no expert
    capacity: float = 1.0  # of MoD's routed blocks
    everywhere: bool = True  # or experts in routed blocks only
    muon: bool = True  # in experts and routed blocks


VARIANTS = {
    "experts_4": Recipe(4),
    "experts_8": Recipe(8),
    "staged_4": Recipe(4, capacity=0.125),
    "staged_routed_4": Recipe(4, capacity=0.125, everywhere=False),
    "integrated_4": Recipe(4, noop=0.5),
    "experts_4_adamw": Recipe(4, muon=False),
    "staged_4_adamw": Recipe(4, capacity=0.125, muon=False),
}


class Experts(nn.Module):
    """E MLPs, of which a token uses one, or none if it picks the no-op (arXiv:2412.19437, section 2.1.2, with top-1).

    A token's affinity to an expert is the sigmoid of what the router says. It picks the highest affinity + bias. In
    training a bias rises by its step where fewer tokens came than should, else falls. Its output is scaled by 2 x
    affinity, without the bias, which is 1 where the router says 0; so the router learns.
    """

    def __init__(self, n_embd, n_experts, noop):
        super().__init__()
        self.router = nn.Linear(n_embd, n_experts, bias=False)
        nn.init.normal_(self.router.weight, std=n_embd**-0.5)
        self.block = nn.ModuleList()  # so called since train.py gives what is in a .block. its routed_lr_scale
        for _ in range(n_experts):
            up, down = nn.Linear(n_embd, 4 * n_embd, bias=False), nn.Linear(4 * n_embd, n_embd, bias=False)
            nn.init.normal_(up.weight, std=n_embd**-0.5)
            nn.init.zeros_(down.weight)
            self.block.append(nn.Sequential(up, nn.GELU("tanh"), down))
        passing = noop > 0  # then the no-op is the last; its bias starts near where a half of the tokens pass by
        share = [(1 - noop) / n_experts] * n_experts + [noop] * passing
        self.register_buffer("share", torch.tensor(share), persistent=False)
        self.register_buffer("step", torch.tensor([BIAS_STEP] * n_experts + [NOOP_STEP] * passing), persistent=False)
        self.register_buffer("bias", torch.tensor([0.0] * n_experts + [0.7] * passing))

    def forward(self, x):
        """x (B, T, C) -> (B, T, C), zeros for a token that picked the no-op."""
        x_NC = x.flatten(0, 1)
        affinity = self.router(x_NC).sigmoid()  # (N, E)
        choice = (F.pad(affinity, (0, len(self.bias) - len(self.block))) + self.bias).argmax(dim=1)  # (N,)
        load = choice.bincount(minlength=len(self.bias))
        if self.training and torch.is_grad_enabled():  # not while train.py shows a sample
            self.bias += self.step * (self.share * len(choice) - load).sign()
        order = choice.argsort()  # an expert's tokens side by side, the no-op's at the end
        parts = x_NC.index_select(0, order).split(load.tolist())
        y = torch.cat([mlp(part) for mlp, part in zip(self.block, parts, strict=False)])  # without the no-op's part
        order = order[: len(y)]
        gate = 2 * affinity[order, choice[order]]
        return torch.zeros_like(x_NC).index_copy(0, order, gate[:, None] * y).view_as(x)


class ExpertBlock(nn.Module):
    """A mod.Block with experts in the place of its MLP."""

    def __init__(self, block, n_embd, recipe):
        super().__init__()
        self.attention = block.attention
        self.experts = Experts(n_embd, recipe.experts, recipe.noop)

    def forward(self, x, rope, cache=None):
        attended = self.attention(mod.norm(x), rope, cache)
        return attended + self.experts(mod.norm(x + attended))


class MoDE(mod.MoD):
    """A mod.MoD with experts; all else starts as in a mod.MoD of the same seed."""

    def __init__(self, config, recipe):
        super().__init__(config)
        self.recipe = recipe
        for i, block in enumerate(self.blocks):
            if isinstance(block, mod.RoutedBlock):
                block.block = ExpertBlock(block.block, config.n_embd, recipe)
            elif recipe.everywhere:
                self.blocks[i] = ExpertBlock(block, config.n_embd, recipe)


def flops_per_token(config, T, recipe):
    """mod.flops_per_token of a MoDE whose no-op gets its share."""
    C, routed = config.n_embd, len(config.routed_layers)
    taken = max(1, round(config.capacity * T)) / T
    seen = routed * taken + (config.n_layer - routed) * recipe.everywhere  # blocks with experts that a token sees
    return mod.flops_per_token(config, T) + seen * (2 * C * recipe.experts - recipe.noop * 2 * 8 * C**2)


def muon_matrices(model):
    """train.muon_matrices, which also knows what a MoDE's recipe wants."""
    if not isinstance(model, MoDE):
        return muon_without_experts(model)
    named = [(name, p) for name, p in model.blocks.named_parameters() if "router" not in name]
    return [p for name, p in named if model.recipe.muon or ".block." not in name]


def step_costs(config, recipe, tokens):
    """FLOPs of a training step: forward and backward; Muon; Muon without experts. With train.muon_matrices replaced."""
    muon, plain = (train.step_flops(model, 0) for model in (MoDE(config, recipe), mod.MoD(config)))
    return 3 * flops_per_token(config, config.block_size, recipe) * tokens, muon, plain


def main(argv):
    parser = Parser(description="Mixtures of experts, alone and with MoD.")
    parser.add_argument("--budget", type=float, default=6e12, help="FLOPs of each run")
    parser.add_argument("--shape", default="2x96", help="LAYERSxWIDTH")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.13e-2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--counting", nargs="+", choices=["training", "forward"], default=["training", "forward"])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--one", action="store_true", help="what each process is started with")
    parser.add_argument("--resume", action="store_true", help="likewise")
    args = parser.parse_args(argv)
    layers, width = parse_shape(args.shape)
    shape = {"n_layer": layers, "n_head": max(2, width // 32), "n_embd": width, "block_size": 256}
    train.muon_matrices = muon_matrices

    def costs(recipe):
        config = mod.MoDConfig(capacity=recipe.capacity, **shape)
        return step_costs(config, recipe, args.batch_size * config.block_size)

    def out_of(name, counting, seed):
        recipe = f"{args.shape}-{args.batch_size}-{args.lr:g}"
        return ROOT / "out" / "mode" / f"{name}-{recipe}-{args.budget:g}-{counting}-{seed}"

    if args.one:
        (name,), (counting,), (seed,) = args.only, args.counting, args.seeds
        recipe = VARIANTS[name]
        body, muon, plain = costs(recipe)
        steps = int(args.budget // (body + (muon if counting == "training" else plain)))
        train.MoD = partial(MoDE, recipe=recipe)
        train.flops_per_token = partial(flops_per_token, recipe=recipe)
        flags = {**shape, "capacity": recipe.capacity, "batch_size": args.batch_size, "lr": args.lr}
        argv = [f"--{flag}={value}" for flag, value in flags.items()]
        argv += [f"--seed={seed}", f"--steps={steps}", f"--out={out_of(name, counting, seed)}", "--preset=cpu"]
        train.main(argv + (["--resume"] if args.resume else []))
        return

    jobs = [
        {
            "key": {"variant": name, "budget": f"{args.budget:g}", "shape": args.shape, "batch_size": args.batch_size,
                    "lr": f"{args.lr:g}", "seed": seed, "counting": counting},
            "out": out_of(name, counting, seed),
            "command": ["experiments/mode.py", *argv, "--one", f"--only={name}", f"--counting={counting}",
                        f"--seeds={seed}"],
        }
        for seed in args.seeds
        for name in args.only
        for counting in args.counting
    ]  # fmt: skip

    def row_of(job, log):
        last = log[-1]
        body, muon, _ = costs(VARIANTS[job["key"]["variant"]])
        return {
            **job["key"],
            "steps": last["step"],
            "flops": f"{last['step'] * body:.4g}",
            "optimizer_flops": f"{last['step'] * muon:.4g}",
            **{name: f"{last[name]:.4f}" for name in ("val_topk", "val_causal")},
        }

    sweep(jobs, ROOT / "assets" / "mode.csv", row_of, args.processes)


if __name__ == "__main__":
    run(main)

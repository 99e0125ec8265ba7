"""Which tokens gain from more blocks, can that be told early, and do routers take them?

    python experiments/ablate.py --seeds 0 --budget 5.526e12 --only dense_half
    python experiments/ablate.py --seeds 0 --budget 1.065e13 --only dense_full     as many steps
    python experiments/depth_gain.py --half out/ablate/dense_half... --full out/ablate/dense_full... --mod out/mod

A token's gain is what it loses less in the full model than in its half. A small network learns to foresee it from
what the half's first block puts out, where MoD has its first router. The table: how much of the whole gain lies in
the tokens that would be taken. out/depth_gain.pt keeps the network; ablate.py's depth_gain trains a MoD that takes
those tokens.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.router_stats import look, table  # noqa: E402
from experiments.sweep import watched  # noqa: E402
from mod import MoD, MoDConfig, norm  # noqa: E402
from prepare_data import Parser, UserError, load_data, run, write_atomic  # noqa: E402
from train import load_checkpoint, spread_windows  # noqa: E402

SAVED = ROOT / "out" / "depth_gain.pt"


@torch.no_grad()
def first_block(half, idx):
    """What the first block of a dense model puts out for tokens (B, T), normalised, (B, T, C)."""
    x, _ = half.mix(norm(half.embedding(idx)))
    return norm(x + half.blocks[0](x, half.rope[: idx.size(1)]))


def mlp(C):
    return nn.Sequential(nn.Linear(C, 256), nn.GELU(), nn.Linear(256, 1))


def learn(net, seen, gain, name, steps=5000):
    """Train net, which has a name, to foresee gain (N,) from seen (N, C), by least squares."""
    optimizer = torch.optim.AdamW(net.parameters())
    for step in watched(range(steps), f"steps of {name}"):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        rows = torch.randint(len(gain), (4096,))
        F.mse_loss(net(seen[rows]).squeeze(-1), gain[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved_choice():
    """The choice that was kept, as a function: tokens (B, T) -> (B, T), above 0 for about an eighth of all tokens."""
    if not SAVED.exists():
        raise UserError(f"{SAVED} does not exist; make it with experiments/depth_gain.py")
    kept = torch.load(SAVED, weights_only=True)
    half, net = MoD(MoDConfig(**kept["config"])), mlp(kept["config"]["n_embd"])
    half.load_state_dict(kept["half"])
    net.load_state_dict(kept["net"])
    return torch.no_grad()(lambda idx: net(first_block(half, idx)).squeeze(-1) - kept["threshold"])


def main(argv):
    parser = Parser(description="Where the gain of depth lies.")
    parser.add_argument("--half", required=True, help="folder of a dense run")
    parser.add_argument("--full", required=True, help="of a deeper one, of as many steps")
    parser.add_argument("--mod", nargs="+", default=[], help="of MoD runs on the same data: what their routers take")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    runs = {out: load_checkpoint(out, "cpu") for out in (args.half, args.full, *args.mod)}
    (half, checkpoint), (full, other) = runs[args.half], runs[args.full]
    for out, (model, its) in runs.items():
        if its["meta"] != checkpoint["meta"] or model.config.block_size != half.config.block_size:
            raise UserError(f"{out} was trained on other data than {args.half}, or with another context")
        if bool(model.config.routed_layers) != (out in args.mod):
            raise UserError(f"{out} is of the wrong kind: --half and --full are dense, --mod has routed blocks")
    if checkpoint["step"] != other["step"]:
        raise UserError(f"{args.half} has {checkpoint['step']} steps, {args.full} {other['step']}: take equal ones")
    train_data, val_data, _ = load_data(ROOT / checkpoint["train"]["data"], checkpoint["meta"])
    T = half.config.block_size

    def windows(data, tokens):
        text = spread_windows(data, T, tokens)
        return text[:, :-1], text[:, 1:]

    x, y = windows(train_data, 2**21)
    seen = torch.cat([first_block(half, rows) for rows in watched(x.split(16), "batches of 16 contexts")])
    gain = look(half, x, y)[0] - look(full, x, y)[0]
    networks = {"a linear map": nn.Linear(half.config.n_embd, 1), "an MLP": mlp(half.config.n_embd)}
    for name, net in networks.items():
        learn(net, seen.flatten(0, 1), gain.flatten(), name)

    x, y = windows(val_data, 2**17)
    loss = look(half, x, y)[0]
    gain = loss - look(full, x, y)[0]
    with torch.no_grad():
        foreseen = {name: net(first_block(half, x)).squeeze(-1) for name, net in networks.items()}
    lines = []

    def add(name, taken):
        part = gain[taken].sum() / gain.sum()
        lines.append((name, f"{taken.float().mean():.1%}", f"{part:.1%}", f"{part / taken.float().mean():.1f}"))

    def highest(values):
        return torch.zeros_like(values, dtype=torch.bool).scatter(1, values.topk(T // 8, dim=1).indices, True)

    for name, values in foreseen.items():
        add(f"the eighth that {name} foresees to gain most", highest(values))
    add("the eighth with the highest loss in the half (known afterwards)", highest(loss))
    for out in args.mod:
        model, _ = runs[out]
        for layer, tokens in zip(model.config.routed_layers, look(model, x, y)[1].taken, strict=True):
            add(f"what block {layer} of {Path(out).name} takes", tokens)
    title = f"Validation: half {loss.mean():.4f}, gain of the full depth {gain.mean():.4f}"
    table(title, ("tokens", "part of all tokens", "part of the gain", "ratio"), lines)

    net, values = networks["an MLP"], foreseen["an MLP"].flatten()
    kept = {"config": checkpoint["config"], "half": half.state_dict(), "net": net.state_dict()}
    kept["threshold"] = values.quantile(1 - 1 / 8).item()
    with write_atomic(SAVED) as file:
        torch.save(kept, file)


if __name__ == "__main__":
    run(main)

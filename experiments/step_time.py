"""How long a training step takes, MoD over dense of the same shape, beside the ratio of their FLOPs.

    python experiments/step_time.py                                     n_embd 128, 256 and 512 at 4,096 tokens a step
    python experiments/step_time.py --device cuda --compile --n_embd 768 --batch_size 64

Forward, backward and optimizer, the two models in turn, medians. Writes assets/step_time.json, or --out.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.bench import check_sizes  # noqa: E402
from mod import MoD, MoDConfig, choice_loss  # noqa: E402
from prepare_data import Parser, run, write_json  # noqa: E402
from sample import device_name, synchronize  # noqa: E402
from train import make_optimizers, pick_device, step_flops  # noqa: E402


def stepper(config, batch_size, device, compiled):
    """A function that does one training step on random tokens and returns its seconds; and the step's FLOPs."""
    torch.manual_seed(0)
    model = MoD(config).to(device)
    network = torch.compile(model, fullgraph=True) if compiled else model
    optimizers = make_optimizers(model, 0.1, 1, 0.1)
    idx = torch.randint(config.vocab_size, (batch_size, config.block_size), device=device)

    def step():
        synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            _, loss, route = network(idx, idx)
        (loss if route is None else loss + choice_loss(route)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - start

    return step, step_flops(model, idx.numel())


def main(argv):
    parser = Parser(description="Training step time, MoD over dense.")
    parser.add_argument("--n_embd", type=int, nargs="+", default=[128, 256, 512], help="multiples of 64")
    parser.add_argument("--n_layer", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "step_time.json")
    args = parser.parse_args(argv)
    check_sizes(args)
    device = pick_device(args.device)
    rows = []
    for n_embd in args.n_embd:
        shape = dict(n_embd=n_embd, n_head=n_embd // 64, n_layer=args.n_layer, block_size=args.block_size)
        configs = [MoDConfig(**shape), MoDConfig(**shape, capacity=1.0)]
        steppers = [stepper(config, args.batch_size, device, args.compile) for config in configs]
        steps, (flops, dense_flops) = zip(*steppers, strict=True)
        times = [[step() for step in steps] for _ in range(args.rounds + 2)][2:]  # the first are not counted
        ratio = statistics.median(mod / dense for mod, dense in times)
        row = {
            "device": device_name(device),
            "torch": torch.__version__,
            "compiled": args.compile,
            **shape,
            "tokens": args.batch_size * args.block_size,
            "mod_s": statistics.median(mod for mod, _ in times),
            "dense_s": statistics.median(dense for _, dense in times),
            "ratio": ratio,
            "flops_ratio": flops / dense_flops,
        }
        rows.append(row)
        print(
            f"{row['device']}: {n_embd} wide, {row['tokens']} tokens a step: {row['mod_s']:.3f} s, dense "
            f"{row['dense_s']:.3f} s; ratio {ratio:.3f}, of FLOPs {row['flops_ratio']:.3f}, "
            f"{ratio / row['flops_ratio']:.3f} x"
        )
    write_json(args.out, {"rows": rows})


if __name__ == "__main__":
    run(main)

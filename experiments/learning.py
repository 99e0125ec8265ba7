"""Watch routers learn: who takes which byte of the same unseen lines after 30, 300 and 3,000 steps of the default run.

    python experiments/learning.py --out assets      trains out/learning as train.py does, then draws learning.png

train.py is left as it is: each of its steps is wrapped from outside. What was recorded stays in out/learning, so that
the picture can be drawn again.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from experiments.figures import GREY, INK, find_snippet, plt  # noqa: E402
from prepare_data import Parser, UserError, load_data, prepare, run, write_json  # noqa: E402

STEPS = (30, 300, 3000)


def record(data, out):
    """Train the default run into out, with record.json: a text, and after each of STEPS the number of routed blocks
    that process each of its bytes causally."""
    val = load_data(data)[1]
    begin, end = find_snippet(val, "def ")
    depths, training_step = {}, train.training_step

    def recording(run, *args):
        training_step(run, *args)
        if run.step in STEPS:
            tokens = torch.from_numpy(val[max(0, end - run.config.block_size) : end].astype(np.int64))[None]
            with torch.no_grad():
                taken = run.model(tokens, causal=True)[2].taken[:, 0, begin - end :]
            depths[run.step] = taken.sum(dim=0).tolist()

    train.training_step = recording
    train.main([f"--data={data}", f"--out={out}", "--preset=cpu", "--device=cpu", "--overwrite"])
    write_json(out / "record.json", {"text": "".join(map(chr, val[begin:end])), "depths": depths})


def draw(text, depths):
    """A panel for each of STEPS: the text, each byte the darker the more blocks took it."""
    lines = text.splitlines(keepends=True)
    most = max(map(max, depths.values()))
    figure, axes = plt.subplots(len(depths), 1, figsize=(8, 0.24 * len(lines) * len(depths) + 1.2))
    for axis, (step, depth) in zip(axes, depths.items(), strict=True):
        axis.set(xlim=(0, max(map(len, lines))), ylim=(len(lines), 0))
        axis.set_title(f"after {int(step):,} steps", loc="left", color=GREY)
        axis.axis("off")
        positions = ((x, y, char) for y, line in enumerate(lines) for x, char in enumerate(line))
        for (x, y, char), n in zip(positions, depth, strict=True):
            shade = plt.get_cmap("Oranges")(0.8 * n / most) if n else "white"
            axis.add_patch(plt.Rectangle((x, y + 0.04), 1, 0.92, facecolor=shade, linewidth=0))
            shown = {" ": "·", "\n": "↵"}.get(char, char)
            color = "white" if n == most else GREY if char.isspace() else INK
            axis.text(x + 0.5, y + 0.5, shown, ha="center", va="center", family="monospace", size=9, color=color)
    figure.suptitle(f"First newlines, then indentation (light: 1 routed block took the byte; dark: {most})", color=INK)
    return figure


def main(argv):
    parser = Parser(description="Watch routers learn.")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "figures", help="folder for the picture")
    args = parser.parse_args(argv)
    if plt is None:
        raise UserError("figures need the package matplotlib: pip install -r requirements-dev.txt")
    data = ROOT / train.TrainConfig.data
    if not (data / "meta.json").exists():
        prepare(out=data)
    recorded = ROOT / "out" / "learning" / "record.json"
    if not recorded.exists():
        record(data, recorded.parent)
    args.out.mkdir(parents=True, exist_ok=True)
    plt.rc("figure.constrained_layout", use=True)
    draw(**json.loads(recorded.read_text(encoding="utf-8"))).savefig(
        args.out / "learning.png", dpi=130, facecolor="white"
    )
    print(args.out / "learning.png")


if __name__ == "__main__":
    run(main)

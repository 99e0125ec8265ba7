"""sample.py: its flags, the text and what it cost, --show_depth, --html, --bench.

With small models whose parameters are all drawn anew: at initialisation a block changes nothing, so that anything would
equal anything.
"""

import dataclasses
import html
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import folder

import mod
import sample
from mod import MoD, MoDConfig, RoutedBlock, flops_per_token
from prepare_data import UserError, get_tokenizer, load_data
from sample import WARMUP, WAYS, DepthView, SampleConfig, visible
from train import EVAL_TOKENS, TrainConfig, dense_flops, spread_windows

SIZE = 24  # of the context
SHAPE = dict(block_size=SIZE, n_layer=4, n_head=2, n_embd=16, capacity=0.25, predictor=True)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@torch.no_grad()
def redrawn(**changes):
    """A model whose routed blocks all take some tokens and leave some, none within rounding of the threshold."""
    for seed in itertools.count(1000):
        torch.manual_seed(seed)
        model = MoD(MoDConfig(**{**SHAPE, **changes})).eval()
        for p in model.parameters():
            p.normal_(std=p.size(-1) ** -0.5)
        route = model(torch.randint(256, (8, SIZE)), causal=True)[2]
        if route is None:  # a dense model
            return model
        share = route.taken.float().mean((1, 2))
        if 0.1 < share.min() and share.max() < 0.9 and route.logit.abs().min() > 1e-4:
            return model


@pytest.fixture
def call(small_data, tmp_path, capfdbinary):
    """Save a model as train.py does, and call sample.main; returns what it writes to standard output and error."""

    def call(*flags, model=None, out="run", **meta):
        model = model or redrawn()
        checkpoint = {"model": model.state_dict(), "config": dataclasses.asdict(model.config), "step": 1}
        checkpoint["train"] = dataclasses.asdict(TrainConfig(data=str(small_data)))
        checkpoint["meta"] = load_data(small_data)[2] | meta
        (tmp_path / out).mkdir(exist_ok=True)
        torch.save(checkpoint, tmp_path / out / "ckpt.pt")
        sample.main([f"--out={tmp_path / out}", "--device=cpu", *flags])
        return [stream.decode().replace(os.linesep, "\n") for stream in capfdbinary.readouterr()]

    return call


def generated(model, prompt, num_tokens, seed=0, **options):
    """The steps, by mod.py alone, in which sample.py should continue a prompt, bytes."""
    torch.manual_seed(seed)
    options = {"temperature": 0.8, **options}
    return list(model.generate(torch.tensor([list(prompt) or [256]]), num_tokens, **options))


def as_text(prompt, steps):
    """What sample.py should print for them."""
    new = get_tokenizer("bytes").decode_bytes([step.token.item() for step in steps])
    return (prompt + new).decode("utf-8", "replace") + "\n"


def routes_of(prompt, steps):
    """For each token of a text its taken, r and logit when it was first fed, (3, L), or None if it never was."""
    fed = [torch.stack([x[:, 0].float() for x in step.route]).unbind(-1) for step in steps]
    # First the prompt, as far as it fits; then with each step the token drawn before, as its last one.
    return [None] * (len(prompt) - SIZE) + [*fed[0], *(tokens[-1] for tokens in fed[1:]), None]


# ---- Flags

VALUES = {
    "prompt": "é€😀\n", "num_tokens": 9, "num_samples": 2, "temperature": 2.0, "top_k": 7, "top_p": 0.7, "seed": 3,
    "threshold": 1.0, "show_depth": True, "html": "page.html", "bench": True, "device": "cpu", "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SampleConfig) if field.name != "out"])
def test_a_flag_changes_what_it_says_and_nothing_else(name, call, tmp_path, monkeypatch):
    """All flags but --out, which no test does without. A new one needs a value in VALUES, and perhaps a line here."""
    monkeypatch.chdir(tmp_path)
    flags = {"prompt": "def f", "num_tokens": 20, "seed": 0, name: VALUES[name]}
    text, said = call(*(f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()))

    model = sample.to_bfloat16(redrawn()) if name == "dtype" else redrawn()
    prompt, num_tokens = flags["prompt"].encode(), flags["num_tokens"]
    options = {key: flags[key] for key in ("temperature", "top_k", "top_p", "threshold") if key in flags}
    seeds = [0, 1] if name == "num_samples" else [flags["seed"]]
    expected = "".join(as_text(prompt, generated(model, prompt, num_tokens, seed, **options)) for seed in seeds)
    if name != "show_depth":  # which has tests of its own
        assert text == ("" if name == "bench" else expected)
    if name not in ("show_depth", "html", "bench", "device", "dtype"):  # bfloat16's rounding may change a token
        assert expected != as_text(b"def f", generated(redrawn(), b"def f", 20))

    made = {"html": {"page.html"}, "bench": {"run/bench.json"}}
    assert folder(tmp_path).keys() == {"run/ckpt.pt"} | made.get(name, set())
    signs = {"num_samples": "--- 2 of 2, seed 1\n", "show_depth": "Beneath", "dtype": "torch.bfloat16"}
    signs |= {"html": f"the page is {tmp_path / 'page.html'}\n", "bench": "as trained"}
    for flag, sign in signs.items():
        assert (sign in said) == (flag == name)


WRONG = "num_tokens=0 num_samples=0 temperature=-1 temperature=inf top_k=0 top_p=0 top_p=1.1 seed=-1 seed=2147483648"


@pytest.mark.parametrize("flag", [*WRONG.split(), "threshold=nan", "html=.", "device=nowhere"])
def test_a_value_that_cannot_work_is_named(flag, call):
    name, value = flag.split("=")
    with pytest.raises(UserError, match=f"{name}.*{value}"):
        call(f"--{flag}")


# ---- Text


@pytest.mark.parametrize("depth", [False, True])
def test_a_token_is_on_the_pipe_before_the_next_one_is_drawn(depth, call, monkeypatch):
    """But half a character waits until it is whole; and in --show_depth a token waits for its depth, which it has once
    it was fed to the model."""
    pipe, before_each = io.BytesIO(), []
    letters = iter("a€bc".encode())

    def draw_a_letter(*_):
        before_each.append(re.sub("\033.*?m", "", pipe.getvalue().decode()))
        return torch.tensor([[next(letters)]])

    stdout = io.TextIOWrapper(pipe, encoding="utf-8")  # it keeps text until it is flushed
    stdout.isatty = lambda: depth  # elsewhere depths come with the end of a line
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(mod, "sample", draw_a_letter)
    call("--prompt=x", "--num_tokens=6", *["--show_depth"] * depth)
    late, soon = ["", "x", "xa", "xa…", "xa……", "xa……€"], ["x", "xa", "xa", "xa", "xa€", "xa€b"]
    assert before_each == (late if depth else soon)


def test_prompts_of_no_characters_and_of_nothing(call, monkeypatch):
    """What is no UTF-8 is replaced where it is shown; nothing means end-of-text, which is not shown."""
    broken = b"a\xff\xe2\x82"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(broken)))
    prompts = {"--prompt=-": broken, f"--prompt={os.fsdecode(broken)}": broken, "--prompt=": b"", "--seed=0": b"def "}
    for flag, prompt in prompts.items():
        text, _ = call(flag, "--num_tokens=5", prompt="def ")
        assert text == as_text(prompt, generated(redrawn(), prompt, 5))
    with pytest.raises(UserError, match="half a character"):
        call("--prompt=a\ud800")


def test_the_report_is_of_all_texts(call):
    """But FLOPs and cache are those at the length of the last one."""
    _, said = call("--prompt=def f", "--num_tokens=30", "--num_samples=2")
    config, texts = redrawn().config, [generated(redrawn(), b"def f", 30, seed) for seed in (0, 1)]
    taken = torch.stack([route[0] for text in texts for route in routes_of(b"def f", text)[:-1]])  # (tokens, L)
    share, cache = taken.mean().item(), texts[1][-1].cache
    flops, dense = flops_per_token(config, cache.length, share), dense_flops(config, cache.length)
    used, dense_used = sample.cache_bytes(cache), 4 * cache.length * 2 * 16 * 4  # 4 blocks; keys and values, float32
    assert f"\n{1 - share:.1%} of the routed blocks skipped\n" in said
    assert f"\n{flops:,.0f} forward FLOPs per token, {flops / dense:.2f} of a dense" in said
    assert f"\n{used:,} bytes of KV cache, {used / dense_used:.2f} of a dense model's\n" in said


def test_the_first_three_steps_are_not_timed(call, monkeypatch):
    clock = itertools.count()  # a second from look to look: one look before a step, and if it is timed, one after it
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(clock))
    assert call("--num_tokens=3")[1].startswith("too few tokens to time")
    assert call("--num_tokens=4")[1].startswith("1.0 tokens/s (cpu")


def test_bfloat16_leaves_what_decides_in_float32():
    """Trap: routers and predictors in bfloat16 tie and flip. What is cached has the dtype of the other weights."""
    model = sample.to_bfloat16(redrawn())
    for name, p in model.named_parameters():
        decides = ".router." in name or ".predictor." in name
        assert p.dtype == (torch.float32 if decides else torch.bfloat16)
    cache = generated(model, b"abc", 9)[-1].cache
    assert sample.cache_bytes(cache) == sum(kv.length[0] for kv in cache.blocks) * 2 * 16 * 2


def test_a_dense_model_can_be_sampled_and_has_no_depth_to_show(call):
    dense = redrawn(capacity=1.0)
    text, said = call("--prompt=ab", "--num_tokens=30", model=dense)
    assert text == as_text(b"ab", generated(dense, b"ab", 30)) and "tokens/s" in said and "skipped" not in said
    for flag in ("--show_depth", "--html=page.html", "--bench"):
        with pytest.raises(UserError, match="no routed block"):
            call(flag, model=dense)


# ---- The terminal


def test_nothing_invisible_or_harmful_reaches_a_terminal(call, monkeypatch):
    prompt = "a\033[2J\t\x9b1m\x7f\r\n€"
    assert call(f"--prompt={prompt}", "--num_tokens=1")[0].startswith(prompt)  # this is a pipe
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    assert call(f"--prompt={prompt}", "--num_tokens=1")[0].startswith("a\\x1b[2J\t\\x9b1m\\x7f\\r\n€")
    assert visible("\033[2J\u202e\x85\r\n") == "\\x1b[2J\\u202e\\x85\\r↵\n"  # with --show_depth


def test_show_depth_writes_marks_beneath_or_shades_on_a_terminal(call, monkeypatch):
    prompt = "ab\tc\n€d".encode()
    flags = (f"--prompt={prompt.decode()}", "--num_tokens=1", "--show_depth")
    depths = [int(route[0].sum()) for route in routes_of(prompt, generated(redrawn(), prompt, 1))[:-1]]
    marks = "".join(map(str, depths))
    assert len(set(depths)) > 1
    marked, _ = call(*flags)
    assert marked.startswith(f"ab⇥c↵\n{marks[:5]}\n……€d")
    assert marked.splitlines()[3].rstrip() == f"{marks[5:]}-"  # the last one was not fed

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    shaded, said = call(*flags)
    shades = ["{}", "\033[38;5;16;48;5;215m{}\033[0m", "\033[38;5;16;48;5;202m{}\033[0m"]
    line = [shades[depth].format(c) for c, depth in zip("ab⇥c↵", depths, strict=False)]
    assert shaded.startswith("".join(line) + "\n")  # a shaded newline would paint the rest of the line
    assert said.startswith("Shaded: ") and all(shades[n].format(f" {n} ") in said for n in (0, 1, 2))
    monkeypatch.setenv("NO_COLOR", "1")
    assert call(*flags)[0] == marked


def test_marks_stand_beneath_their_characters_in_every_script():
    def marked(*tokens):
        view = DepthView(40, color=False)
        return "".join(view.show(text, depth) for text, depth in tokens) + view.end()

    assert marked(("漢字", 1), ("a", 2)) == "漢字a\n1   2\n"  # two columns each
    assert marked(("e\u0301", 1), ("a", 2)) == "e\u0301a\n12\n"  # an accent takes none
    assert marked(("ก\u0e34", 3), ("\u0915\u0947", 10)) == "ก\u0e34\u0915\u0947\n3a\n"  # nor do Thai's and Hindi's
    assert marked(("a", 0), ("\u0301", 2), ("\u20dd", None)) == "a◌\u0301◌\u20dd\n02-\n"  # not on the token before
    assert marked(("b\n\n", 40), ("c\n", 0)) == "b↵\nz \n↵\nz\nc↵\n0 \n"
    line, rest = f"a{'漢' * 39}\n5{'5 ' * 39}\n", f"{'漢' * 11}\n{'5 ' * 11}\n"
    assert marked(*[(c, 5) for c in "a" + "漢" * 50]) == line + rest  # lines of 80 columns


# ---- --html


def page_data(page):
    return json.loads(re.search("const page = (.*);\n", page.read_text(encoding="utf-8"))[1])


@pytest.mark.parametrize(
    ("chooser", "changes", "n_prompt"),
    [("predictor", {}, 40), ("router", {}, SIZE), ("router", {"gate": "raw"}, 10), ("lot", {"routing": "random"}, 1)],
)
def test_the_page_has_each_token_and_its_route(chooser, changes, n_prompt, call, tmp_path):
    """The route that it had when it was first fed: also where the window slides and older tokens are fed again, and
    where the prompt is longer than the window."""
    model, page = redrawn(predictor=chooser == "predictor", **changes), tmp_path / "page.html"
    prompt = b"\tWhat a prompt says is a text of the page."[:n_prompt]
    flags = (f"--prompt={prompt.decode()}", "--num_tokens=30", "--num_samples=2", f"--html={page}", "--threshold=0.5")
    _, said = call(*flags, model=model, out=os.fsdecode(b"<script>\xff"))  # a folder's name may be any bytes
    data, page = page_data(page), page.read_text(encoding="utf-8")
    assert page.count("<script") == 1 and "://" not in page and "src=" not in page  # all is in this file
    assert data["cost"] == said.splitlines()[2:-1] and len(data["cost"]) == 4
    assert data["name"].endswith("<script>\N{REPLACEMENT CHARACTER}")
    assert (data["layers"], data["chooser"], data["raw"]) == ([1, 3], chooser, "gate" in changes)
    assert data["cutoff"] == pytest.approx(0.62246, abs=1e-5)  # sigmoid of 0.5

    _, tokens = data["texts"]  # of seeds 0 and 1
    steps = generated(model, prompt, 30, seed=1, threshold=0.5)
    texts, ids, probabilities, blocks = zip(*tokens, strict=True)
    assert "".join(texts).startswith(visible(prompt.decode()))
    assert list(ids) == [*prompt, *(step.token.item() for step in steps)]
    expected = [step.logits[0].softmax(dim=-1)[step.token.item()].item() for step in steps]
    assert probabilities[:n_prompt] == (None,) * n_prompt
    assert probabilities[n_prompt:] == pytest.approx(expected, rel=1e-4)
    for its_blocks, route in zip(blocks, routes_of(prompt, steps), strict=True):
        assert (its_blocks is None) == (route is None)
        if route is not None:
            taken, r, logit = route
            expected = torch.stack((logit.sigmoid(), r if data["raw"] else r.sigmoid(), taken), dim=1)
            torch.testing.assert_close(torch.tensor(its_blocks), expected)


def test_a_reader_who_left_ends_the_text_but_loses_no_page(call, tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", open(write, "w", encoding="utf-8"))
    with pytest.raises(BrokenPipeError):
        call("--num_tokens=20")
    call("--num_tokens=20", f"--html={tmp_path / 'page.html'}")
    assert len(page_data(tmp_path / "page.html")["texts"][0]) == 21


def test_a_file_that_cannot_be_written_is_found_out_first(call, tmp_path, monkeypatch):
    for name in ("draw", "bench"):
        monkeypatch.setattr(sample, name, lambda *_: pytest.fail("too late"))
    with pytest.raises(OSError, match="ckpt.pt"):
        call(f"--html={tmp_path / 'run' / 'ckpt.pt' / 'page.html'}")
    (tmp_path / "run" / "bench.json").mkdir()
    with pytest.raises(OSError, match="bench.json"):
        call("--bench")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
@pytest.mark.parametrize("predictor", [True, False])
def test_the_page_shows_a_token_at_first_and_when_it_is_pointed_at(predictor, call, tmp_path):
    page, prompt = tmp_path / "page.html", "x" * SIZE + "<\n"  # two more than the context: the first two are not fed
    flags = (f"--prompt={prompt}", "--num_tokens=3", f"--html={page}")
    call(*flags, model=redrawn(predictor=predictor))
    tokens = page_data(page)["texts"][0]
    events = {SIZE: "mouseover", SIZE + 1: "mouseover", SIZE + 2: "focus", SIZE + 4: "click"}
    script = "const cards = [card.innerHTML];"
    for i, event in events.items():
        script += f"spans[{i}].dispatchEvent(new Event('{event}')); cards.push(card.innerHTML);"
    with open(page, "a", encoding="utf-8") as file:
        file.write(f"<script>{script} document.title = JSON.stringify(cards)</script>")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60).stdout

    cards = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.DOTALL)[1]))
    for i, card in zip((2, *events), cards, strict=True):  # at first it is that of the first token that was fed
        text, id, probability, blocks = tokens[i]
        source = "from the prompt" if probability is None else f"probability {probability:#.3g}"
        shown = html.escape(text.rstrip() or " ", quote=False)
        assert f"<code>{shown}</code>" in card and f" token {id}, {source}<" in card
        assert ("not fed" in card) == (blocks is None)
        cells = []
        for layer, (foreseen, gate, taken) in zip((1, 3), blocks or (), strict=False):
            numbers = [foreseen, gate] if predictor else [gate]  # what a router foresees is the gate: shown once
            cells += [str(layer), *(f"{number:.3f}" for number in numbers), "processed" if taken else "skipped"]
        assert re.findall("<td>(.*?)</td>", card) == cells
    shades = [float(shade) for shade in re.findall('class="fed"[^>]*--depth: ([^;]*);', dom)]
    depths = [sum(taken for _, _, taken in blocks) for *_, blocks in tokens if blocks]
    assert shades == [0, 0.5, 1] + [depth / 2 for depth in depths]  # first the legend's
    assert dom.count('class="unfed') == 1 + 2 + 1  # the legend's, outside of the context, the last one drawn


# ---- --bench


def test_the_bench_computes_every_block_and_throws_the_result_away():
    """Its second way must do a dense model's work, in prompt and steps, and change only what the fast path changes."""
    model = redrawn()
    busy, idx = sample.computing_all(model), torch.randint(256, (32, 10))
    cache = busy.new_cache(32)
    busy.extend(idx[:, :9], cache)
    busy.extend(idx[:, 9:], cache)
    assert [kv.length for kv in cache.blocks] == [[10] * 32] * 4
    # A lone token attends to itself in either model, so that what is left to differ is who was taken.
    one, forward = idx[:, :1], model(idx[:, :1], causal=True, threshold=0.5)
    torch.testing.assert_close(busy(one, causal=True, threshold=0.5), forward)
    step = model.extend(one, model.new_cache(32), threshold=0.5)
    torch.testing.assert_close(busy.extend(one, busy.new_cache(32), threshold=0.5), step)
    assert all(0 < taken.sum() < 32 for taken in step[1].taken)


def test_the_benchs_dense_model_is_one_of_the_same_weights():
    model = sample.to_bfloat16(redrawn())
    dense, weights = sample.dense_twin(model), model.state_dict()
    assert not any(isinstance(block, RoutedBlock) for block in dense.blocks)
    for name, weight in dense.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, weights[re.sub(r"^(blocks\.[13])\.", r"\1.block.", name)])


def test_the_bench_reports_medians_of_the_right_steps(monkeypatch):
    """With a clock of its own: in round i the ways take 2 ** i seconds, times 1, 10, 100, 1000."""
    timed, without_cache = [], Mock(wraps=sample.generate_without_cache)

    def time_steps(n, steps, device):
        i, way = divmod(len(timed) // 2, 4)
        timed.append(n)
        return 10**way * 2**i, list(itertools.islice(steps, n))

    monkeypatch.setattr(sample, "time_steps", time_steps)
    monkeypatch.setattr(sample, "generate_without_cache", without_cache)
    model, prompt, n = redrawn(), torch.randint(256, (8, 4)), 16
    row = sample.bench(model, prompt, num_tokens=n, rounds=3, threshold=0.5)
    assert timed == [WARMUP, n, WARMUP, n, WARMUP, n, 1, 1] * 4  # round 0 isn't counted
    assert [row[f"{way}_tok_s"] for way in WAYS] == [8 * n / 4, 8 * n / 40, 8 * n / 400, 8 / 4000]  # of round 2
    _, text, threshold = without_cache.call_args.args
    assert torch.equal(text[:, :4], prompt) and text.size(1) == 4 + n / 2 and threshold == 0.5

    torch.manual_seed(0)
    steps = list(model.generate(prompt, WARMUP + n, threshold=0.5))
    share = torch.stack([step.route.taken for step in steps[WARMUP:]]).float().mean().item()
    length = 2 * (4 + WARMUP + n / 2)
    ideal = dense_flops(model.config, length) / flops_per_token(model.config, length, share)
    assert (row["share"], row["ideal"], row["context"]) == (pytest.approx(share), pytest.approx(ideal), 4 + WARMUP + n)
    assert row["cache_bytes"] == sample.cache_bytes(steps[-1].cache)
    assert row["dense_cache_bytes"] == 8 * 4 * 22 * 2 * 16 * 4  # rows, blocks, tokens: the last one is never fed
    torch.manual_seed(0)
    for step, token in zip(steps, sample.generate_without_cache(model, prompt, 0.5), strict=False):
        assert torch.equal(step.token, token)


def test_the_bench_of_a_checkpoint(call, small_data, tmp_path, monkeypatch):
    """It is of --threshold, of a text that the model wrote, and of the validation data that the run began with."""
    bench = Mock(wraps=sample.bench)
    monkeypatch.setattr(sample, "bench", bench)
    _, said = call("--bench", "--prompt=def f", "--threshold=1.5")
    steps = generated(redrawn(), b"def f", SIZE, temperature=1.0, threshold=1.5)
    written = torch.cat([step.token for step in steps], dim=1)
    (_, text, num_tokens), options = bench.call_args
    assert torch.equal(text, written[:, -(SIZE - WARMUP - 12) :]) and (num_tokens, options) == (12, {"threshold": 1.5})

    file = json.loads((tmp_path / "run" / "bench.json").read_text(encoding="utf-8"))
    (row,), dial = file["rows"], file["dial"]
    assert f"{row['dense_tok_s']:,.1f}" in said and f"{row['fast_tok_s'] / row['dense_tok_s']:.2f}\n" in said
    model, windows = redrawn(), spread_windows(load_data(small_data)[1], SIZE, EVAL_TOKENS)
    assert [at["threshold"] for at in dial] == [-1e3, -4, -2, -1, 0, 1, 1.5, 2, 4, 1e3]
    for at in dial:
        _, loss, route = model(windows[:, :-1], windows[:, 1:], causal=True, threshold=at["threshold"])
        numbers = [loss.item(), route.taken.float().mean().item()]
        assert [at["loss"], at["share"]] == pytest.approx(numbers, abs=1e-5) and f"{at['loss']:.4f}" in said
        assert at["flops"] == flops_per_token(model.config, SIZE, at["share"])
    assert [line[:11].strip() for line in said.splitlines() if line.endswith("  as trained")] == ["0"]

    with pytest.raises(UserError, match="not what the run began with"):
        call("--bench", sha256="0" * 64)
    with pytest.raises(UserError, match="--bench prints no text"):
        call("--bench", "--show_depth")

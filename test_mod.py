"""The claims that this project makes, as tests: small models, float32, CPU, no network.

    python -m pytest            the fast ones
    python -m pytest -m slow    the slow ones

Where outputs are compared, every parameter of the model was drawn anew (see redrawn): a freshly initialised block
changes nothing, so that anything would equal anything. Docstrings that begin with "Trap" name a fault found in
other implementations, or one that is easily made.
"""

import ast
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mod import MoD, MoDConfig, RoutedBlock, sample

# ---------------------------------------------------------------------------------------------------------
# Helpers

SMALL = dict(vocab_size=29, block_size=24, n_layer=4, n_head=2, n_embd=16, capacity=0.25)


def tokens(B, T, seed=0, vocab_size=SMALL["vocab_size"]):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def redrawn(seed=0, **changes):
    """A small model with every parameter drawn anew, output projections, predictors and biases included."""
    model = MoD(MoDConfig(**{**SMALL, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p.size(-1) ** -0.5, generator=generator)
    return model


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0, check_dtype=False)


def is_decided(route, threshold=0.0):
    """Every routed block takes some tokens and leaves some, no two rows alike, none within rounding of the threshold.

    Otherwise a test of causal routing could pass because all tokens went the same way, or fail because a sum in
    another order sent one the other way.
    """
    taken = route.taken.flatten(1)
    both = taken.any(1).all() and (~taken).any(1).all()
    differ = all((route.taken[:, 0] != row).any(1).all() for row in route.taken.unbind(1)[1:])
    return bool(both and differ and ((route.logit - threshold).abs() > 1e-4).all())


@torch.no_grad()
def decided(B=3, T=None, threshold=0.0, **changes):
    """A redrawn model and tokens (B, T), T the full context by default, for which is_decided holds."""
    for seed in range(50):
        model = redrawn(seed, **changes)
        idx = tokens(B, T or model.config.block_size, seed)
        route = model(idx, causal=True, threshold=threshold)[2]
        if is_decided(route, threshold):
            return model, idx
    raise AssertionError(f"no seed gives a model that decides both ways with {changes}")


@torch.no_grad()
def one_shot(model, idx, threshold=0.0):
    """Logits (B, T, V) and Route of one causal pass over the whole text, without a cache."""
    logits, _, route = model(idx, causal=True, threshold=threshold)
    return logits, route


@torch.no_grad()
def step_by_step(model, idx, prompt, threshold=0.0):
    """The same through the KV cache: the first prompt tokens at once, then one at a time.

    Returns the logits of position prompt - 1 and later, who was taken (L, B, T), and the cache.
    """
    cache = model.new_cache(len(idx))
    start, logits, taken = 0, [], []
    for feed in (idx[:, :prompt], *idx[:, prompt:].split(1, dim=1)):
        out, _, route = model(feed, causal=True, threshold=threshold, cache=cache, start=start)
        start += feed.size(1)
        logits.append(out)
        taken.append(route.taken if route else torch.ones(0, *feed.shape, dtype=torch.bool))
    return torch.cat(logits, dim=1), torch.cat(taken, dim=2), cache


def routed_blocks(model):
    return [block for block in model.blocks if isinstance(block, RoutedBlock)]


def routed_caches(model, cache):
    return [kv for kv, block in zip(cache, model.blocks, strict=True) if isinstance(block, RoutedBlock)]


def predictor_loss(route):
    return F.binary_cross_entropy_with_logits(route.logit, route.taken.float())


def gradients(model, loss):
    """Parameter name -> gradient, or None where the loss does not reach."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def part(name):
    return next((part for part in ("router", "predictor") if part in name), "body")


# ---------------------------------------------------------------------------------------------------------
# The model: against references written out here, in float64, that share nothing with mod.py but the weights


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-7).sqrt()


def turn(x, position):
    """Rotary embedding of x (..., n, D) in complex numbers: pair j turns by position * 10000^(-2j / D)."""
    half = x.size(-1) // 2
    angle = torch.as_tensor(position).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)


def dense_reference(model, idx):
    """A plain pre-norm transformer: explicit mask, explicit softmax."""
    W = {name: p.detach().double() for name, p in model.named_parameters()}
    B, T = idx.shape
    mask = torch.full((T, T), -torch.inf).double().triu(1)
    x = rms(W["embedding.weight"][idx])
    for i in range(model.config.n_layer):
        qkv = rms(x) @ W[f"blocks.{i}.attention.qkv.weight"].T
        q, k, v = (y.view(B, T, model.config.n_head, -1).transpose(1, 2) for y in qkv.chunk(3, dim=-1))
        q, k = turn(q, range(T)), turn(k, range(T))
        p = (q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)) + mask).exp()
        y = (p / p.sum(-1, keepdim=True) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + y @ W[f"blocks.{i}.attention.out.weight"].T
        x = x + F.gelu(rms(x) @ W[f"blocks.{i}.up.weight"].T) @ W[f"blocks.{i}.down.weight"].T
    return rms(x) @ W["head.weight"].T


def block_reference(W, prefix, x, position, H):
    """What a block adds to each of a list of tokens, found token by token and head by head."""
    deltas, keys, values = [], [], []
    for x_i, position_i in zip(x, position, strict=True):
        q, k, v = (W[prefix + "attention.qkv.weight"] @ rms(x_i)).view(3, H, 1, -1)
        keys.append(turn(k, [position_i]))
        values.append(v)
        heads = []
        for h in range(H):  # this token sees itself and the tokens of the list before it
            score = torch.stack([turn(q, [position_i])[h, 0] @ k[h, 0] for k in keys]) / math.sqrt(q.size(-1))
            weight = score.exp() / score.exp().sum()
            heads.append(sum(w * v[h, 0] for w, v in zip(weight, values, strict=True)))
        attended = W[prefix + "attention.out.weight"] @ torch.cat(heads)
        hidden = F.gelu(W[prefix + "up.weight"] @ rms(x_i + attended))
        deltas.append(attended + W[prefix + "down.weight"] @ hidden)
    return deltas


def mod_reference(model, idx, decide):
    """Mixture-of-Depths by loops over rows, blocks and tokens.

    decide(l, b, r, logit) lists the tokens that routed block l takes of row b. Returns logits and who was taken.
    """
    c = model.config
    W = {name: p.detach().double() for name, p in model.named_parameters()}
    logits, taken = [], torch.zeros(len(routed_blocks(model)), *idx.shape, dtype=torch.bool)
    for b, row in enumerate(idx):
        x = [rms(W["embedding.weight"][token]) for token in row]
        layer = 0
        for i in range(c.n_layer):
            prefix, chosen, gate = f"blocks.{i}.", list(range(len(x))), [1] * len(x)
            if (i + 1) % c.route_every == 0:
                r = [(W[prefix + "router.weight"] @ rms(x_t)).item() for x_t in x]
                logit = r
                if prefix + "predictor.0.weight" in W:
                    w0, b0, w2, b2 = (W[f"{prefix}predictor.{n}"] for n in ("0.weight", "0.bias", "2.weight", "2.bias"))
                    logit = [(w2 @ F.gelu(w0 @ rms(x_t) + b0) + b2).item() for x_t in x]
                chosen = decide(layer, b, r, logit)
                gate = r if c.gate == "raw" else [1 / (1 + math.exp(-r_t)) for r_t in r]
                taken[layer, b, chosen] = True
                prefix, layer = prefix + "block.", layer + 1
            deltas = block_reference(W, prefix, [x[t] for t in chosen], chosen, c.n_head)
            for t, delta in zip(chosen, deltas, strict=True):
                x[t] = x[t] + gate[t] * delta
        logits.append(torch.stack([W["head.weight"] @ rms(x_t) for x_t in x]))
    return torch.stack(logits), taken


@pytest.mark.parametrize("shape", [dict(), dict(n_layer=1, n_head=1), dict(n_head=4, n_embd=24, route_every=1)])
def test_capacity_1_is_a_plain_dense_transformer(shape):
    """With nothing to choose there is no router and no predictor either."""
    model = redrawn(capacity=1, **shape)
    idx = tokens(3, 24)
    for causal in (False, True):
        logits, loss, route = model(idx, idx, causal=causal)
        close(logits, dense_reference(model, idx))
        close(loss, -dense_reference(model, idx).log_softmax(-1).gather(2, idx[..., None]).mean())
        assert route is None
    C, c = model.config.n_embd, model.config
    assert not [name for name, _ in model.named_parameters() if part(name) != "body"]
    assert sum(p.numel() for p in model.parameters()) == 2 * c.vocab_size * C + c.n_layer * 12 * C * C


ROUTED = [
    dict(),
    dict(gate="raw"),
    dict(capacity=0.5, route_every=1, n_layer=2),
    dict(causal="router", gate="raw", route_every=3, n_layer=6),
    dict(causal="router", capacity=0.1),
]


@pytest.mark.parametrize("changes", ROUTED)
def test_top_k_routing_equals_loops(changes):
    """Equation 1. Traps: rotary angles of positions 0..k-1; the residual counted twice; indices from topk unsorted,
    or weights not permuted with them. Each of these is another function."""
    model = redrawn(**changes)
    idx = tokens(2, 13)
    k = max(1, round(model.config.capacity * 13))
    expected, taken = mod_reference(model, idx, lambda _l, _b, r, _: sorted(range(13), key=lambda t: -r[t])[:k][::-1])
    assert not torch.equal(expected, mod_reference(model, idx, lambda *_: [])[0])
    # Above the reference took tokens in order of score, so as to show what that does: it has to be undone.
    logits, _, route = model(idx)
    assert torch.equal(route.taken, taken)
    close(logits, expected)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("changes", ROUTED)
def test_causal_routing_equals_loops(changes, threshold):
    """Section 3.5. Trap: the gate is the router's weight, also where the predictor decides."""
    model, idx = decided(B=2, T=13, threshold=threshold, **changes)
    expected, taken = mod_reference(
        model, idx, lambda _l, _b, _r, logit: [t for t in range(13) if logit[t] > threshold]
    )
    logits, route = one_shot(model, idx, threshold)
    assert torch.equal(route.taken, taken)
    close(logits, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_random_routing_equals_loops(causal):
    model = redrawn(routing="random", gate="raw")
    idx = tokens(2, 13)
    logits, _, route = model(idx, causal=causal)
    expected, taken = mod_reference(model, idx, lambda l, b, *_: route.taken[l, b].nonzero().flatten().tolist())
    assert torch.equal(route.taken, taken)
    close(logits, expected)

"""Mixture-of-Depths (MoD), whole, in one file: a transformer that chooses which tokens to spend compute on.

Raposo et al., "Mixture-of-Depths: Dynamically allocating compute in transformer-based language models",
arXiv:2404.02258. In every other block a router lets only the K highest-scoring of a sequence's T tokens through
attention and MLP (K = capacity * T, say 12.5 %); the others pass by on the residual stream. Section 3.4:

    x_i  <-  x_i + gate(r_i) * f(X~)_i    if r_i is among the K highest of its sequence
    x_i  <-  x_i                          otherwise

(X~: those K tokens; f: the change that the block makes to them, its residual stream not included).

    x (B, T, C) ----+---------------------------------------------------------------+--> x (B, T, C)
                    |                                                               |
                    +--> router r (B, T) --> K indices, in temporal order (B, K)    + scatter-add
                    |       |                     |                                 |
                    |       +---------------------|--------------- gate(r) -------> *
                    |                             |                                 |
                    +------------------------- gather --> (B, K, C) --> f = attention, MLP

Who is chosen is the only thing that differs between the two modes (attention is causal in both):
    top-k   compares a token with the whole sequence: for training, since K is known and every shape fixed. Its loss
            has seen the future: whether a token is taken depends on later ones.
    causal  asks each token alone: is r > 0? The router learns to make that mean "top-k takes it" (section 3.5). For
            sampling, and for an honest loss. In this mode, and only in it, one pass over a text and the same text fed
            token by token through the KV cache give the same logits, up to rounding. (Random routing draws anew.)

Unlike the paper: r is w . norm(x), not w . x; the gate is sigmoid(r), not r; the loss that teaches the causal choice
trains the router alone, not the layers below it; embeddings are mixed with the three before (TokenMix); only a quarter
of the rotary pairs turn. README says why.

Shapes: B batch (a row is one of its sequences), T time, C channels (n_embd), H heads, D head size (C / H),
        V vocabulary, L routed blocks, K tokens that a routed block takes of each row (the wrapped block's T)
"""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

CHOICES = {"routing": ("topk", "random"), "gate": ("sigmoid", "raw")}


@dataclass
class MoDConfig:
    vocab_size: int = 257  # the bytes, and an end-of-text token
    block_size: int = 256  # context length: the longest sequence the rotary table covers
    n_layer: int = 8
    n_head: int = 4
    n_embd: int = 128
    capacity: float = 0.125  # share of a sequence that a routed block takes; 1 is the dense transformer
    route_every: int = 2  # every route_every-th block is routed (section 4.1: every other, at 12.5 %, is best)
    routing: str = "topk"  # "topk", or "random": the control, which chooses blindly
    gate: str = "sigmoid"  # "sigmoid", or "raw": the router's output as it is, as in the paper
    predictor: bool = False  # a small MLP beside the router makes the causal choice (the paper's other way)

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "route_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.n_embd < 4 or self.n_embd % (2 * self.n_head):  # 4, since a predictor is n_embd // 4 wide
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of 2 x n_head {self.n_head}, and at least 4")
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity {self.capacity} must be above 0 and at most 1 (1 is dense)")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} must be one of {', '.join(choices)}")
        if self.predictor and self.routing == "random":
            raise ValueError("predictor True must be False with routing random: noise can't be predicted")

    @property
    def routed_layers(self):
        return list(range(self.route_every - 1, self.n_layer, self.route_every)) if self.capacity < 1 else []


# ---- Norm and rotary position embedding


def norm(x):
    return F.layer_norm(x, (x.size(-1),))  # no gain, which the matrix that follows can learn, and no bias


def rotary_table(block_size, head_size):
    """Cosine and sine of position times frequency, (block_size, 2, 1, D); half of the sines negated, for rotate.

    About a quarter of the pairs turn (arXiv:2204.06745); with the others a head finds content however far away it is.
    """
    turning = max(1, head_size // 8)  # pairs, of head_size // 2
    frequency = torch.zeros(head_size // 2)
    frequency[:turning] = 10000.0 ** -(torch.arange(turning) / turning)
    angle = torch.arange(block_size)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)), dim=1)[:, :, None]


def rotate(x, rope):
    """Turn the pairs (x_i, x_{i + D/2}) of x (B, T, H, D) by a token's angle; rope (T, 2, 1, D), or with B in front."""
    cos, sin = rope.to(x.dtype).unbind(-3)  # (T, 1, D) or (B, T, 1, D)
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


# ---- An ordinary pre-norm transformer block, except that it returns its change to x, which the caller adds


class Attention(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.out = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x, rope, cache=None):
        """x (B, T, C) -> (B, T, C). cache holds the keys and values of earlier tokens: in sampling only."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3 * self.n_head, C // self.n_head)
        qk, v = qkv.split((2 * self.n_head, self.n_head), dim=2)
        q, k = rotate(qk, rope).chunk(2, dim=2)  # rotated together: one call for two
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, D)
        mask = None
        if cache is not None:
            k, v, mask = cache.update(k, v)
        # One query sees every key there is, so only T > 1 needs the triangle. (With one query and a longer
        # cache, is_causal would show it the first key only.)
        triangle = True if T > 1 else False  # a bool also where torch.compile lets T vary
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=triangle)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.attention = Attention(n_embd, n_head)
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x, rope, cache=None):
        """The change this block makes to x (B, T, C), the residual stream itself not included; rope as in rotate."""
        attended = self.attention(norm(x), rope, cache)
        return attended + self.down(F.gelu(self.up(norm(x + attended)), approximate="tanh"))


# ---- The routed block: what Mixture-of-Depths is about


class Route(NamedTuple):
    """What one routed block decided, (B, T) each; of the whole model, (L, B, T)."""

    taken: torch.Tensor  # bool: went through the block
    r: torch.Tensor  # the router's output
    logit: torch.Tensor  # what causal mode compares with the threshold: r, a predictor's output, or noise


class RoutedBlock(nn.Module):
    """Mixture-of-Depths around any causal block that returns its change to x. RoutedBlock's moves: score, choose,
    gather, run, gate, scatter. The block is called as block(x, rope), with the taken tokens x (B, K, C) and rope's
    entries for their positions (B, K, ...), or None. Sampling passes a third argument, cache.of(rows, count), whose
    update the block calls. There forward runs the prompt, in the same shapes, and step each later token: x (R, 1, C) of
    the R rows that take theirs, and rope (1, ...), the position that all rows are at.

    To change what a token is worth, change score: r ranks and gates, logit makes the causal choice, and both must come
    from the token alone. To change who is chosen at given scores, change topk, above and step. To change how many, set
    capacity, also while training (if compiled, each value compiles anew; flops_per_token still reads the config's). To
    route only the MLP, wrap it so that it takes rope and cache, and ignores them. To lift all this into another model,
    take this class with norm, Route and choice_loss, and to sample through a cache also KVCache; rope must be a tensor.
    """

    def __init__(self, block, n_embd, capacity=0.125, routing="topk", gate="sigmoid", predictor=False):
        super().__init__()
        self.block = block
        self.capacity = capacity
        self.random = {"topk": False, "random": True}[routing]
        self.raw = {"sigmoid": False, "raw": True}[gate]
        self.router = nn.Linear(n_embd, 1, bias=False)
        self.predictor = None
        if predictor:
            hidden = n_embd // 4
            self.predictor = nn.Sequential(nn.Linear(n_embd, hidden), nn.GELU("tanh"), nn.Linear(hidden, 1))

    def score(self, x):
        """For each token of x (B, T, C), by itself: r (section 3.4) and the causal choice's logit (3.5), (B, T) each.
        In float32, weights too, with autocast off in the caller: bfloat16 makes ties and flips decisions."""
        normed = norm(x.float())
        r = self.router(normed).squeeze(-1)
        if self.random:
            return r, torch.rand_like(r) - (1 - self.capacity)  # above 0 with probability capacity
        # Two gradients. The language model's loss comes through the gate: r scales what the block adds, so it teaches
        # the router and, as through any weight, the layers below. choice_loss comes through logit. It may teach whoever
        # makes the causal choice, but not the layers below, hence the detach. If the router makes it, it runs twice:
        # the same values, another gradient. If x has no gradient, once is enough.
        if self.predictor is None and not normed.requires_grad:
            return r, r
        chooser = self.router if self.predictor is None else self.predictor
        return r, chooser(normed.detach()).squeeze(-1)

    def topk(self, r):
        """For training: the positions (B, K) of each row's K highest r, ascending, and the same as a mask (B, T)."""
        rank = torch.rand_like(r) if self.random else r
        K = max(1, round(self.capacity * r.size(1)))
        # Sorted by position, since attention among the taken tokens is causal in time, not in score.
        idx_BK = rank.topk(K, dim=1).indices.sort(dim=1).values
        return idx_BK, torch.zeros_like(r, dtype=torch.bool).scatter(1, idx_BK, True)

    def above(self, logit, threshold):
        """For sampling: the same two, for the tokens whose logit exceeds the threshold; K is the fullest row's.
        Shorter rows are padded, with tokens that were not taken: at the end, where the causal mask hides them."""
        taken = logit > threshold
        K = taken.sum(dim=1).max()  # waits for the device
        # Stable: the taken tokens come first and keep their order.
        return taken.int().argsort(dim=1, descending=True, stable=True)[:, :K], taken

    def gate(self, r):
        # Multiplying by a function of r is how the router learns what to take: the choice itself has no gradient.
        return r if self.raw else r.sigmoid()

    def forward(self, x, rope=None, causal=False, threshold=0.0, cache=None):
        """x (B, T, C) -> new x, Route. rope (T, ...) has an entry for each position. With a cache, x is a prompt."""
        assert causal or cache is None, "with a cache the choice must be causal: top-k would need the future"
        with torch.autocast(x.device.type, enabled=False):
            r, logit = self.score(x)
        idx_BK, taken = self.above(logit, threshold) if causal else self.topk(r)
        if idx_BK.size(1) == 0:  # nobody was taken: in causal mode only
            return x, Route(taken, r, logit)
        idx_BKC = idx_BK[..., None].expand(-1, -1, x.size(-1))
        inputs = [x.gather(1, idx_BKC), None if rope is None else rope[idx_BK]]  # the real positions, not 0 to K - 1
        if cache is not None:
            inputs.append(cache.of(list(range(len(x))), taken.sum(dim=1).tolist()))
        gate_BK = (self.gate(r) * taken).gather(1, idx_BK)  # 0 for padding
        change_BKC = gate_BK[..., None] * self.block(*inputs)
        return x.scatter_add(1, idx_BKC, change_BKC.to(x.dtype)), Route(taken, r, logit)

    # Sampling: skip this at first reading

    def step(self, x, rope, threshold, cache):
        """forward for one new token a row, x (B, 1, C), in causal mode, with autocast off. Only the rows that take
        theirs run the block. A skipped token costs no more than its score, and needs no entry in the cache, since the
        block attends only to tokens that it took."""
        r, logit = self.score(x)
        taken = logit > threshold
        route = Route(taken, r, logit)
        rows = [row for row, yes in enumerate(taken.flatten().tolist()) if yes]
        if not rows:
            return x, route
        idx_R = torch.tensor(rows, device=x.device)
        change = self.gate(r[idx_R])[..., None] * self.block(x[idx_R], rope, cache.of(rows))  # (R, 1, C)
        return x.index_add(0, idx_R, change.to(x.dtype)), route


def choice_loss(route):
    """The auxiliary loss of section 3.5, which teaches the router (or predictor) to foresee the top-k choice: add it to
    the cross-entropy. The mean binary cross-entropy in nats; route is of a top-k forward, and not of random routing.
    Gradient checkpointing must be use_reentrant=False, or this loss has no gradient."""
    return F.binary_cross_entropy_with_logits(route.logit, route.taken.float())


# ---- The model


class TokenMix(nn.Module):
    """A causal convolution over time, channel by channel: each token and the three before it. Not in the paper: without
    it, attention learns late to copy what was read."""

    def __init__(self, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_embd, 4))

    def forward(self, x, last=None):
        """x (B, T, C) and the last three tokens before it, zeros if None -> mixed (B, T, C), the last three now."""
        x = F.pad(x, (0, 0, 3, 0)) if last is None else torch.cat((last, x), dim=1)
        return (x.unfold(1, 4, 1) * self.weight).sum(dim=-1), x[:, -3:]  # unfold: (B, T, C, 4)


class MoD(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.mix = TokenMix(c.n_embd)
        self.embedding = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList()
        for i in range(c.n_layer):
            block = Block(c.n_embd, c.n_head)
            if i in c.routed_layers:
                block = RoutedBlock(block, c.n_embd, c.capacity, c.routing, c.gate, c.predictor)
            self.blocks.append(block)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.register_buffer("rope", rotary_table(c.block_size, c.n_embd // c.n_head), persistent=False)
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight", "head.weight", "bias")):
                nn.init.zeros_(p)  # every block starts as the identity, every token as likely as another
            elif p.dim() > 1:  # a gain would stay as it was made
                nn.init.normal_(p, std=p.size(-1) ** -0.5)
        self.mix.weight.data[:, -1] = 1  # each token's own; the three before it have random ones

    def forward(self, idx, targets=None, causal=False, threshold=0.0):
        """Tokens idx (B, T) -> logits (B, T, V); mean cross-entropy with targets (B, T) in nats, or None; the Route of
        all routed blocks, (L, B, T), or None if there are none. choice_loss is left to the training loop.

        For training and evaluation. Routing is top-k, unless causal: then a token is taken if its logit exceeds
        threshold; the higher, the fewer. Autocast may make the matrix products bfloat16.
        """
        assert idx.size(1) <= self.config.block_size, f"{idx.size(1)} tokens are longer than block_size"
        x, _ = self.mix(norm(self.embedding(idx)))
        rope = self.rope[: idx.size(1)]
        routes = []
        for block in self.blocks:
            if isinstance(block, RoutedBlock):
                x, route = block(x, rope, causal, threshold)
                routes.append(route)
            else:
                x = x + block(x, rope)
        logits = self.head(norm(x))
        loss = None if targets is None else F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return logits, loss, stack_routes(routes)

    # Sampling: skip this at first reading

    def new_cache(self, batch):
        c, weight = self.config, self.embedding.weight
        # A dense block's buffers have room for the full context from the start; a routed block's grow.
        sizes = [16 if i in c.routed_layers else c.block_size for i in range(c.n_layer)]
        return Cache([KVCache(batch, c.n_head, size, c.n_embd // c.n_head, weight) for size in sizes])

    @torch.inference_mode()
    def extend(self, idx, cache, threshold=0.0):
        """Run new tokens idx (B, T), a whole prompt or after it one a row -> logits (B, V) of the last, Route (L, B, T)
        of the new, or None. Always causal: top-k would need the future. Routers and predictors must be float32; all
        other weights, and with them the cache, may be bfloat16."""
        T, start = idx.size(1), cache.length
        assert T == 1 or start == 0, f"{T} new tokens: after the prompt it is one at a time"
        assert start + T <= self.config.block_size, f"{start + T} tokens are longer than block_size"
        cache.length += T
        rope = self.rope[start : start + T]
        routes = []
        with torch.autocast(idx.device.type, enabled=False):  # the cache has the dtype of the weights
            x, cache.last = self.mix(norm(self.embedding(idx)), cache.last)
            for block, kv in zip(self.blocks, cache.blocks, strict=True):
                if isinstance(block, RoutedBlock):
                    x, route = block.step(x, rope, threshold, kv) if T == 1 else block(x, rope, True, threshold, kv)
                    routes.append(route)
                else:
                    x = x + block(x, rope, kv)
            logits = self.head(norm(x[:, -1]))
        return logits, stack_routes(routes)

    def generate(self, idx, num_tokens, temperature=1.0, top_k=None, top_p=None, threshold=0.0):
        """Continue the prompts idx (B, T), T >= 1, of which the last block_size tokens are used: yields a Generated,
        num_tokens times. A full context's last half is run again, as a new cache's prompt. (Its top_k is sample's.)"""
        size = self.config.block_size
        text = new = idx[:, -size:]
        cache = self.new_cache(len(idx))
        for _ in range(num_tokens):
            if cache.length + new.size(1) > size:
                new = text[:, -max(1, size // 2) :]
                cache = self.new_cache(len(idx))
            logits, route = self.extend(new, cache, threshold)
            new = sample(logits, temperature, top_k, top_p)
            text = torch.cat((text, new), dim=1)[:, -size:]
            yield Generated(new, logits, route, cache)


def stack_routes(routes):
    """Routes (B, T) of L blocks -> one, (L, B, T), or None if there are none."""
    return Route(*(torch.stack(field) for field in zip(*routes, strict=True))) if routes else None


# ---- Sampling: skip this at first reading


class KVCache:
    """Keys and values of the tokens that one block has processed. In a routed block each row has its own length, since
    each took its own tokens; no real token sees what is beyond its row's length."""

    def __init__(self, batch, n_head, size, head_size, like):
        # Zeros, since memory as it comes may hold NaN, and a masked NaN is still NaN (0 * NaN).
        self.k = like.new_zeros(batch, n_head, size, head_size)
        self.v = torch.zeros_like(self.k)
        self.length = [0] * batch  # on the host, where it costs no synchronisation to read

    def of(self, rows, count=None):
        """The same cache, for a block that runs these rows only (ascending): its update stores into them. Of the new
        tokens of rows[i] the first count[i] are real and the others padding; all are real if count is None."""
        return SimpleNamespace(update=partial(self.update, rows=rows, count=count))

    def update(self, k, v, rows=None, count=None):
        """Store keys and values (R, H, T, D) of new tokens; T > 1 in an empty cache only, for all its rows. Returns all
        that these R rows hold now, (R, H, S, D) each, padded to the longest, S; and a mask (R, 1, 1, S) of the real
        ones, or None where is_causal is enough."""
        R, _, T, _ = k.shape
        rows = list(range(R)) if rows is None else rows
        held = [self.length[row] for row in rows]
        assert T == 1 or held == [0] * len(self.length), f"{T} new tokens a row: only in an empty cache, for all rows"
        for row, n in zip(rows, count or [T] * R, strict=True):
            self.length[row] += n
        start, S = min(held), max(held) + T
        if S > self.k.size(2):  # full: double the buffers
            padding = (0, 0, 0, max(S, 2 * self.k.size(2)) - self.k.size(2))
            self.k, self.v = F.pad(self.k, padding), F.pad(self.v, padding)
        # No copy where the rows lie side by side and are equally long: a prompt, a dense block, a single row. (What a
        # prompt has of padding is overwritten by the next token, or hidden by the length.)
        if start + T == S and rows[-1] - rows[0] + 1 == R:
            part = slice(rows[0], rows[-1] + 1)
            self.k[part, :, start:S], self.v[part, :, start:S] = k, v
            return self.k[part, :, :S], self.v[part, :, :S], None
        idx_R, at_R = torch.tensor([rows, held], device=k.device)
        self.k[idx_R, :, at_R], self.v[idx_R, :, at_R] = k[:, :, 0], v[:, :, 0]  # (R, H, D)
        mask = torch.arange(S, device=k.device) <= at_R[:, None]  # (R, S)
        k, v = (x[:, :, :S].index_select(0, idx_R) for x in (self.k, self.v))  # faster than x[idx_R]
        return k, v, mask[:, None, None]


@dataclass
class Cache:
    """What the model remembers of a text: made by new_cache, filled by extend."""

    blocks: list  # a KVCache each
    last: torch.Tensor | None = None  # three embeddings (B, 3, C), for TokenMix
    length: int = 0  # tokens that extend has run


class Generated(NamedTuple):
    token: torch.Tensor  # (B, 1): the new tokens
    logits: torch.Tensor  # (B, V): which they were drawn from
    route: Route | None  # of the tokens run to get there: the prompt at first, then the last new token
    cache: Cache


def sample(logits, temperature=1.0, top_k=None, top_p=None):
    """Draw from logits (B, V): one token a row, (B, 1). Temperature 0 is argmax. top_k >= 1, 0 < top_p <= 1."""
    if temperature < 1e-30:  # 0, or too small to divide float32 by
        return logits.argmax(dim=-1, keepdim=True)
    p = ((logits.float() - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)  # shifted: no overflow
    if top_k is None and top_p is None:
        return torch.multinomial(p, 1)
    p, order = p.sort(dim=-1, descending=True, stable=True)  # stable: among ties the first, as argmax
    p = p[:, :top_k]
    if top_p is not None:  # the smallest set of likeliest tokens that holds top_p of these; never less than one
        p = p.masked_fill(p.cumsum(dim=-1) - p >= max(top_p, 1e-30) * p.sum(dim=-1, keepdim=True), 0.0)
    return order.gather(1, torch.multinomial(p, 1))


# ---- FLOPs


def flops_per_token(config, T, share=None):
    """Forward FLOPs per token of a T-token sequence, the mean over its positions; training counts as 3 times that. With
    every other block routed at 12.5 %, the blocks cost some 0.56 of a dense model's.

    share is the part of the tokens that every routed block takes, K / T if None. A product of m x p by p x n counts
    2mpn, and of causal attention the needed half, T / 2 keys a query. Norms, rotary and TokenMix are left out.
    """
    C = config.n_embd

    def block(n):  # n tokens through the 12 C^2 weights of qkv, out and MLP; QK^T and AV, 2C each, for n / 2 keys
        return n * (2 * 12 * C**2 + 4 * C * n / 2)

    n_taken = max(1, round(config.capacity * T)) if share is None else share * T
    chooser = 2 * C + (2 * (C * (C // 4) + C // 4) if config.predictor else 0)
    routed = len(config.routed_layers)
    blocks = (config.n_layer - routed) * block(T) / T + routed * (block(n_taken) / T + chooser)
    return blocks + 2 * C * config.vocab_size

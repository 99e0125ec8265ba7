"""experiments/bench_cuda.py where there is no GPU: the parts of its graphs, run one by one."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from experiments import bench_cuda
from experiments.bench import random_model
from mod import MoDConfig
from prepare_data import UserError


@pytest.fixture
def tiny(monkeypatch):
    """A model and a prompt; a graph that is replayed runs its part."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **kw: zeros(*size, **kw))  # needs CUDA
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph: f)
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(bench_cuda.GraphDecoder, "capture", lambda self, part: SimpleNamespace(replay=part))
    torch.manual_seed(0)
    model = random_model(MoDConfig(29, block_size=64, n_layer=5, n_head=2, n_embd=16), torch.device("cpu"))
    return model, torch.randint(29, (1, 40))


def test_graphs_give_the_logits_that_extend_gives(tiny):
    row = bench_cuda.compare(*tiny, num_tokens=8, rounds=1)  # raises UserError if they don't
    assert 0 < row["graph_share"] < 1 and row["compiled_tok_s"] > 0


def test_other_logits_are_refused(tiny, monkeypatch):
    def decide(block, x):
        return torch.full((1, 1), 9.0), torch.tensor([[True]])

    monkeypatch.setattr(bench_cuda, "decide", decide)
    with pytest.raises(UserError, match="graph, 16 wide: logits are .* off"):
        bench_cuda.compare(*tiny, num_tokens=8, rounds=1)

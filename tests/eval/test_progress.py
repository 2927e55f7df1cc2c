"""Progress of a forward pass, layer by layer."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from unsloth_spectral.eval.progress import layers_reported


def test_every_layer_is_a_step(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model, seen = tiny_llama(num_hidden_layers=3), []
    with layers_reported(model, "prefill", lambda *step: seen.append(step)):
        model(torch.ones(1, 4, dtype=torch.long))
    assert seen == [("prefill", done, 3) for done in (0, 1, 2, 3)]


def test_hooks_go_even_after_an_error(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model, seen = tiny_llama(), []
    with pytest.raises(RuntimeError, match="stop"), layers_reported(model, "prefill", lambda *step: seen.append(step)):
        raise RuntimeError("stop")
    model(torch.ones(1, 4, dtype=torch.long))
    assert len(seen) == 1
    assert not any(module._forward_hooks for module in model.modules())


def test_nobody_listens_or_nothing_to_report(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model, seen = tiny_llama(), []
    with layers_reported(model, "prefill", None):
        assert not any(module._forward_hooks for module in model.modules())
    with layers_reported(nn.Linear(2, 2), "prefill", lambda *step: seen.append(step)):
        pass
    assert seen == []

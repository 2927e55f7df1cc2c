"""A sealed block rebuilds no more of its keys at once than it has to."""

from unittest.mock import patch

import pytest
import torch

from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.codec.registry import make_codec
from unsloth_spectral.codec.spectral import block as block_module
from unsloth_spectral.codec.spectral.keys import KeyCodes
from unsloth_spectral.rope import Rotation

HEADS, HEAD_DIM = 2, 32


def test_scores_of_many_rows_never_rebuild_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_module, "_REBUILT_TOKENS", 256)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, HEADS, 640, HEAD_DIM, generator=generator)
    angles = torch.arange(640)[:, None] * 100.0 ** -torch.linspace(0, 1, HEAD_DIM // 2)
    halves = slice(0, HEAD_DIM // 2), slice(HEAD_DIM // 2, HEAD_DIM)
    observed = Observed(Rotation.of(torch.polar(torch.ones_like(angles), angles)[None], *halves))
    codec = make_codec(SpectralConfig(bits_per_element=4), 1).layer(0)
    block = codec.seal(ExactBlock(keys, values), None, observed)
    query = torch.randn(1, HEADS, 128, HEAD_DIM, generator=generator)
    expected = query @ block.keys.reconstruct().mT
    with patch.object(KeyCodes, "reconstruct", autospec=True, side_effect=KeyCodes.reconstruct) as rebuilt:
        scores = block.scores(query)
    assert [call.args[0].num_tokens for call in rebuilt.call_args_list] == [256, 256, 128]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)

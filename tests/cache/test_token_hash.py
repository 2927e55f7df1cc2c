"""A text is known again by its tokens, and whatever is no tensor of tokens is refused with the way to make one."""

from typing import Any

import numpy as np
import pytest
import torch

from unsloth_spectral.cache.token_hash import check_tokens, token_hashes
from unsloth_spectral.errors import InvalidArgumentError

TOKENIZE = 'give tokenizer(text, return_tensors="pt").input_ids'
OF_MAPPING = 'give its "input_ids", made with return_tensors="pt"'
AS_ROW, AS_ROWS = "give torch.as_tensor(input_ids)[None]", "give torch.as_tensor(input_ids)"


def test_token_hashes() -> None:
    ids = torch.randint(0, 50_000, (1, 100))
    hashes = token_hashes(ids, [1, 50, 100, 101])
    assert set(hashes) == {1, 50, 100}
    assert len(set(hashes.values())) == 3
    assert token_hashes(ids[:, :50], [50]) == {50: hashes[50]}
    assert token_hashes(ids.int(), [100])[100] == hashes[100]
    changed = ids.clone()
    changed[0, 0] += 1
    assert token_hashes(changed, [1])[1] != hashes[1]
    # Rows are no longer sequences.
    assert token_hashes(ids.view(2, 50), [50])[50] not in hashes.values()
    assert token_hashes(ids.view(100, 1), [1])[1] not in hashes.values()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_tensors_of_tokens_are_taken(dtype: torch.dtype) -> None:
    check_tokens(torch.ones(1, 5, dtype=dtype))


@pytest.mark.parametrize(
    ("input_ids", "fix"),
    [
        ("a text", TOKENIZE),
        (["a text"], TOKENIZE),
        ([], TOKENIZE),
        (None, TOKENIZE),
        ({"input_ids": torch.ones(1, 5)}, OF_MAPPING),
        ([1], AS_ROW),
        ((1, 2), AS_ROW),
        (np.arange(5), AS_ROW),
        ([[1]], AS_ROWS),
        ([(1, 2), (3, 4)], AS_ROWS),
        (np.ones((1, 5), dtype=np.int64), AS_ROWS),
        (torch.ones(1, 5), "got torch.float32: convert it"),
    ],
)
def test_what_is_no_tensor_of_tokens_is_refused_with_the_fix(input_ids: Any, fix: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_tokens(input_ids)
    assert str(caught.value).endswith(fix)

"""Byte counts are those that torch has allocated, each storage once."""

import torch

from unsloth_spectral.codec.tensors import storage_bytes


def test_tensors_of_their_own_are_added_up() -> None:
    assert storage_bytes() == 0
    assert storage_bytes(torch.zeros(3, 5), torch.zeros(7, dtype=torch.int8)) == 60 + 7


def test_a_view_counts_all_that_it_keeps_alive() -> None:
    assert storage_bytes(torch.zeros(100, 4)[:1]) == 1600


def test_two_views_of_one_storage_count_once() -> None:
    fused = torch.zeros(10, 8)
    assert storage_bytes(fused[:, :4], fused[:, 4:]) == 320


def test_empty_tensors_count_nothing() -> None:
    assert storage_bytes(torch.zeros(0, 4), torch.zeros(2, 0), torch.ones(1)) == 4

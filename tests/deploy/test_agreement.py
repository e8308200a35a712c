from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coldforge.deploy.agreement import agreement
from coldforge.deploy.runtime import OnnxSession
from coldforge.errors import UsageError


def test_agreement_is_the_fraction_of_equal_labels() -> None:
    assert agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.75
    assert agreement(torch.tensor([7]), torch.tensor([7])) == 1.0


@pytest.mark.parametrize("other", [torch.tensor([1, 2]), torch.tensor([[1], [2], [3]]), torch.empty(0)])
def test_labels_of_different_images_do_not_compare(other: Tensor) -> None:
    with pytest.raises(UsageError, match="expected two label vectors of the same images"):
        agreement(torch.tensor([1, 2, 3]), other)


def test_twin_and_file_agree_and_a_stranger_does_not(int8: Any) -> None:
    session = OnnxSession(int8.path, threads=1)
    images = torch.rand(100, 2, 10, 10, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = int8.twin(images)
    assert agreement(logits.argmax(1), session.labels(images)) >= 0.98
    assert agreement((-logits).argmax(1), session.labels(images)) < 0.5

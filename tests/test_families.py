"""Every family's greedy tokens are those of transformers, through steps of any composition."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import VARIANTS, write_variant
from tests.test_model_parity import check_parity


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_transformers(variant: str, tmp_path: Path) -> None:
    """Prompts shorter and longer than a window, in chunks, and outputs that leave it behind."""
    path = write_variant(tmp_path, variant, seed=1)
    check_parity(path, [1, 37, 22, 5], num_tokens=24, seed=2)

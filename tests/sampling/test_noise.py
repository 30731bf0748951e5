"""The sampling noise: a fixed hash, uniform, without correlations, the same on every device."""

from __future__ import annotations

import math

import pytest
import torch

from serve.sampling.noise import gumbel_noise, noise_streams, uniform_noise

MASK = 2**64 - 1
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 1234567)


def _splitmix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def _streams(seeds: list[int], indices: list[int]) -> torch.Tensor:
    return torch.from_numpy(noise_streams(seeds, indices))


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_the_hash_in_plain_integers(seed: int) -> None:
    state = (_splitmix((seed + 0x9E3779B97F4A7C15) & MASK) + 7 * 0x9E3779B97F4A7C15) & MASK
    stream = _splitmix(state)
    noise = uniform_noise(_streams([seed], [7]), 1000)[0]
    for token_id in range(1000):
        bits = _splitmix((stream + (token_id + 1) * 0x9E3779B97F4A7C15) % 2**64)
        assert noise[token_id].item() == ((bits >> 12) + 0.5) / 2**52


def test_noise_is_the_same_in_every_version() -> None:
    """The same seed must give the same text after an upgrade."""
    noise = uniform_noise(_streams([0, -5], [0, 3]), 2)
    assert noise.tolist() == [
        [0.33805245419550556, 0.2691302712264],
        [0.5386838958716037, 0.03160037701011087],
    ]


def test_noise_never_reaches_the_ends_of_the_interval() -> None:
    lowest, highest = 0.5 / 2**52, (2**52 - 0.5) / 2**52
    assert lowest > 0.0
    assert highest < 1.0
    noise = gumbel_noise(_streams(list(range(20)), [0] * 20), 50000)
    assert bool(noise.isfinite().all())


def test_noise_is_uniform() -> None:
    streams = _streams(list(range(-50, 50)), [0] * 100)
    noise = uniform_noise(streams, 10000).flatten()
    counts = torch.histc(noise, bins=100, min=0.0, max=1.0)
    expected = len(noise) / 100
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 99 + 5 * math.sqrt(2 * 99)
    assert abs(float(noise.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / len(noise))


def test_neighbours_are_not_correlated() -> None:
    """Over ids, output indices and seeds, and between (seed, index + 1) and (seed + 1, index)."""
    size = 200
    numbers = list(range(size))
    streams = _streams([seed for seed in numbers for _ in numbers], numbers * size)
    noise = uniform_noise(streams, 8).view(size, size, 8)
    pairs = {
        "id": (noise[:, :, 1:], noise[:, :, :-1]),
        "index": (noise[:, 1:], noise[:, :-1]),
        "seed": (noise[1:], noise[:-1]),
        "seed against index": (noise[1:, :-1], noise[:-1, 1:]),
        "index against id": (noise[:, 1:, :-1], noise[:, :-1, 1:]),
    }
    for name, (a, b) in pairs.items():
        corr = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
        assert abs(corr) < 5 / math.sqrt(a.numel()), name
    assert len(set(noise.flatten().tolist())) == noise.numel()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_is_the_same_on_a_gpu() -> None:
    streams = _streams(list(SEEDS), [3] * len(SEEDS))
    on_gpu = uniform_noise(streams.cuda(), 50000).cpu()
    assert torch.equal(on_gpu, uniform_noise(streams, 50000))

"""The memory that an embedding job declares grows with what makes it grow."""

import pytest
from slidemake.embedding.sizes import embedding_mb, workers_of


def test_memory_grows_with_threads_batch_and_tiles():
    least = embedding_mb(1, "cpu", 2, "auto", 224)
    assert least >= 4000
    # 16 tiles of 224 px are 2.3 MB, of which each of 14 more threads holds 130 times
    more = 14 * 130 * 16 * 3 * 224**2 / 2**20
    assert embedding_mb(1, "cpu", 16, "auto", 224) - least == pytest.approx(more, abs=1)
    assert embedding_mb(1, "cpu", 2, 64, 224) > least
    assert embedding_mb(1, "cpu", 2, "auto", 512) > least
    assert embedding_mb(2, "cpu", 2, "auto", 224) == least + 1500


def test_a_gpu_is_fed_by_four_threads_at_least():
    assert [workers_of("cuda:0", n) for n in (1, 16)] == [4, 16]
    assert [workers_of("cpu", n) for n in (0, 1, 16)] == [1, 1, 16]
    assert embedding_mb(1, "cuda", 1, 128, 256) == embedding_mb(1, "cuda", 4, 128, 256)

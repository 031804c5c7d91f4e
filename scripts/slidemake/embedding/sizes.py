"""How large batches are, how many threads feed a GPU, and what memory they take: known before a model is loaded."""

from __future__ import annotations

# batch_size: auto. On CPU larger batches are not faster and need more memory; batches of 8 need 300 MB less with two
# threads and are 4 % slower
BATCH = {"cpu": 16, "cuda": 128}
READERS_PER_GPU = 4  # worker threads beside a GPU, at least: two feed it, the others read


def batch_of(device: str) -> int:
    """Tiles of a batch where nobody says how many."""
    return BATCH["cpu" if device == "cpu" else "cuda"]


def workers_of(device: str, threads: int) -> int:
    """Threads that work on batches."""
    return max(1, threads) if device == "cpu" else max(READERS_PER_GPU, threads)


def embedding_mb(encoders: int, device: str, threads: int, batch: int | str, tile_px: int) -> int:
    """Memory in MB that an embedding job asks for: torch, the weights, and what every thread has in hand.

    A thread that reads for a GPU holds its tiles about three times (compressed, decoded, in order), and
    two batches are in page-locked memory; on the CPU it holds what the network's layers give for a batch, which is a
    hundred times the tiles in a convolutional network.
    """
    tiles = batch_of(device) if batch == "auto" else int(batch)
    megabytes = tiles * 3 * tile_px**2 / 2**20
    in_hand = megabytes * (HELD_ON_CPU if device == "cpu" else HELD_FOR_GPU) * workers_of(device, threads)
    return 2000 + 1500 * encoders + round(in_hand)


HELD_ON_CPU, HELD_FOR_GPU = 130, 4  # times the bytes of a batch's tiles that a thread holds

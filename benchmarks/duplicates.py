"""100,000 images' hashes into groups of duplicates: seconds, and whether every planted copy was found.

    .venv/bin/python benchmarks/duplicates.py

Hashes are random, as those of different photographs nearly are; a tenth of them are copies of others with up to 11 of 64 bits
changed, and a thousand share one hash, as the empty frames of a camera do. Bar: under two minutes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "{{cookiecutter.project_slug}}"))

import numpy as np

from comp.engine.data import duplicates, phash

IMAGES, COPIES, SAME = 100_000, 10_000, 1000

if __name__ == "__main__":
    random = np.random.default_rng(0)
    hashed = random.integers(0, 2**64, IMAGES, dtype=np.uint64)
    for at in range(COPIES):
        flips = sum(1 << int(bit) for bit in random.permutation(64)[: at % (phash.FAR + 1)])
        hashed[IMAGES - COPIES + at] = hashed[at] ^ np.uint64(flips)
    hashed[COPIES : COPIES + SAME] = hashed[COPIES]
    began, worked = time.perf_counter(), time.process_time()
    pairs = phash.similar_pairs(hashed)
    groups = duplicates.group_names(np.arange(IMAGES).astype(str), pairs)
    took, cpu = time.perf_counter() - began, time.process_time() - worked
    planted = np.column_stack([np.arange(COPIES), np.arange(IMAGES - COPIES, IMAGES)])
    found = float((groups[planted[:, 0]] == groups[planted[:, 1]]).mean())
    print(
        json.dumps(
            {
                "seconds": round(took, 1),
                "cpu_seconds": round(cpu, 1),
                "pairs": len(pairs),
                "groups": len(np.unique(groups)),
                "planted_found": found,
            }
        )
    )

"""What tests/golden.py compares: numbers, and not the names they stand under."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from golden import read
from safetensors.numpy import save_file

WEIGHT, BIAS = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, np.float32)


def project(root: Path, tensors: dict[str, np.ndarray], value: float, note: str) -> dict[str, str]:
    """The golden values of a project with one run of one fold."""
    (root / "runs/a").mkdir(parents=True)
    (root / "data").mkdir()
    (root / "submissions").mkdir()
    save_file(tensors, root / "runs/a/weights.safetensors")
    batch = pa.record_batch({"row": [0, 1], "head.label": [value, 2.0]}).replace_schema_metadata(
        {"note": note}
    )
    with pa.ipc.new_file(root / "runs/a/oof.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    (root / "submissions/a.csv").write_text(f"id,label\n1,{value}\n")
    pq.write_table(pa.table({"id": ["1"], "repeat": [0], "fold": [0]}), root / "data/folds.parquet")
    return read(root)


def test_names_are_not_golden_and_numbers_are(tmp_path):
    before = project(tmp_path / "1", {"head.weight": WEIGHT, "head.bias": BIAS}, 0.5, "rate")
    renamed = project(tmp_path / "2", {"fc.w": WEIGHT, "fc.b": BIAS}, 0.5, "lr")
    assert renamed == before and len(before) == 5
    weight = project(tmp_path / "3", {"head.weight": WEIGHT + 1e-6, "head.bias": BIAS}, 0.5, "rate")
    value = project(tmp_path / "4", {"head.weight": WEIGHT, "head.bias": BIAS}, 0.25, "rate")
    assert {key for key in before if weight[key] != before[key]} == {"runs/a/weights.safetensors"}
    assert {key for key in before if value[key] != before[key]} == {
        "runs/a/oof.arrow:head.label",
        "submissions/a.csv",
    }

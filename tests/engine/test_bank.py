"""Prediction files: their format, reading without a copy, and an error for each kind of mismatch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from banked import CLASSES, HEADS, TRAIN, Project, lay_out, member

from comp.engine.bank import bank, predictions
from comp.engine.bank.predictions import PredictionSet
from comp.engine.data import folds, samples
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths
from comp.engine.tasks import kinds


@pytest.fixture
def project(empty: Path) -> Project:
    return lay_out(empty)


def read_error(file: Path, project: Project, expect: dict[str, object] | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        bank.read(file, project.samples, project.folds, expect)
    assert len(caught.value.lines) == 1
    assert paths.relative(file) in caught.value.lines[0]
    return caught.value


def rewritten(file: Path, project: Project, **facts: object) -> Path:
    """The same predictions with other metadata, and a valid manifest entry."""
    stored = bank.read(file, project.samples, project.folds)
    stored.meta.update(facts)
    other = PredictionSet(
        stored.row.copy(),
        stored.fold.copy() if stored.fold is not None else None,
        {k: v.copy() for k, v in stored.heads.items()},
        stored.meta,
    )
    return bank.write(file, other)


# --- files --------------------------------------------------------------------------------------------------


def test_reading_copies_nothing(project: Project) -> None:
    file = member(project, "exp001") / "oof.arrow"
    stored = bank.read(file, project.samples, project.folds)
    assert stored.row.dtype == np.int32 and stored.fold is not None and stored.fold.dtype == np.int16
    assert stored.row.tolist() == list(range(TRAIN)) and stored.fold.tolist() == [i % 5 for i in range(TRAIN)]
    values = stored.heads["label"]
    assert values.dtype == np.float32 and values.shape == (TRAIN, len(CLASSES))
    assert not values.flags.owndata and not values.flags.writeable
    assert np.allclose(stored.probability(project.head).sum(axis=1), 1)


def test_file_format(project: Project) -> None:
    """Read with pyarrow alone: an uncompressed Arrow IPC file."""
    file = member(project, "exp001", weights={"exp001/seed0/fold0": "ab"}) / "oof.arrow"
    with pa.memory_map(str(file)) as source:
        reader = pa.ipc.open_file(source)
        schema = reader.schema
        assert reader.num_record_batches == 1
        before = pa.total_allocated_bytes()
        batch = reader.get_batch(0)
        assert pa.total_allocated_bytes() == before, "it is compressed, or copied"
        assert schema.names == ["row", "fold", "head.label"]
        assert schema.types == [pa.int32(), pa.int16(), pa.list_(pa.float32(), 3)]
        assert batch.num_rows == TRAIN
    text = schema.metadata[b"comp"].decode()
    assert str(project.root) not in text
    meta = json.loads(text)
    assert meta["samples"] == project.samples.hash and meta["folds"] == project.folds.hash
    assert meta["heads"] == [
        {
            "name": "label",
            "task": "multiclass",
            "outputs": list(CLASSES),
            "classes": list(CLASSES),
            "space": "logit",
        }
    ]
    assert {"kind", "run", "member", "config", "versions", "weights", "marks"} <= meta.keys()


def test_same_set_same_bytes(project: Project) -> None:
    first = artifacts.sha256(member(project, "exp001") / "oof.arrow")
    assert artifacts.sha256(member(project, "exp001") / "oof.arrow") == first
    assert artifacts.sha256(member(project, "exp001", seed=2) / "oof.arrow") != first


def test_many_outputs_may_be_half_floats(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(f"c{i}" for i in range(300))
    monkeypatch.setitem(
        HEADS, "multiclass", kinds.Head("label", "multiclass", names, ("target.label",), names)
    )
    project = lay_out(empty)
    rows = project.samples.positions("test")
    meta = predictions.build_meta("test", project.samples, project.folds, {"run": "e"})
    for kind in (np.float16, np.float32):
        stored = {"label": np.zeros((len(rows), 300), kind)}
        bank.write(empty / "runs/e/test.arrow", PredictionSet(rows.astype(np.int32), None, stored, meta))
        assert bank.load("e", "test", project.samples, project.folds).heads["label"].dtype == kind


def test_rows_never_predicted_are_nan(project: Project) -> None:
    rows = np.arange(10, dtype=np.int32)
    meta = predictions.build_meta("oof", project.samples, project.folds, {"run": "e"})
    part = PredictionSet(rows, np.zeros(10, np.int16), {"label": np.zeros((10, 3), np.float32)}, meta)
    whole = predictions.merge([part], project.samples, project.folds, "probability")
    stored = bank.read(bank.write(project.root / "runs/e/oof.arrow", whole), project.samples, project.folds)
    assert (
        stored.predicted.sum() == 10
        and np.isnan(stored.heads["label"][10:]).all()
        and len(stored.row) == TRAIN
    )


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_infinite_or_partly_nan_rows_are_not_written(project: Project, bad: float) -> None:
    stored = bank.load("exp001", "oof", project.samples, project.folds) if member(project, "exp001") else None
    assert stored is not None
    values = stored.heads["label"].copy()
    values[3, 1] = bad
    file = project.root / "runs" / "e" / "oof.arrow"
    with pytest.raises(UserError, match="label"):
        bank.write(file, PredictionSet(stored.row, stored.fold, {"label": values}, stored.meta))
    assert not file.exists() and not artifacts.manifest_entry(file)


# --- mismatches ---------------------------------------------------------------------------------------------


def test_other_folds(empty: Path) -> None:
    before = lay_out(empty)
    file = member(before, "exp001") / "oof.arrow"
    error = read_error(file, lay_out(empty, shift=1))
    assert (error.code, error.key) == ("predictions-differ", "data/folds.parquet")


def test_other_samples(empty: Path) -> None:
    file = member(lay_out(empty), "exp001") / "oof.arrow"
    error = read_error(file, lay_out(empty, seed=1))
    assert (error.code, error.key) == ("predictions-differ", "data/samples.parquet")


def test_other_class_order(project: Project) -> None:
    file = member(project, "exp001") / "oof.arrow"
    turned = kinds.Head("label", "multiclass", CLASSES[::-1], ("target.label",), CLASSES[::-1])
    samples.save(project.samples.frame, (turned,))
    table = samples.load()
    now = Project(
        project.root, project.cfg, table, folds.Folds(project.folds.frame, project.folds.meta, table)
    )
    error = read_error(file, now)
    line = error.what
    assert (error.code, error.key) == ("predictions-differ", "label")
    assert "ant, bee, cat" in line and "cat, bee, ant" in line and "another order" in line


def test_other_space(project: Project) -> None:
    file = member(project, "exp001") / "oof.arrow"
    heads = bank.read_meta(file)["heads"]
    heads[0]["space"] = "probability"
    error = read_error(rewritten(file, project, heads=heads), project)
    assert (error.code, error.key) == ("predictions-differ", "label")
    assert "space probability" in error.what and "logit" in error.what


def test_other_kind_than_expected(project: Project) -> None:
    folder = member(project, "exp001")
    (folder / "oof.arrow").write_bytes((folder / "test.arrow").read_bytes())
    artifacts.add_to_manifest(folder / "oof.arrow")
    with pytest.raises(UserError, match="is test, expected oof") as caught:
        bank.load("exp001", "oof", project.samples, project.folds)
    assert (caught.value.code, caught.value.key) == ("predictions-differ", "kind")


def test_unfinished(project: Project) -> None:
    file = member(project, "exp001") / "oof.arrow"
    artifacts.remove_from_manifest(file)
    assert "unfinished" in str(read_error(file, project))


def test_any_flipped_byte(project: Project) -> None:
    file = member(project, "exp001") / "oof.arrow"
    whole = file.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 40):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert "damaged" in str(read_error(file, project))
    file.write_bytes(whole[:-1])
    assert "damaged" in str(read_error(file, project))
    file.write_bytes(whole)
    bank.read(file, project.samples, project.folds)


@pytest.mark.parametrize("text", [b"", b"id,label\n", b"x" * 500])
def test_another_format_with_a_manifest_entry(project: Project, text: bytes) -> None:
    file = member(project, "exp001") / "oof.arrow"
    file.write_bytes(text)
    artifacts.add_to_manifest(file)
    assert read_error(file, project).code == "predictions-unreadable"


def test_weights_that_changed_since(project: Project) -> None:
    fold = paths.fold_folder("exp001", 0, 0)
    weights = fold / bank.WEIGHTS
    fold.mkdir(parents=True)
    weights.write_bytes(b"trained")
    artifacts.add_to_manifest(weights)
    file = member(project, "exp001", weights=bank.weights_of(fold)) / "oof.arrow"
    bank.read(file, project.samples, project.folds)

    weights.write_bytes(b"other!!")  # same size, without a new manifest entry
    error = read_error(file, project)
    assert error.code == "predictions-stale" and "exp001/seed0/fold0/weights.safetensors" in error.what
    artifacts.add_to_manifest(weights)  # trained anew
    assert read_error(file, project).code == "predictions-stale"
    weights.unlink()  # deleted by comp clean: predictions outlive weights
    bank.read(file, project.samples, project.folds)


# --- averages -----------------------------------------------------------------------------------------------

RANDOM = np.random.default_rng(0)


def probabilities(rows: int, outputs: int) -> np.ndarray:
    p = RANDOM.random((rows, outputs))
    return p / p.sum(axis=1, keepdims=True) if outputs > 1 else p


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_means_by_space(task: str) -> None:
    head = HEADS[task]
    parts = [probabilities(50, len(head.outputs)) for _ in range(3)]
    weights = [3.0, 1.0, 2.0]
    stored = [head.spec.from_probability(p) for p in parts]

    def mean(space: str) -> np.ndarray:
        return head.spec.to_probability(predictions.average(stored, head, space, weights))

    assert np.allclose(mean("probability"), np.average(parts, axis=0, weights=weights), atol=1e-12)
    product = np.exp(np.average(np.log(parts), axis=0, weights=weights))
    wanted = product / product.sum(axis=1, keepdims=True) if task == "multiclass" else product
    assert np.allclose(mean("geometric"), wanted, atol=1e-12)
    if task == "binary":
        odds = np.exp(np.average([kinds.logit(p) for p in parts], axis=0, weights=weights))
        assert np.allclose(mean("logit"), odds / (1 + odds), atol=1e-12)
    else:
        assert np.allclose(mean("logit"), wanted, atol=1e-12)


@pytest.mark.parametrize("space", ["probability", "logit", "geometric"])
def test_values_have_one_mean(space: str) -> None:
    parts = [RANDOM.normal(size=(20, 1)) for _ in range(3)]
    assert np.allclose(
        predictions.average(parts, HEADS["regression"], space), np.mean(parts, axis=0), atol=1e-15
    )


def test_nothing_saturates() -> None:
    """Extreme logits keep their order on both sides, even where 1 - p rounds to 1."""
    sure = np.array([[-80.0], [-60.0], [-40.0], [40.0], [60.0], [80.0]])
    for space in ("probability", "logit", "geometric"):
        mean = predictions.average([sure, sure + 1], HEADS["binary"], space)
        assert np.isfinite(mean).all() and (np.diff(mean[:, 0]) > 1).all(), space


def test_weights_below_zero_still_leave_probabilities() -> None:
    for task in ("binary", "multiclass"):
        head = HEADS[task]
        parts = [head.spec.from_probability(probabilities(200, len(head.outputs))) for _ in range(2)]
        for space in ("probability", "logit", "geometric"):
            p = head.spec.to_probability(predictions.average(parts, head, space, [3.0, -2.0]))
            assert np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1
            if task == "multiclass":
                assert np.allclose(p.sum(axis=1), 1, atol=1e-12)


def test_a_row_of_one_set_keeps_its_exact_bits() -> None:
    value = RANDOM.normal(size=(100, 1)) * 30
    assert (predictions.average([value], HEADS["binary"], "probability") == value).all()


def test_an_unknown_space_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="probability, logit, geometric"):
        predictions.average([np.zeros((1, 1))], HEADS["binary"], "ranks")


def test_merging_folds_and_seeds(project: Project) -> None:
    """Folds share no OOF row and all test rows; a row is the mean of those that predicted it."""
    rng = np.random.default_rng(3)
    parts, sides = [], []
    for seed in range(2):
        for fold in range(5):
            rows = project.folds.split(fold)[1]
            p = rng.random((len(rows), 3))
            meta = predictions.build_meta(
                "oof",
                project.samples,
                project.folds,
                {"run": "e", "seed": seed, "weights": {f"e/seed{seed}/fold{fold}": "x"}, "tta": ["identity"]},
            )
            parts.append(
                PredictionSet(
                    rows.astype(np.int32),
                    np.full(len(rows), fold, np.int16),
                    {"label": np.log(p / p.sum(axis=1, keepdims=True))},
                    meta,
                )
            )
            sides.append((rows, p / p.sum(axis=1, keepdims=True)))
    whole = predictions.merge(parts, project.samples, project.folds, "probability", facts={"member": ""})
    wanted = np.zeros((TRAIN, 3))
    for rows, p in sides:
        wanted[rows] += p / 2
    assert np.allclose(whole.probability(project.head), wanted, atol=1e-6)
    assert whole.fold is not None and (whole.fold == project.folds.assignment[0][:TRAIN]).all()
    assert len(whole.meta["weights"]) == 10 and whole.meta["tta"] == ["identity"] and "seed" not in whole.meta
    shuffled = predictions.merge(parts[::-1], project.samples, project.folds, "probability")
    assert np.allclose(shuffled.heads["label"], whole.heads["label"], atol=1e-6)


def test_merging_keeps_marks(project: Project) -> None:
    member(project, "exp001", marks=["selected_on_fold"])
    member(project, "exp002")
    both = [bank.load(name, "oof", project.samples, project.folds) for name in ("exp001", "exp002")]
    assert predictions.merge(both, project.samples, project.folds, "logit").meta["marks"] == [
        "selected_on_fold"
    ]


# --- members ------------------------------------------------------------------------------------------------


def test_members_by_address(project: Project) -> None:
    for address in ("exp001", "exp001:seed1", "exp003:snap3"):
        member(project, address)
    member(project, "exp001:full", kinds=("test",))
    (project.root / "ensembles" / "blend001").mkdir(parents=True)
    member(project, "blend001")
    (project.root / "runs" / ".trash" / "exp009").mkdir(parents=True)
    (project.root / "runs" / "exp004" / "seed0").mkdir(parents=True)  # begun, nothing finished
    assert bank.members() == ["exp001", "exp001:full", "exp001:seed1", "exp003:snap3", "blend001"]
    assert paths.relative(bank.find("exp003:snap3", "oof")) == "runs/exp003/members/snap3/oof.arrow"
    assert paths.relative(bank.find("blend001", "test")) == "ensembles/blend001/test.arrow"


def test_an_unknown_address_lists_the_nearest(project: Project) -> None:
    for address in ("exp001", "exp001:seed1", "exp002", "zebra"):
        member(project, address)
    with pytest.raises(UserError) as caught:
        bank.find("exp01", "oof")
    assert caught.value.code == "member-unknown" and caught.value.where == "exp01"
    assert (
        "exp001" in str(caught.value) and "exp002" in str(caught.value) and "zebra" not in str(caught.value)
    )


def test_the_refit_has_no_oof(project: Project) -> None:
    member(project, "exp001:full", kinds=("test",))
    with pytest.raises(UserError, match="trained on all rows"):
        bank.load("exp001:full", "oof", project.samples, project.folds)

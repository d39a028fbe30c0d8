"""Arrays with any header, and links in a loop: one line with the file, exit code 2."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from comp.engine import cli

DECLARED = """
slug: files
title: Files
raw: data/raw
train: {table: train.csv, image: "{file}"}
test: {table: test.csv, image: "{file}"}
id: id
target: label
task: binary
metric: roc_auc
folds: {scheme: stratified, k: 2, seed: 0}
submission: {sample: sample_submission.csv, form: label}
"""


def npy(header: str, body: bytes = bytes(100)) -> bytes:
    text = header.encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def described(descr: str, shape: str) -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}")


ARRAYS = {
    "8 TB": described("'|u1'", "(2000000, 2000000, 2)"),
    "more than an address": described("'<f8'", "(9999999999999, 9999999999999)"),
    "less than nothing": described("'|u1'", "(-3, -5)"),
    "objects": described("'|O'", "(3,)"),
    "objects in a record": described("[('a', '<f8'), ('b', '|O')]", "(3,)"),
    "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100),
    "a header of 64 KB": b"\x93NUMPY\x01\x00\xff\xff" + b" " * 70_000,
    "3,000 parentheses": npy("(" * 3000),
    "5,000 digits": described("'|u1'", f"({'9' * 5000},)"),
    "code": npy("{'descr': __import__('os').getcwd(), }"),
    "no such type": described("'zz'", "(3,)"),
    "only a name": b"\x93NUMPY",
}


@pytest.fixture
def raw(empty: Path) -> Path:
    """Four good arrays, train and test."""
    raw = empty / "data" / "raw"
    raw.mkdir(parents=True)
    for name in ("a", "b", "c", "d"):
        np.save(raw / f"{name}.npy", np.arange(64, dtype=np.uint8).reshape(8, 8))
    (raw / "train.csv").write_text("id,file,label\n1,a.npy,x\n2,b.npy,y\n3,c.npy,x\n")
    (raw / "test.csv").write_text("id,file\n4,d.npy\n")
    (raw / "sample_submission.csv").write_text("id,label\n4,x\n")
    (empty / "configs" / "competition.yaml").write_text(DECLARED)
    return raw


def error_lines(capsys: pytest.CaptureFixture[str], verb: str = "check") -> list[str]:
    """The lines of `comp check` that name a file; it exits with 2."""
    capsys.readouterr()
    assert cli.main([verb]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return [line for line in (out + err).splitlines() if "data/raw" in line or "competition.yaml" in line]


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_with_any_header(raw: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """As an image, as a member of an .npz, as a stack of images and as a table."""
    whole, broken = (raw / "b.npy").read_bytes(), ARRAYS[kind]
    (raw / "b.npy").write_bytes(broken)
    (line,) = error_lines(capsys)
    assert line.startswith("data/raw/train.csv:3: image b.npy: no complete array") and "0x" not in line
    (raw / "b.npy").write_bytes(whole)

    table = (raw / "train.csv").read_text()
    with zipfile.ZipFile(raw / "x.npz", "w") as packed:
        packed.writestr("b.npy", broken)
    for named in ("x.npz/b", "x.npy/0"):
        (raw / "x.npy").write_bytes(broken)
        (raw / "train.csv").write_text(table.replace("b.npy", named))
        (line,) = error_lines(capsys)
        assert line.startswith(f"data/raw/{named.split('/')[0]}: is damaged")
    (raw / "train.csv").write_text(table)

    declared = raw.parents[1] / "configs" / "competition.yaml"
    for name in ("x.npy", "x.npz"):
        declared.write_text(DECLARED.replace("table: train.csv", f"table: {name}"))
        (line,) = error_lines(capsys)
        assert line.startswith(f"data/raw/{name}: is no complete array")


def test_a_zip_with_a_member_that_is_too_short(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The header of the member agrees with the archive's directory, but not with its content."""
    out = io.BytesIO()
    np.save(out, np.zeros((4, 8, 8), np.uint8))
    with zipfile.ZipFile(raw / "x.npz", "w") as packed:
        packed.writestr("b.npy", out.getvalue()[:-9])
    (raw / "train.csv").write_text((raw / "train.csv").read_text().replace("b.npy", "x.npz/b"))
    (line,) = error_lines(capsys)
    assert line.startswith("data/raw/x.npz: is damaged") and "256 bytes, and 247 follow" in line


def test_links_in_a_loop(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "b.npy").unlink()
    (raw / "b.npy").symlink_to("e.npy")
    (raw / "e.npy").symlink_to("b.npy")
    (line,) = [line for line in error_lines(capsys) if not line.startswith("note: ")]
    assert line.startswith("data/raw/train.csv:3: image b.npy: too many levels of symbolic links")
    (raw / "train.csv").rename(raw / "other.csv")
    (raw / "train.csv").symlink_to("train.csv")
    (line,) = error_lines(capsys, "prepare")
    assert line.startswith("data/raw/train.csv: no such table")


@pytest.mark.parametrize("leads", ["..", "."])
def test_a_folder_with_a_link_to_itself(raw: Path, capsys: pytest.CaptureFixture[str], leads: str) -> None:
    """If followed, comp inspect, `files:` and `*` would list the same files 40 or even 2**40 times."""
    (raw / "train").mkdir()
    for name in ("a", "b", "c"):
        (raw / f"{name}.npy").rename(raw / "train" / f"{name}.npy")
    (raw / "train" / "again").symlink_to(leads)
    (raw / "train" / "more").symlink_to(leads)
    declared = raw.parents[1] / "configs" / "competition.yaml"
    for train in ('{files: "train/{id}.npy"}', '{table: train.csv, image: "train/*/{file}"}'):
        declared.write_text(
            DECLARED.replace('{table: train.csv, image: "{file}"}', train).replace(
                "target: label", "target: id"
            )
        )
        (line,) = error_lines(capsys, "prepare")
        assert line.startswith("data/raw/train/again: is a link") and "rm data/raw/train/again" in line
    declared.unlink()
    (line,) = error_lines(capsys, "inspect")
    assert line.startswith("data/raw/train/again: is a link") and "rm data/raw/train/again" in line

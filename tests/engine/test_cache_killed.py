"""The image cache after kills, with incomplete lines, several builders, flipped bytes and full disks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_cache import COPY, COUNT, GONE, bytes_of, cached, child, counted, folder, forty, opened, raw, seen

from comp.engine.data import cache
from comp.engine.errors import UserError
from comp.engine.store import paths


@pytest.fixture
def names(empty: Path) -> list[str]:
    return forty(empty)


# Where a building process is killed: `code` runs in it, kill() is the end.
KILL = """
def kill(): os.kill(os.getpid(), signal.SIGKILL)
def after(module, name, number, half=False):
    real, calls = getattr(module, name), []
    def counting(*a, **k):
        calls.append(1)
        if half and len(calls) == number: kill()
        out = real(*a, **k)
        if len(calls) == number: kill()
        return out
    setattr(module, name, counting)
"""
EVENTS = {
    "pixels written, their line not yet": "after(os, 'fsync', 5)",
    "before the index": "after(cache, '_publish', 1, half=True)",
    "after the index, before the manifest": "after(artifacts, 'write_json', 1, half=True)",
}
MORE_EVENTS = {
    "after the first line of the journal": "after(cache, '_commit', 1)",
    "before the first line of the journal": "after(cache, '_commit', 1, half=True)",
    "after the fifth line of the journal": "after(cache, '_commit', 5)",
    "before the last line of the journal": "after(cache, '_commit', 10, half=True)",
    "after the manifest": "after(artifacts, 'write_json', 1)",
}


@pytest.mark.parametrize(
    "event", [*EVENTS, *(pytest.param(event, marks=pytest.mark.slow) for event in MORE_EVENTS)]
)
def test_a_build_killed_and_started_again_ends_with_the_same_bytes(
    names: list[str], event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = seen(cached(names))
    never_killed = bytes_of(folder())
    shutil.rmtree(paths.path("data", "cache"))
    victim = child(KILL + (EVENTS | MORE_EVENTS)[event], names)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    done = sum(len(json.loads(line)) for line in journal_lines()) if "manifest" not in event else COUNT
    decoded = counted(monkeypatch)
    images = cached(names)
    assert bytes_of(folder()) == never_killed
    assert len(set(decoded)) <= COUNT - done
    assert seen(images) == expected


def journal_lines() -> list[str]:
    file = folder() / "journal.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def test_a_build_killed_while_adding_ends_with_the_same_bytes(names: list[str]) -> None:
    """Adding to a cache, with one file changed since: the resume must not change what was there before."""

    def change() -> None:
        raw(names[0]).write_bytes(raw(names[2]).read_bytes())
        os.utime(raw(names[0]), ns=(5, 5))

    old = seen(cached(names[:20]))
    shutil.copytree(paths.path("data"), paths.path("untouched"), copy_function=shutil.copy2)
    change()
    expected = seen(cached(names))
    never_killed = bytes_of(folder())
    shutil.rmtree(paths.path("data"))
    shutil.move(paths.path("untouched"), paths.path("data"))
    reader = cached(names[:20])
    change()
    victim = child(KILL + EVENTS["pixels written, their line not yet"], names)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL and seen(reader) == old
    assert seen(cached(names)) == expected and expected[0] == old[2]
    assert bytes_of(folder()) == never_killed
    assert seen(reader) == old


def stopped_after(lines: int, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that ends when so many lines of its journal are written."""
    commit = cache._commit

    def stopping(*arguments: Any) -> Any:
        if len(journal_lines()) == lines:
            raise KeyboardInterrupt
        return commit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "COMMIT", 4)
        patch.setattr(cache, "_commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            cached(names)


def test_a_file_that_changes_between_kill_and_resume_is_decoded_as_it_is_now(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(5, names, monkeypatch)
    raw(names[2]).write_bytes(raw(names[30]).read_bytes())
    raw(names[3]).unlink()
    images = cached(names)
    assert seen(images) == seen(opened(names, "data.cache=false"))
    listed = images.pages.table["name"].to_pylist()
    assert len(listed) == len(set(listed))


def test_a_torn_line_of_the_journal_is_ignored(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cached(names)
    never_stopped = bytes_of(folder())
    shutil.rmtree(paths.path("data", "cache"))
    stopped_after(5, names, monkeypatch)
    journal = folder() / "journal.jsonl"
    os.truncate(journal, journal.stat().st_size - 40)
    cached(names)
    assert bytes_of(folder()) == never_stopped


def test_a_second_process_waits_for_the_first_and_decodes_nothing(names: list[str]) -> None:
    pause = """
real = cache._commit
def commit(*a):
    print("building", flush=True)
    sys.stdin.readline()
    cache._commit = real
    return real(*a)
cache._commit = commit
"""
    no_decoding = "cache._decode_chunk = None  # decoding fails\n"
    first = child(pause, names)
    assert first.stdin and first.stdout
    assert "39 images" in first.stdout.readline() and first.stdout.readline() == "building\n"
    second = child(no_decoding, names)
    assert second.stdin and second.stdout
    waiting = second.stdout.readline()
    assert f"process {first.pid} is already filling the image cache" in waiting and "waiting" in waiting
    first.stdin.write("\n")
    first.stdin.flush()
    assert first.wait() == 0 and second.wait() == 0, second.communicate()[1]
    for process in (first, second):
        process.communicate()


def test_a_flipped_byte_of_the_pixels_is_named(names: list[str]) -> None:
    images = cached(names)
    row = images.rows[5]
    position = int(images.pages.offset[row]) + 100
    with (folder() / "pixels.bin").open("r+b") as file:
        file.seek(position)
        flipped = bytes([file.read(1)[0] ^ 4])
        file.seek(position)
        file.write(flipped)
    again = cached(names)
    with pytest.raises(UserError) as caught:
        again[5]
    error = caught.value
    assert error.code == "cache-damaged" and error.where.endswith("pixels.bin") and names[5] in error.what
    assert "delete data/cache/" in error.remedy
    assert again[6].shape == (32, 32, 1), "the others are still good"
    shutil.rmtree(folder())
    assert cached(names)[5].shape == (32, 32, 1)


@pytest.mark.parametrize("file", ["index", "manifest.json", "pixels.bin"])
def test_a_damaged_file_of_the_cache_is_refused_by_name(names: list[str], file: str) -> None:
    cached(names)
    (path,) = folder().glob(f"{file}*")
    data = bytearray(path.read_bytes())
    if file == "pixels.bin":
        path.write_bytes(data[:-1])
        for more in (names, [*names, "train/new.png"]):
            with pytest.raises(UserError, match=r"pixels.bin: 1 bytes are missing"):
                cached(more)
            shutil.copy(raw(names[0]), raw("train/new.png"))
        return
    for position in np.random.default_rng(0).integers(0, len(data), 12).tolist():
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        try:
            expected = seen(cached(names))
        except UserError as error:
            assert path.name in str(error) and len(error.lines) == 1
        else:
            assert file == "manifest.json" and json.loads(path.read_text()), (
                position
            )  # a fact that nothing reads
            assert expected == seen(opened(names, "data.cache=false"))
    path.write_bytes(data)
    cached(names)


Usage = namedtuple("Usage", "total used free")


def test_on_a_small_disk_decoding_goes_on_without_a_cache_or_is_refused(
    names: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40, 2**28))
    with pytest.raises(UserError, match=r"39 images of 32 px will write 40 KB, and only"):
        opened(names, must_fit=True)
    images = opened(names)
    assert isinstance(images, cache.UncachedImages) and "decoded on the fly" in capsys.readouterr().out
    without = seen(images)
    monkeypatch.undo()
    os.environ["COMP_ROOT"] = str(raw("").parents[1])
    assert without == seen(cached(names))


def test_decoding_goes_on_where_no_cache_can_be_written(
    names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    paths.path("data", "cache").write_text(
        "a file, where the folder should be: root may write into any folder"
    )
    images = opened(names)
    assert isinstance(images, cache.UncachedImages) and images[0].shape == (32, 32, 1)
    assert "cannot be made" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be made"):
        opened(names, must_fit=True)


def test_a_full_disk_is_one_line_and_loses_nothing(names: list[str]) -> None:
    expected = seen(cached(names))
    never_full = bytes_of(folder())
    shutil.rmtree(paths.path("data", "cache"))
    full = child("import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))", names)
    _, error = full.communicate()
    assert (
        full.returncode == 1
        and "UserError: data/cache/" in error
        and "could not be written (File too large)" in error
    )
    assert len(journal_lines()) > 1
    assert seen(cached(names)) == expected and bytes_of(folder()) == never_full


def test_a_build_prints_what_it_writes_and_where(
    names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cached(names)
    first, last = capsys.readouterr().out.splitlines()
    place = paths.relative(folder())
    assert first == f"{place}: 39 images of 32 px, about 40 KB"
    assert last == f"{place}: 39 images, 1 of them damaged, 38 KB"
    cached(names)
    assert capsys.readouterr().out == ""


def test_the_index_describes_files_and_pixels(names: list[str]) -> None:
    images = cached(names)
    table = images.pages.table
    rows: list[dict[str, Any]] = table.to_pylist()
    assert [row["name"] for row in rows] == [name for name in names if name != names[GONE]]
    for row in rows:
        data = raw(row["name"]).read_bytes()
        assert row["bytes"] == len(data) and row["hash"] == hashlib.sha256(data).hexdigest()[:32]
    offsets: NDArray[np.int64] = table["offset"].to_numpy()
    assert rows[COPY]["offset"] == rows[COPY - 1]["offset"], "a copy is stored once"
    assert offsets.max() + 32 * 32 == (folder() / "pixels.bin").stat().st_size == 37 * 32 * 32

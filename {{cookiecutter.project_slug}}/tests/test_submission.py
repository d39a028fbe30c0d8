"""Whatever leaves submissions/ is what the host takes: 50 files of every form pass, every kind of damage on each is refused."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
from conftest import config

from comp import bank, competition, folds, samples, store
from comp import predictions as predictions_of
from comp.bank import PredictionSet
from comp.config import Config, Refused
from comp.deliver import submission
from comp.deliver.recheck import Checkpoint, recheck
from comp.deliver.sample import read_sample, refuse_stale
from comp.deliver.validate import validate
from comp.prepare import tables
from comp.samples import Samples
from comp.tasks import Head

IDS = ["0012", "0007", "a_3", "0100", "b-5.x", "1.2.840", "00a", "9"]
DOGS = ("0012", "borzoi", "Saint, Bernard")
HEADS = {
    "probability": Head("target", "binary", ("target",), ("target.target",), ("benign", "malignant")),
    "probabilities": Head("breed", "multiclass", DOGS, ("target.breed",), DOGS),
    "label": Head("breed", "multiclass", DOGS, ("target.breed",), DOGS),
    "value": Head("score", "regression", ("score",), ("target.score",)),
}
COLUMNS = {"probability": ["target"], "probabilities": list(DOGS), "label": ["breed"], "value": ["score"]}
RANGES = {"probability": [0.0, 1.0], "probabilities": [0.0, 1.0], "label": None, "value": [1.0, 100.0]}


@dataclass
class Case:
    form: str
    cfg: Config
    table: Samples
    sample: Path

    def write(self, prediction: PredictionSet, name: str = "exp001") -> Path:
        if ":" not in name and not bank.folder(name).exists():
            scored(name, {})
        return submission.write(self.cfg, self.table, name, prediction)

    def validate(self, file: Path) -> None:
        rules = self.cfg.competition.submission
        classes = [each for head in self.table.heads for each in head.classes]
        assert isinstance(rules.form, str)
        validate(file, self.sample, rules.form, rules.range, rules.form == "probabilities", classes)


def lay_out(
    form: str,
    ids: list[str] = IDS,
    heads: tuple[Head, ...] = (),
    columns: list[str] | None = None,
    unlimited: bool = False,
    quoting: Literal[0, 1] = csv.QUOTE_MINIMAL,
    end: str = "\n",
    encoding: str = "utf-8",
    rows: list[str] | None = None,
    shuffle: bool = True,
) -> Case:
    """Samples on disk, in another order than the sample file. `rows` are the keys of the test samples, where several share one."""
    heads = heads or (HEADS[form],)
    keys = rows or (sorted(ids, reverse=True) if shuffle else ids)
    train = [f"train{i}" for i in range(3)]
    frame = pd.DataFrame({
        "id": train + [f"{key}#{i}" for i, key in enumerate(keys)], "row": train + keys, "weight": 1.0,
        "source": ["train"] * 3 + ["test"] * len(keys), "images": [["x.png"]] * (3 + len(keys)),
    })  # fmt: skip
    file = store.path("data", "raw", "sample_submission.csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = ["image_id", *(columns or COLUMNS[form])]
    with file.open("w", newline="", encoding=encoding) as opened:
        writer = csv.writer(opened, quoting=quoting, lineterminator=end)
        writer.writerows([columns, *([each] + [""] * (len(columns) - 1) for each in ids)])
    samples.save(frame, heads, sample=store.sha256(file))
    overrides = [
        f"competition.task={heads[0].task}", f"competition.submission.form={form}", "competition.id=image_id",
        f"competition.submission.range={'null' if unlimited else RANGES[form] or 'null'}",
    ]  # fmt: skip
    return Case(form, config(*overrides, experiment="base"), samples.load(), file)


def scored(name: str, cuts: dict[str, list[float]]) -> None:
    """As much of a run as a submission asks for."""
    file = bank.folder(name) / "score.json"
    store.write_json(file, {"cuts": cuts})
    store.seal(file)


def predictions(case: Case, seed: int = 0, spread: float = 3.0) -> PredictionSet:
    draw = np.random.default_rng(seed)
    rows = case.table.positions("test").astype(np.int32)
    draw.shuffle(rows)
    heads = {}
    for head in case.table.heads:
        values = draw.normal(scale=spread, size=(len(rows), len(head.outputs)))
        if head.row.space == "value":
            values = np.clip(50 + 12 * values, 1, 100)
        heads[head.name] = values.astype(np.float32)
    return PredictionSet(rows, None, heads, {})


def refusal(run: Callable[[], object]) -> str:
    with pytest.raises(Refused) as caught:
        run()
    assert len(caught.value.lines) == 1 and "\n" not in caught.value.lines[0], caught.value.lines
    return caught.value.lines[0]


@pytest.fixture(params=list(HEADS))
def case(request: pytest.FixtureRequest, empty: Path) -> Case:
    return lay_out(request.param)


# --- what is written -----------------------------------------------------------------------------------------------------


def test_columns_order_ids_and_bytes_are_the_samples(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    file = case.write(predictions(case))
    assert file == store.path("submissions", "exp001.csv")
    data = file.read_bytes()
    assert data.endswith(b"\n") and b"\r" not in data and not data.startswith(b"\xef\xbb\xbf")
    header, *rows = list(csv.reader(io.StringIO(data.decode())))
    assert header == ["image_id", *COLUMNS[case.form]]
    assert [row[0] for row in rows] == IDS
    entry = store.sealed(file)
    assert entry is not None and entry["sample"] == store.sha256(case.sample) and entry["form"] == case.form
    last = capsys.readouterr().out.splitlines()
    assert (
        "submissions/exp001.csv" in last[-2] and "8 rows" in last[-2] and store.sha256(file)[:12] in last[-2]
    )
    assert last[-1] == 'next: comp submit exp001 -m "…"'


def test_every_row_gets_its_own_prediction_in_full_precision(case: Case) -> None:
    prediction = predictions(case)
    head = case.table.heads[0]
    expected = head.row.probability(prediction.heads[head.name].astype(np.float64))
    keys = case.table.frame["row"].to_numpy()[prediction.row]
    written = list(csv.reader(case.write(prediction).open()))[1:]
    for cells in written:
        mine = expected[list(keys).index(cells[0])]
        if case.form == "label":
            assert cells[1:] == [DOGS[mine.argmax()]]
        else:
            assert [float(cell) for cell in cells[1:]] == mine.tolist()  # the same float64, not a rounded one
            assert case.form != "probabilities" or abs(math.fsum(map(float, cells[1:])) - 1) < 1e-15


def test_fifty_valid_files_are_written_and_accepted(empty: Path) -> None:
    draw = np.random.default_rng(7)
    accepted = 0
    names = ["Ä ö", "x,y", 'say "hi"', "0", "007", "1e3", "c lass", "ß", "N-1", "nan", "no", "3.0"]
    for number in range(52):
        form = list(HEADS)[number % 4]
        kind = number // 4 % 3
        count = int(draw.integers(1, 40))
        ids = [[f"{i:05d}", f"{i}.jpg", f"dir/ü {i}, x"][kind] for i in draw.permutation(count)]
        chosen = tuple(draw.permutation(names)[: draw.integers(2, len(names))].tolist())
        head = HEADS[form]
        if head.classes and head.task == "multiclass":
            head = Head("breed", "multiclass", chosen, ("target.breed",), chosen)
        lay = lay_out(
            form, ids, (head,), list(reversed(chosen)) if form == "probabilities" else None,
            quoting=csv.QUOTE_ALL if number % 2 else csv.QUOTE_MINIMAL, end=["\n", "\r\n"][number // 2 % 2],
            encoding=["utf-8", "utf-8-sig"][number // 3 % 2],
        )  # fmt: skip
        file = lay.write(predictions(lay, number, spread=[0.01, 3, 60][number % 3]), f"s{number}")
        lay.validate(file)
        assert [row[0] for row in csv.reader(file.open(encoding="utf-8"))][1:] == ids
        accepted += 1
    assert accepted >= 50


def test_a_column_of_ints_and_one_of_text_keep_their_type(empty: Path) -> None:
    for classes in (("0", "1", "2"), ("0012", "012", "12"), ("True", "False", "1.0")):
        lay = lay_out(
            "label", heads=(Head("y", "multiclass", classes, ("target.y",), classes),), columns=["y"]
        )
        labels = [row[1] for row in csv.reader(lay.write(predictions(lay)).open())][1:]
        assert set(labels) <= set(classes) and len(set(labels)) > 1


def test_extreme_logits_stay_valid(empty: Path) -> None:
    for form in ("probability", "probabilities"):
        lay = lay_out(form)
        prediction = predictions(lay)
        head = lay.table.heads[0].name
        huge = prediction.heads[head]
        huge[:] = np.where(np.arange(huge.size) % 2, 3e4, -3e4).reshape(huge.shape)
        lay.write(prediction)


def test_several_samples_of_one_row_are_their_mean(empty: Path) -> None:
    lay = lay_out("probability", ["A_L", "A_R"], rows=["A_R", "A_L", "A_L", "A_R", "A_L"])
    prediction = predictions(lay)
    keys = lay.table.frame["row"].to_numpy()[prediction.row]
    p = 1 / (1 + np.exp(-prediction.heads["target"][:, 0].astype(np.float64)))
    written = {row[0]: float(row[1]) for row in list(csv.reader(lay.write(prediction).open()))[1:]}
    for key in ("A_L", "A_R"):
        assert written[key] == pytest.approx(p[keys == key].mean(), abs=1e-15)


def test_binary_columns_per_class(empty: Path) -> None:
    lay = lay_out("probabilities", heads=(HEADS["probability"],), columns=["malignant", "benign"])
    prediction = predictions(lay)
    best = lay.table.frame["row"].iloc[prediction.row[prediction.heads["target"][:, 0].argmax()]]
    row = next(row for row in csv.reader(lay.write(prediction).open()) if row[0] == best)
    assert float(row[1]) > 0.5 > float(row[2])


def test_several_binary_targets_and_the_samples_columns_decide(empty: Path) -> None:
    heads = tuple(Head(n, "binary", (n,), (f"target.{n}",), ("0", "1")) for n in ("a", "b", "c"))
    lay = lay_out("probability", heads=heads, columns=["c", "a"])
    header, *rows = list(csv.reader(lay.write(predictions(lay)).open()))
    assert header == ["image_id", "c", "a"] and len(rows) == len(IDS)


def test_a_regression_that_oversteps_a_little_is_moved_to_the_edge_and_says_so(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay = lay_out("value")
    prediction = predictions(lay)
    prediction.heads["score"][:2, 0] = [-3.0, 104.0]
    values = sorted(float(row[1]) for row in list(csv.reader(lay.write(prediction).open()))[1:])
    assert values[0] == 1.0 and values[-1] == 100.0
    assert "2 of 8 values" in capsys.readouterr().out
    prediction.heads["score"][3, 0] = 1000.0
    line = refusal(lambda: lay.write(prediction))
    assert "1000" in line and "'score'" in line


def test_grades_are_cut_where_the_cv_cut_them(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grades = ("none", "mild", "severe")
    lay = lay_out(
        "label", heads=(Head("grade", "ordinal", ("grade",), ("target.grade",), grades),), columns=["y"]
    )
    prediction = predictions(lay)
    prediction.heads["grade"][:, 0] = [-1.0, 0.2, 0.25, 0.4, 0.9, 1.4, 1.75, 5.0]
    place = {key: i for i, key in enumerate(lay.table.frame["row"].iloc[prediction.row])}

    def written(name: str) -> list[str]:
        by_id = {row[0]: row[1] for row in list(csv.reader(lay.write(prediction, name).open()))[1:]}
        return [by_id[key] for key in place]

    scored("cut", {"grade": [0.25, 1.75]})
    assert written("cut") == ["none"] * 2 + ["mild"] * 4 + ["severe"] * 2
    assert "0.25, 1.75" in capsys.readouterr().out
    scored("rounded", {})  # the metric did not ask for grades
    assert written("rounded") == ["none"] * 4 + ["mild"] * 2 + ["severe"] * 2
    assert written("cut:full") == written("cut")  # the refit has no OOF rows of its own
    assert store.submission_file("cut-full").exists()
    (bank.folder("cut") / "score.json").write_text('{"cuts": {"grade": [0.0, 0.1]}}')
    assert "score.json" in refusal(lambda: lay.write(prediction, "cut"))


def test_two_classes_are_split_at_half_or_at_the_fitted_threshold(empty: Path) -> None:
    lay = lay_out("label", heads=(HEADS["probability"],), columns=["y"])
    prediction = predictions(lay)
    prediction.heads["target"][:, 0] = np.linspace(-2, 2, 8)
    for cuts, positive in (({}, 4), ({"target": [0.2]}, 6)):
        scored(f"s{positive}", cuts)
        labels = [row[1] for row in csv.reader(lay.write(prediction, f"s{positive}").open())][1:]
        assert labels.count("malignant") == positive and labels.count("benign") == 8 - positive


def test_from_the_bank_by_name(empty: Path) -> None:
    """The dry run asks for nothing but a name: predictions, samples, folds and competition.yaml are on disk."""
    file = store.path("configs", "competition.yaml")
    lay = lay_out("label")
    file.write_text(file.read_text().replace("id: id", "id: image_id"))
    train = pd.DataFrame({"id": [f"train{i}" for i in range(3)], "repeat": 0, "fold": [0, 1, 0]})
    folds.save(
        train,
        {
            "scheme": "kfold",
            "k": 2,
            "repeats": 1,
            "seed": 0,
            "rule": "others",
            "gap": 0.0,
            "samples": lay.table.hash,
        },
    )
    split = folds.load(lay.table)
    whole = replace(predictions(lay), meta=predictions_of.meta("test", lay.table, split, {"run": "exp001"}))
    scored("exp001", {})
    bank.write(store.run_folder("exp001") / "test.arrow", whole)
    assert submission.dry_run("exp001").read_bytes() == lay.write(whole, "again").read_bytes()
    assert "exp001" in refusal(lambda: submission.dry_run("exp01"))


# --- what is refused while writing -----------------------------------------------------------------------------------------


def test_rows_never_predicted_are_refused_and_the_old_file_stays(case: Case) -> None:
    file = case.write(predictions(case))
    before = file.read_bytes()
    prediction = predictions(case, seed=1)
    prediction.heads[case.table.heads[0].name][3] = np.nan
    key = case.table.frame["row"].iloc[prediction.row[3]]
    assert repr(key) in refusal(lambda: case.write(prediction))
    whole = predictions(case)
    short = replace(whole, row=whole.row[1:], heads={name: v[1:] for name, v in whole.heads.items()})
    assert "never predicted" in refusal(lambda: case.write(short))
    train = replace(whole, row=np.zeros_like(whole.row))
    assert "test rows" in refusal(lambda: case.write(train))
    assert file.read_bytes() == before
    assert not list(file.parent.glob(".*part"))


def test_a_stale_sample_is_refused(case: Case) -> None:
    prediction = predictions(case)
    text = case.sample.read_text()
    for changed, says in (
        (text.replace("a_3", "a_4"), "'a_4'"),
        (text.replace("9,", "new,"), "'new'"),
        (text.rsplit("\n", 2)[0] + "\n", "'9'"),
        (text.replace("\n", "\r\n"), "not the file"),
    ):
        case.sample.write_bytes(changed.encode())
        line = refusal(lambda: case.write(prediction))
        assert says in line and "sample_submission.csv" in line and "comp prepare" in line
    case.sample.write_bytes(text.encode())
    case.write(prediction)


def test_prepare_notes_which_sample_it_saw(project: Path) -> None:
    tables.prepare(config())
    sample = project / "data" / "raw" / "sample_submission.csv"
    refuse_stale(read_sample(sample), samples.load())
    sample.write_text(sample.read_text().replace(",0", ",1"))
    assert "not the file" in refusal(lambda: refuse_stale(read_sample(sample), samples.load()))


def test_a_sample_that_is_none_is_refused(case: Case) -> None:
    good = case.sample.read_bytes()
    for data in (
        b"", b"image_id\n1\n", good.split(b"\n")[0] + b"\n", good + b"0012" + b"," * len(COLUMNS[case.form]) + b"\n",
        good + b"x\n", good.replace(b"a_3", b"a\xff"), good + b'"open', b"a,a\n1,2\n",
    ):  # fmt: skip
        case.sample.write_bytes(data)
        assert "sample_submission.csv" in refusal(lambda: read_sample(case.sample))
    case.sample.unlink()
    assert "no such file" in refusal(lambda: read_sample(case.sample))


def test_columns_that_the_model_does_not_have_are_refused(empty: Path) -> None:
    lay = lay_out("probabilities", columns=["0012", "borzoi", "poodle"])
    assert "'poodle'" in refusal(lambda: lay.write(predictions(lay)))
    lay = lay_out("probabilities", columns=["0012", "borzoi"])
    assert "'Saint, Bernard'" in refusal(lambda: lay.write(predictions(lay)))


@pytest.mark.parametrize(
    ("form", "other"), [("probability", "value"), ("probabilities", "value"), ("value", "label")]
)
def test_a_form_that_does_not_fit_the_task_is_refused(empty: Path, form: str, other: str) -> None:
    lay = lay_out(form, heads=(HEADS[other],))
    line = refusal(lambda: lay.write(predictions(lay)))
    assert "submission.form" in line and form in line and HEADS[other].task in line


# --- damage --------------------------------------------------------------------------------------------------------------

Lines = list[list[str]]
Damage = Callable[[Lines], object]


def text_of(lines: Lines) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def cell(value: str, row: int = 4, column: int = 1) -> Damage:
    return lambda lines: lines[row].__setitem__(column, value)


def every(change: Callable[[int, list[str]], list[str]]) -> Damage:
    return lambda lines: lines.__setitem__(slice(None), [change(i, line) for i, line in enumerate(lines)])


def all_ids(change: Callable[[str], str]) -> Damage:
    return lambda lines: [line.__setitem__(0, change(line[0])) for line in lines[1:]]


TABLE_DAMAGE: dict[str, Damage] = {
    "missing row": lambda lines: lines.pop(3),
    "missing last row": lambda lines: lines.pop(),
    "extra row": lambda lines: lines.append(["unknown", *lines[1][1:]]),
    "duplicate row": lambda lines: lines.append(list(lines[2])),
    "duplicate instead of another": lambda lines: lines.__setitem__(5, list(lines[2])),
    "two rows exchanged": lambda lines: lines.__setitem__(slice(2, 4), lines[3:1:-1]),
    "sorted": lambda lines: lines.__setitem__(slice(1, None), sorted(lines[1:])),
    "ids shifted": lambda lines: [a.__setitem__(0, b) for a, b in zip(lines[1:], [x[0] for x in lines[2:] + lines[1:2]], strict=True)],
    "column missing": lambda lines: [line.pop() for line in lines],
    "column extra": every(lambda i, line: [*line, line[1] if i else "x"]),
    "column renamed": cell("prediction", 0),
    "id column renamed": cell("id", 0, 0),
    "column with a space": lambda lines: cell(f" {lines[0][1]}", 0)(lines),
    "columns exchanged": lambda lines: [line.__setitem__(slice(0, 2), line[1::-1]) for line in lines],
    "column twice": every(lambda i, line: [*line, line[1]]),
    "index column": every(lambda i, line: [str(i - 1) if i else "", *line]),
    "named index column": every(lambda i, line: [str(i - 1) if i else "Unnamed: 0", *line]),
    "index without a header": every(lambda i, line: [str(i - 1), *line] if i else line),
    "no header": lambda lines: lines.pop(0),
    "header twice": lambda lines: lines.insert(1, list(lines[0])),
    "header alone": lambda lines: lines.__delitem__(slice(1, None)),
    ".jpg left on ids": all_ids(lambda each: each + ".jpg"),
    "folder left on ids": all_ids(lambda each: "test/" + each),
    "leading zeros lost": all_ids(lambda each: each.lstrip("0") or each),
    "ids are floats": cell("9.0", 8, 0),
    "id in capitals": cell("A_3", 3, 0),
    "space after an id": cell("a_3 ", 3, 0),
    "id empty": cell("", 3, 0),
    "row too short": lambda lines: lines[4].pop(),
    "row too long": lambda lines: lines[4].append("0.5"),
    "cell empty": cell(""),
    "cell of spaces": cell(" "),
    **{f"cell {word}": cell(word) for word in ("nan", "NaN", "None", "NULL", "NA", "<NA>", "-", "?", "#N/A")},
    **{f"cell {word}": cell(word) for word in ("inf", "-inf", "Infinity", "1e999", "-1e999")},
    "cell with a space before": lambda lines: cell(" " + lines[4][1])(lines),
    "cell with a space behind": lambda lines: cell(lines[4][1] + " ")(lines),
    "decimal comma": lambda lines: cell(lines[4][1].replace(".", ",") if "." in lines[4][1] else "0,5")(lines),
    "True": cell("True"),
    "a list": cell("[0.5]"),
    "a tensor": cell("tensor(0.5)"),
    "1_0": cell("1_0"),
    "other digits": cell("٣"),
    "hexadecimal": cell("0x1"),
    "quotes in the text": cell("'0012'"),
    "line break in a cell": cell("a\nb"),
}  # fmt: skip
FORM_DAMAGE: dict[str, dict[str, Damage]] = {
    "probability": {"above 1": cell("1.0000001"), "below 0": cell("-1e-9"), "a label": cell("malignant"), "per cent": cell("57.1")},
    "probabilities": {
        "above 1": cell("1.0000001"), "below 0": cell("-1e-9"), "a label": cell("borzoi"),
        "rows of 0.9": lambda lines: [line.__setitem__(slice(1, None), ["0.3"] * 3) for line in lines[1:]],
        "one row off by 2e-6": lambda lines: lines[2].__setitem__(slice(1, None), ["0.2", "0.3", "0.500002"]),
        "logits": lambda lines: lines[2].__setitem__(slice(1, None), ["-0.5", "1.2", "0.3"]),
        "rounded": lambda lines: [line.__setitem__(slice(1, None), ["0.333", "0.333", "0.333"]) for line in lines[1:]],
        "all zero": lambda lines: lines[2].__setitem__(slice(1, None), ["0", "0", "0"]),
        "classes exchanged": lambda lines: lines[0].__setitem__(slice(1, 3), lines[0][2:0:-1]),
        "class missing": lambda lines: [line.pop(2) for line in lines],
    },
    "label": {
        "a probability": cell("0.93"), "a code": cell("1"), "label lost its zeros": cell("12"), "label became a float": cell("12.0"),
        "unknown": cell("poodle"), "capitals": cell("Borzoi"), "two labels": cell("borzoi 0012"), "part": cell("borzo"),
    },
    "value": {"above the range": cell("100.00001"), "below the range": cell("0.99"), "negative": cell("-3"), "text": cell("high")},
}  # fmt: skip
BYTE_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty file": lambda data: b"",
    "a BOM": lambda data: b"\xef\xbb\xbf" + data,
    "utf-16": lambda data: data.decode().encode("utf-16"),
    "utf-16 without a mark": lambda data: data.decode().encode("utf-16-le"),
    "latin-1": lambda data: data.replace(b"a_3", "ä_3".encode("latin-1")),
    "a byte that is no text": lambda data: data.replace(b"a_3", b"a\xff3"),
    "windows line ends": lambda data: data.replace(b"\n", b"\r\n"),
    "old mac line ends": lambda data: data.replace(b"\n", b"\r"),
    "one carriage return": lambda data: data.replace(b"\n", b"\r\n", 3).replace(b"\r\n", b"\n", 2),
    "semicolons": lambda data: data.replace(b",", b";"),
    "tabs": lambda data: data.replace(b",", b"\t"),
    "no last line end": lambda data: data[:-1],
    "blank line at the end": lambda data: data + b"\n",
    "blank line at the start": lambda data: b"\n" + data,
    "blank line in the middle": lambda data: data.replace(b"\na_3", b"\n\na_3"),
    "NUL": lambda data: data.replace(b"a_3", b"a\0003"),
    "zeros at the end": lambda data: data + bytes(64),
    "zeros for the end": lambda data: data[:-20] + bytes(20),
    "all quoted": lambda data: b"".join(b",".join(b'"%s"' % c.strip(b'"') for c in x.split(b",")) + b"\n" for x in data.splitlines()),
    "one id quoted": lambda data: data.replace(b"a_3", b'"a_3"'),
    "open quote": lambda data: data.replace(b"a_3", b'"a_3'),
    "quote inside": lambda data: data.replace(b"a_3", b'a"3'),
    "text after a quote": lambda data: data.replace(b"a_3", b'"a"_3'),
    "spaces after commas": lambda data: data.replace(b",", b", "),
    "a comment": lambda data: b"# exp001\n" + data,
    "html": lambda data: b"<html><body>403</body></html>\n",
    "gzip": lambda data: b"\x1f\x8b\x08\x00" + data,
    "twice": lambda data: data + data,
    "merge marks": lambda data: b"<<<<<<< ours\n" + data,
}  # fmt: skip


def test_every_damage_of_the_table_is_refused_naming_row_and_column(case: Case) -> None:
    good = list(csv.reader(case.write(predictions(case)).open(newline="")))
    file = store.path("submissions", "damaged.csv")
    file.write_text(text_of(good))
    case.validate(file)
    damage = TABLE_DAMAGE | FORM_DAMAGE[case.form]
    for name, harm in damage.items():
        lines = [list(line) for line in good]
        harm(lines)
        assert lines != good, name
        file.write_text(text_of(lines))
        line = refusal(lambda: case.validate(file))
        assert line.startswith("submissions/damaged.csv"), (name, line)
        assert ("lies outside" in line) == (
            name.split()[0] in ("above", "below", "negative", "per", "logits")
        ), (name, line)
        if name in FORM_DAMAGE[case.form] or name.startswith("cell"):
            changed = next(i for i, (a, b) in enumerate(zip(lines, good, strict=True)) if a != b)
            if changed:
                assert f"csv:{changed + 1}: row {good[changed][0]!r}, column" in line, (name, line)
            else:
                assert "csv:1: column" in line, (name, line)


def test_every_damage_of_the_bytes_is_refused(case: Case) -> None:
    file = case.write(predictions(case))
    good = file.read_bytes()
    for name, harm in BYTE_DAMAGE.items():
        file.write_bytes(harm(good))
        assert file.read_bytes() != good, name
        assert refusal(lambda: case.validate(file)).startswith("submissions/exp001.csv"), name
    for length in range(len(good)):
        file.write_bytes(good[:length])
        refusal(lambda: case.validate(file))


def test_a_value_without_a_range_is_still_a_number(empty: Path) -> None:
    lay = lay_out("value", unlimited=True)
    file = lay.write(predictions(lay))
    good = list(csv.reader(file.open(newline="")))
    for word, passes in (
        ("-1e9", True),
        ("1e308", True),
        ("1e999", False),
        ("-1e999", False),
        ("nan", False),
        ("", False),
    ):
        good[3][1] = word
        file.write_text(text_of(good))
        if passes:
            lay.validate(file)
        else:
            assert "row 'a_3', column 'score'" in refusal(lambda: lay.validate(file))


def test_no_flipped_byte_outside_a_number_passes(case: Case) -> None:
    """Inside a number a flip may give another number, and in an own label another class: only those may pass."""
    file = case.write(predictions(case))
    good = file.read_bytes()
    rows = list(csv.reader(io.StringIO(good.decode())))
    for place in range(len(good)):
        for mask in (0x01, 0x10, 0x80):
            bad = bytearray(good)
            bad[place] ^= mask
            file.write_bytes(bad)
            try:
                case.validate(file)
            except Refused:
                continue
            passed = list(csv.reader(io.StringIO(bad.decode())))
            assert [row[0] for row in passed] == [row[0] for row in rows] and passed[0] == rows[0]
            assert case.form != "label" or {row[1] for row in passed[1:]} <= set(DOGS)


def test_what_the_lines_say(empty: Path) -> None:
    """The words that help at 3 am, once each."""
    lay = lay_out("label")
    good = list(csv.reader(lay.write(predictions(lay)).open(newline="")))
    file = store.path("submissions", "damaged.csv")
    for name, words in {
        ".jpg left on ids": ("suffix", "right is '0012'", "and 7 more"),
        "leading zeros lost": ("leading zeros", "right is '0012'"),
        "ids are floats": ("turned into a number", "right is '9'"),
        "index column": ("index=False",),
        "missing row": ("row 'a_3'", "missing"),
        "duplicate row": ("row '0007'", "line 3 already"),
        "two rows exchanged": ("row 'a_3'", "'0007' here", "order"),
        "extra row": ("row 'unknown'", "no such id"),
        "row too short": ("row '0100'", "column 'breed' has no cell"),
    }.items():
        lines = [list(line) for line in good]
        TABLE_DAMAGE[name](lines)
        file.write_text(text_of(lines))
        line = refusal(lambda: lay.validate(file))
        assert all(word in line for word in words), (name, line)
    raw = text_of(good).encode()
    for name, word in {
        "a BOM": "byte order mark",
        "windows line ends": r"\r",
        "no last line end": "cut off",
    }.items():
        file.write_bytes(BYTE_DAMAGE[name](raw))
        assert word in refusal(lambda: lay.validate(file)), name


# --- competition.py --------------------------------------------------------------------------------------------------------


def test_own_postprocess_sees_rows_in_order_and_its_result_is_validated(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay = lay_out("value")
    prediction = predictions(lay)

    def ranked(rows: pd.DataFrame, prediction: np.ndarray) -> np.ndarray:
        assert list(rows["row"]) == IDS and prediction.shape == (len(IDS), 1)
        return np.arange(1.0, len(rows) + 1)[:, None]

    monkeypatch.setattr(competition, "postprocess", ranked, raising=False)
    assert [row[1] for row in csv.reader(lay.write(prediction).open())][1:] == [f"{i}.0" for i in range(1, 9)]
    monkeypatch.setattr(competition, "postprocess", lambda rows, prediction: prediction[1:])
    assert "shape (7, 1)" in refusal(lambda: lay.write(prediction))
    monkeypatch.setattr(competition, "postprocess", lambda rows, prediction: prediction * np.nan)
    assert "not a number" in refusal(lambda: lay.write(prediction))


def test_own_write_submission_is_written_without_index_and_validated(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay = lay_out("label")
    prediction = predictions(lay)

    def mine(rows: pd.DataFrame, prediction: np.ndarray, sample: pd.DataFrame) -> pd.DataFrame:
        assert list(sample["image_id"]) == IDS
        sample["breed"] = "borzoi"
        return sample.set_index(np.arange(5, 13))

    monkeypatch.setattr(competition, "write_submission", mine, raising=False)
    assert lay.write(prediction).read_text() == "image_id,breed\n" + "".join(
        f"{each},borzoi\n" for each in IDS
    )

    def numbered(rows: pd.DataFrame, prediction: np.ndarray, sample: pd.DataFrame) -> pd.DataFrame:
        return mine(rows, prediction, sample).assign(image_id=range(8))

    for hook, words in (
        (lambda rows, prediction, sample: sample, "is empty"),
        (lambda rows, prediction, sample: mine(rows, prediction, sample).iloc[::-1], "order"),
        (lambda rows, prediction, sample: sample.to_csv(), "DataFrame"),
        (numbered, "no such id"),
    ):
        monkeypatch.setattr(competition, "write_submission", hook)
        assert words in refusal(lambda: lay.write(prediction))


# --- predicting again --------------------------------------------------------------------------------------------------------


def stored(folds: int = 15, rows: int = 40) -> dict[Checkpoint, tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(0)
    return {Checkpoint("exp001", 0, fold): (np.arange(rows), draw.random((rows, 3))) for fold in range(folds)}


def test_recheck_asks_for_eight_rows_of_at_most_ten_checkpoints_and_always_the_same() -> None:
    ids, kept = [f"id{i}" for i in range(40)], stored()
    asked: dict[Checkpoint, list[int]] = {}

    def again(checkpoint: Checkpoint, rows: np.ndarray) -> np.ndarray:
        asked[checkpoint] = rows.tolist()
        return kept[checkpoint][1][rows] + 5e-6

    line = recheck("blend", kept, again, lambda checkpoint: 1e-5, ids)
    assert "8 rows" in line and "10 of 15" in line
    assert len(asked) == 10 and all(rows == next(iter(asked.values())) for rows in asked.values())
    assert len(set(next(iter(asked.values())))) == 8
    first = dict(asked)
    recheck("blend", kept, again, lambda checkpoint: 1e-5, ids)
    assert asked == first
    asked.clear()
    recheck("other", kept, again, lambda checkpoint: 1e-5, ids)
    assert asked != first


@pytest.mark.parametrize("off", [2e-5, 0.3, math.nan, math.inf])
def test_recheck_refuses_naming_run_fold_id_and_both_values(off: float) -> None:
    ids, kept = [f"id{i}" for i in range(40)], stored(folds=3)
    culprit: dict[str, int] = {}

    def again(checkpoint: Checkpoint, rows: np.ndarray) -> np.ndarray:
        values = kept[checkpoint][1][rows].copy()
        if checkpoint.fold == 2:
            culprit["row"] = int(rows[5])
            values[5, 1] += off
        return values

    line = refusal(lambda: recheck("exp001", kept, again, lambda checkpoint: 1e-5, ids))
    value = kept[Checkpoint("exp001", 0, 2)][1][culprit["row"], 1]
    for word in ("exp001", "fold 2", f"'id{culprit['row']}'", f"{value:.9g}", f"{value + off:.9g}"):
        assert word in line
    if off == 2e-5:
        recheck("exp001", kept, again, lambda checkpoint: 1e-3, ids)


def test_recheck_of_nothing_is_no_recheck() -> None:
    assert "no stored checkpoint" in refusal(
        lambda: recheck("exp001", {}, lambda c, rows: np.zeros((0, 1)), lambda c: 1e-5, [])
    )

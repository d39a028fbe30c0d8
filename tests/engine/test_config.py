"""Configs: precedence, one override mechanism, and one line for every mistake."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from comp.engine import cli
from comp.engine.config import resolve, schema, yaml_lines
from comp.engine.errors import UserError, joined

P = Path(__file__).resolve().parents[2] / "{{cookiecutter.project_slug}}"


@pytest.fixture
def root(empty: Path) -> Path:
    return empty


def write(root: Path, name: str, text: str) -> None:
    (root / "configs" / name).write_text(text)


def lines_of(root: Path, experiment: str = "exp001", *overrides: str) -> list[str]:
    with pytest.raises(UserError) as refused:
        resolve.load(root, experiment, overrides)
    return refused.value.lines


def test_precedence_and_origins(root: Path) -> None:
    write(root, "child.yaml", "base: exp001\noptim: {lr: 7e-4}\n")
    loaded = resolve.load(root, "child", ["train.epochs=3"], debug=True)
    assert loaded.config.optim.lr == 7e-4 and loaded.origins["optim.lr"] == "configs/child.yaml:2"
    assert loaded.config.model.name == "test_resnet" and loaded.origins["model.name"].startswith(
        "configs/exp001.yaml:"
    )
    assert loaded.config.train.epochs == 3 and "command" not in loaded.origins["train.epochs"]
    assert loaded.config.train.max_samples == 64 and loaded.origins["train.max_samples"].startswith(
        "configs/debug.yaml:"
    )
    assert resolve.load(root, "exp001").config.train.max_samples is None


def test_every_config_of_this_project_loads() -> None:
    names = [
        file.stem for file in (P / "configs").glob("*.yaml") if file.stem not in ("competition", "debug")
    ]
    assert "base" in names
    for name in names:
        resolve.load(P, name)


def test_resolved_yaml_is_the_same_config(root: Path, tmp_path: Path) -> None:
    cfg = resolve.load(root, "exp001", ["optim.lr=1e-7", "competition.target=[a, '010', 'true']"]).config
    file = tmp_path / "config.yaml"
    file.write_text(resolve.to_yaml(cfg))
    assert resolve.from_yaml(file) == cfg


def test_a_plain_value_goes_to_the_head_of_a_section(root: Path) -> None:
    cfg = resolve.load(root, "exp001", ["track=none", "schedule=constant", "augment=heavy"]).config
    assert (cfg.track.mode, cfg.schedule.name, cfg.augment.recipe) == ("none", "constant", "heavy")


def test_what_changes_results() -> None:
    moving = ["optim.lr=1", "train.threads=2", "competition.id=x"]
    free = [
        "machine.num_workers=4",
        "track=none",
        "track.mode=online",
        "train.seeds=[1]",
        "keep.optimizer_state=true",
    ]
    assert resolve.changes_results([*free, *moving]) == moving


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("010", "010"), ("no", "no"), ("1:30", "1:30"), ("true", True), ("~", None), ("2020-01-01", "2020-01-01"),
     ("0x10", "0x10"), ("-.5", -0.5), ("'5'", "5"), ("1_000", "1_000"), ("007", "007"), ("'1e5'", "1e5"), ("'#3'", "#3")],
)  # fmt: skip
def test_yaml_as_people_mean_it(text: str, value: object) -> None:
    assert yaml_lines.parse(f"a: {text}".encode())[0] == {"a": value}
    assert yaml_lines.parse(yaml_lines.dump({"a": value}).encode())[0] == {"a": value}
    assert yaml_lines.parse(f"a: {yaml_lines.inline(value)}  # why\n".encode())[0] == {"a": value}


MISTAKES = {
    "optim: {lrr: 1}": ("exp.yaml:2", "optim.lrr: no such key", "did you mean optim.lr?"),
    "optim: {lr: fast}": ("exp.yaml:2", "optim.lr", "'fast'"),
    "optim:\n  lr: 1\n  lr: 2": ("exp.yaml:4", "optim.lr", "second time"),
    "train: {epochs: true}": ("exp.yaml:2", "train.epochs", "not true"),
    "train: {epochs: 2.5}": ("exp.yaml:2", "train.epochs", "2.5"),
    "optim: adam": ("exp.yaml:2", "optim", "'adam'"),
    "optim: {clip_mode: norn}": ("exp.yaml:2", "optim.clip_mode", "norm"),
    "data: {size: 4}": ("exp.yaml:2", "data.size", "8"),
    "augment: {disable_last_epochs: 15, random_erasing: 0.5}": (
        "exp.yaml:2",
        "augment.disable_last_epochs",
        "15",
    ),
    "optm: {rate: 1}": ("exp.yaml:2", "optm", "optim"),
    "a: [1, 2": ("exp.yaml:", "is not YAML", ""),
    "model: !!python/name:os.system x": ("exp.yaml:2", "tag", ""),
}


# What no reader expects: each was an exception of Python, or a process that never ended.
HOSTILE = {
    "recursive alias": ("model: &m {kwargs: *m}", ("exp.yaml:2", "model.kwargs", "alias")),
    "recursive list": ("train: {stages: &s [*s]}", ("exp.yaml:2", "train.stages.0", "alias")),
    "alias bomb": (
        "\n".join(
            [
                "a0: &a0 [x, x, x, x, x, x, x, x, x]",
                *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
            ]
        ),
        ("exp.yaml:", "alias", "100,000"),
    ),
    "3,000 brackets": ("optim: " + "[" * 3000 + "]" * 3000, ("exp.yaml:2", "nested", "30")),
    "3,000 indented keys": ("\n".join(f"{' ' * i}a:" for i in range(3000)), ("exp.yaml:31", "nested", "30")),
    "5,000 digits": (f"optim:\n  lr: {'9' * 5000}", ("exp.yaml:3", "5,000 digits", "")),
    "key in a list of knobs": (
        "train: {epochs: 1, stages: [{epoch: 1, train: head, lr: 1}]}",
        ("exp.yaml:2", "train.stages.0.epoch: no such key", "did you mean train.stages.0.epochs?"),
    ),
    "key in a list of tables": (
        "competition: {extra: [{tabel: a.csv, image: b}]}",
        ("exp.yaml:2", "competition.extra.0.tabel: no such key", "did you mean competition.extra.0.table?"),
    ),
    "key in a mapping in a list": (
        "competition: {extra: [{table: a.csv, image: b, long: {colum: c}}]}",
        ("exp.yaml:2", "competition.extra.0.long.colum: no such key", "did you mean competition.extra.0.long.column?"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_no_reader_expects_is_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    text, parts = HOSTILE[kind]
    write(root, "exp.yaml", f"base: exp001\n{text}\n")
    assert cli.main(["train", "exp"]) == 2
    err = capsys.readouterr().err.strip()
    assert "\n" not in err and len(err) < 300
    for part in parts:
        assert part in err


def test_a_long_number_on_the_command_line(root: Path) -> None:
    (line,) = lines_of(root, "exp001", f"optim.lr={'9' * 5000}")
    assert line.startswith("'optim.lr=999") and "5,000 digits" in line and len(line) < 200


def test_aliases_that_end_are_written_out(root: Path) -> None:
    write(root, "exp.yaml", "base: exp001\ndata: {size: &side 64}\npredict: {batch_size: *side}\n")
    cfg = resolve.load(root, "exp").config
    assert cfg.data.size == cfg.predict.batch_size == 64


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_names_file_line_key_and_what_is_right(root: Path, text: str) -> None:
    write(root, "exp.yaml", f"base: exp001\n{text}\n")
    lines = lines_of(root, "exp")
    assert len(lines) == 1
    for part in MISTAKES[text]:
        assert part in lines[0]


def test_all_mistakes_at_once(root: Path) -> None:
    write(root, "exp.yaml", "optim: {lr: -1}\ntrain: {epochs: 0}\ndata: {resize: crop}\n")
    assert len(lines_of(root, "exp")) == 3


def test_unknown_and_circular_bases(root: Path) -> None:
    write(root, "exp.yaml", "base: exp0001\n")
    (line,) = lines_of(root, "exp")
    assert line.startswith("configs/exp.yaml:1: base: ") and "exp001" in line
    write(root, "a.yaml", "base: b\n")
    write(root, "b.yaml", "base: a\n")
    (line,) = lines_of(root, "a")
    assert line.startswith("configs/b.yaml:1: base: ") and "leads back to itself" in line


def test_groups_are_not_ignored_by_accident(root: Path) -> None:
    assert "leak" in lines_of(root, "exp001", "competition.folds.scheme=stratified")[0]
    resolve.load(
        root, "exp001", ["competition.folds.scheme=stratified", "competition.folds.blind_to_groups=true"]
    )


def mutated(seed: int) -> tuple[str, str]:
    """One of the shipped files with a typical mistake. Every change here is invalid."""
    rng = random.Random(seed)
    sections = {n: f.annotation for n, f in schema.Config.model_fields.items() if n != "competition"}
    section = rng.choice(sorted(sections))
    # kwargs: any name may be in it.
    fields = set(sections[section].model_fields) - {"kwargs"}  # type: ignore[union-attr]
    key = rng.choice(sorted(fields))
    broken = {
        "misspelt key": f"{section}: {{{key}x: 1}}",
        "misspelt section": f"{section[:-1]}x: {{{key}: 1}}",
        "section in place of a value": f"{section}: {{{key}: {{a: 1}}}}",
        "value in place of a section": f"{section}: 7",
        "list in place of a section": f"{section}: [{key}]",
        "twice": f"{section}: {{}}\n{section}: {{}}",
        "unclosed": f"{section}: {{{key}: 1",
        "tab": f"{section}:\n\t{key}: 1",
        "not a number": "optim: {lr: .nan}\ntrain: {epochs: ten}",
        "a list of all": f"- {section}",
    }
    name = rng.choice(sorted(broken))
    return name, broken[name]


@pytest.mark.parametrize("seed", range(100))
def test_a_mutated_config_gets_its_line(root: Path, seed: int) -> None:
    name, text = mutated(seed)
    write(root, "exp.yaml", text + "\n")
    lines = lines_of(root, "exp")
    assert 1 <= len(lines) <= (2 if name == "not a number" else 1), (name, text, lines)
    assert all(line.startswith("configs/exp.yaml:") and "\n" not in line for line in lines), (text, lines)


def test_the_command_line_answers_before_torch_is_imported(root: Path) -> None:
    code = (
        "import sys; from comp.engine.cli import main; code = main(['train', 'exp001', 'optim.rat=1']); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"COMP_ROOT": str(root), "PYTHONPATH": str(P)},
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
    assert done.stderr.strip().startswith("optim.rat: no such key; optim has name, lr, ")


LIKELY = {
    "optim.lrr=1": ("optim.lrr", "did you mean optim.lr?"),
    "lr=1": ("lr", "did you mean optim.lr?"),
    "train.lr=1": ("train.lr", "did you mean optim.lr?"),
    "batch_size=1": ("batch_size", "did you mean train.batch_size or predict.batch_size?"),
    "optm.lr=1": ("optm", "did you mean optim?"),
}


@pytest.mark.parametrize("override", LIKELY)
def test_a_misspelt_key_gets_its_likely_key_with_the_section(root: Path, override: str) -> None:
    with pytest.raises(UserError) as refused:
        resolve.load(root, "exp001", [override])
    error = refused.value
    assert (error.key, error.remedy) == LIKELY[override] and len(error.errors) == 1
    assert error.where == repr(override) and error.code == "key-unknown"


def test_an_unlike_key_lists_the_keys_of_its_section(root: Path) -> None:
    (line,) = lines_of(root, "exp001", "optim.learning_rate=1")
    assert line.startswith("optim.learning_rate: no such key; optim has name, lr, ")


WRONG_VALUES = {
    "model.pretrained=5": "true, false, run:NAME, or a .safetensors, .pth, .pt or .bin file, not 5",
    "model.pretrained=resnet.h5": "run:NAME, or a .safetensors, .pth, .pt or .bin file, not 'resnet.h5'",
    "machine.device=gpu": "auto, cpu, mps, cuda or like cuda:1, not 'gpu'",
    "optim.lr=fast": "must be a number, not 'fast'",
    "model.name=null": "must be text, not null",
    "model.kwargs={a: null}": "a number or text or a list, not null",
    "competition.classes=[[1]]": "must be text, not [1]",
}


@pytest.mark.parametrize("override", WRONG_VALUES)
def test_a_wrong_value_is_one_line_without_words_of_pydantic(root: Path, override: str) -> None:
    (line,) = lines_of(root, "exp001", override)
    assert WRONG_VALUES[override] in line
    assert not any(word in line for word in ("str:", "bool:", "pattern", "input should", "valid", "(text)"))


@pytest.mark.parametrize("value", ["true", "run:exp001", "weights/a.pth", "run:a.b-c"])
def test_pretrained_takes_runs_and_files(root: Path, value: str) -> None:
    assert resolve.load(root, "exp001", [f"model.pretrained={value}"]).config.model.pretrained in (
        True,
        value,
    )


def test_an_error_that_names_a_knob_gets_its_line(root: Path) -> None:
    write(root, "exp.yaml", "base: exp001\nmodel: {name: resnet81}\n")
    loaded = resolve.load(root, "exp", ["loss.gamma=1"])
    with pytest.raises(UserError) as located, loaded.locating():
        raise joined(
            [
                UserError("model-unknown", key="model.name", what="no such model"),
                UserError("knob-unused", key="loss.gamma", what="has no effect"),
                UserError("run-unknown", where="runs/a", key="model.name", what="no such run"),
            ]
        )
    assert [error.where for error in located.value.errors] == [
        "configs/exp.yaml:2",
        "'loss.gamma=1'",
        "runs/a",
    ]
    assert str(located.value).splitlines()[0] == "configs/exp.yaml:2: model.name: no such model"


def refused_by(*arguments: str) -> UserError:
    with pytest.raises(UserError) as refused:
        cli.run(list(arguments))
    return refused.value


def test_a_misspelt_verb_or_option_gets_its_likely_spelling_only() -> None:
    assert refused_by("trian", "exp001").remedy == "did you mean train?"
    for name in ("fit", "score", "--version"):
        error = refused_by(name)
        assert (error.code, error.remedy) == ("verb-unknown", "comp --help lists all")
    error = refused_by("submit", "exp001", "--dryrun")
    assert (error.where, error.remedy) == ("comp submit --dryrun", "did you mean --dry-run?")
    error = refused_by("runs", "--what", "x")
    assert (error.code, error.remedy) == ("argument-unknown", "comp runs --help lists the arguments")


def test_the_help_of_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    helps = []
    for arguments in (["help", "config"], ["config", "--help"]):
        with pytest.raises(SystemExit) as end:
            cli.run(arguments)
        assert not end.value.code
        helps.append(capsys.readouterr().out)
    assert helps[0] == helps[1] and "usage: comp config" in helps[0] and "minute" not in helps[0]
    with pytest.raises(SystemExit):
        cli.run(["train"])
    assert capsys.readouterr().err.strip().endswith("required: experiment")


def test_options_of_train_are_validated_first(root: Path) -> None:
    error = refused_by("train", "exp001", "--on", "moon")
    assert (error.code, error.where) == ("option-invalid", "--on moon")
    error = refused_by("train", "exp001", "--seed", "3")
    assert (error.code, error.where, error.key) == ("seed-unknown", "--seed 3", "train.seeds")
    assert "train.seeds=[0,3]" in error.remedy


def test_a_copy_with_a_name_that_is_no_knob_is_a_fault(root: Path) -> None:
    """pydantic itself takes it in silence: after a renaming the change would have no effect."""
    cfg = resolve.load(root, "exp001").config
    assert cfg.predict.model_copy(update={"tta": ["hflip"]}).tta == ["hflip"]
    with pytest.raises(AssertionError, match="space"):
        cfg.predict.model_copy(update={"space": "logit"})

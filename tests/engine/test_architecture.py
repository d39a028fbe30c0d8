"""The rules of the house that a linter does not know. A new module goes into LAYERS, at the height where it belongs."""

import ast
import subprocess
import sys
from pathlib import Path

from comp import declared, knobs, tasks, yaml_lines

COMP = Path(__file__).resolve().parents[2] / "{{cookiecutter.project_slug}}" / "comp"

# Lowest first; modules of one line do not import each other's lines above.
LAYERS = [
    ["refused", "yaml_lines", "machine", "process", "table", "verb", "duration", "notebook"],
    ["secret"],
    ["declared"],
    ["knobs"],
    ["config"],
    ["store", "tasks", "members", "idle"],
    ["experiments"],
    ["formulas", "metrics", "objective"],
    ["competition"],
    ["own"],
    ["samples", "longform", "by_row"],
    ["folds"],
    ["predictions", "decide", "honest"],
    ["bank"],
    ["score"],
    ["provenance", "track", "feeder", "pictures", "page", "teachers"],
    ["prepare"],
    ["train"],
    ["predict"],
    ["record"],
    ["identity", "fan"],
    ["jobs"],
    ["gang"],
    ["models"],
    ["ensemble"],
    ["tune"],
    ["deliver"],
    ["overview", "clean"],
    ["training"],
    ["cli", "__main__", "leashed"],
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
LIGHT = ["cli", "training", "config", "store", "tasks", "metrics", "competition", "own", "samples", "folds"]
HEAVY = {
    "torch",
    "timm",
    "albumentations",
    "sklearn",
    "wandb",
    "optuna",
    "kaggle",
    "cv2",
    "matplotlib",
    "pandas",
    "pyarrow",
}


def modules() -> list[Path]:
    found = sorted(COMP.rglob("*.py"))
    assert len(found) > 20
    return found


def layer(file: Path) -> str:
    return file.relative_to(COMP).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of what a file imports, `from comp import x` as comp.x."""
    out: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            out |= {f"{node.module}.{alias.name}" for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), "write imports from comp, not from dots"
    return out


def test_every_module_has_its_layer() -> None:
    strangers = {layer(file) for file in modules()} - HEIGHT.keys() - {"__init__"}
    assert not strangers, f"add {sorted(strangers)} to LAYERS, at the height where they belong"
    missing = HEIGHT.keys() - {layer(file) for file in modules()}
    assert not missing, f"LAYERS names {sorted(missing)}, which is no module any more"


def test_imports_point_down() -> None:
    wrong, seen = [], 0
    for file in modules():
        for name in imports(ast.parse(file.read_text())):
            parts = name.split(".")
            if parts[0] != "comp" or len(parts) < 2 or parts[1] not in HEIGHT:
                continue
            seen += 1
            if layer(file) in HEIGHT and HEIGHT[parts[1]] > HEIGHT[layer(file)]:
                wrong.append(f"{file.relative_to(COMP)} imports {name}, which stands above it")
    assert seen > 50
    assert not wrong, "\n".join(wrong)


def test_competition_imports_only_what_a_template_update_never_breaks() -> None:
    ours = {n for n in imports(ast.parse((COMP / "competition.py").read_text())) if n.startswith("comp")}
    assert all(n.split(".")[1] in ("config", "tasks", "metrics", "refused") for n in ours), ours


def test_light_modules_import_nothing_heavy_at_the_top() -> None:
    code = f"import sys\nimport {', '.join(f'comp.{name}' for name in LIGHT)}\nprint(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=COMP.parent
    ).stdout.split()
    assert "comp.cli" in loaded
    assert not HEAVY & set(loaded)


def test_help_loads_nothing_heavy() -> None:
    code = "import sys\nfrom comp import cli\ntry:\n    cli.main(['train', '--help'])\nexcept SystemExit:\n    pass\nprint(*sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=COMP.parent
    ).stdout
    assert "--fold" in said and not HEAVY & set(said.split())


def test_no_file_is_longer_than_one_sitting() -> None:
    long = {str(f.relative_to(COMP)): n for f in modules() if (n := len(f.read_text().splitlines())) > 500}
    assert not long, f"split these at a real seam: {long}"


def test_the_loop_is_visible() -> None:
    lines = (COMP / "train" / "loop.py").read_text().splitlines()
    at = {
        word: next(i for i, line in enumerate(lines) if word in line)
        for word in ("network(pictures", ".backward(", "scaler.step(")
    }
    assert max(at.values()) - min(at.values()) < 50, "forward, backward and step stand within one screen"


def test_every_knob_stands_in_base_yaml_and_has_no_default_in_python() -> None:
    written = yaml_lines.parse((COMP.parent / "configs" / "base.yaml").read_bytes())[0]
    seen = 0
    for section, field in knobs.Config.model_fields.items():
        if section == "competition":
            continue
        for name, knob in field.annotation.model_fields.items():  # type: ignore[union-attr]
            assert knob.is_required(), f"{section}.{name} has a default in Python"
            assert name in written[section], f"{section}.{name} is missing in configs/base.yaml"
            seen += 1
    assert seen > 25


def test_tasks_and_knobs_name_the_same_tasks() -> None:
    assert set(tasks.TASKS) == set(declared.TaskName.__args__)  # type: ignore[attr-defined]


def test_nothing_that_runs_code_is_loaded() -> None:
    for file in modules():
        text = file.read_text()
        assert "pickle" not in text.replace("pickled", "").replace("picklable", ""), file
        assert "weights_only=False" not in text, file

"""Rules of the architecture that a linter does not check. A new folder or module of comp/engine goes into
LAYERS."""

import ast
import subprocess
import sys
from pathlib import Path

from comp.engine import cli, worker
from comp.engine.config import competition_schema, schema, yaml_lines
from comp.engine.tasks import kinds

COMP = Path(__file__).resolve().parents[2] / "{{cookiecutter.project_slug}}" / "comp"

# Folders and modules of comp/engine, lowest first. A module imports from lines above and from its folder.
LAYERS = [
    ["errors", "text_table", "notebook", "hardware"],
    ["store"],
    ["config"],
    ["report", "command"],
    ["readers"],
    ["tasks"],
    ["data"],
    ["bank"],
    ["run"],
    ["ensemble"],
    ["tune"],
    ["deliver"],
    ["extras"],
    ["cli", "worker"],
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
PAGE_LOOKUP = "pages"  # the module of the engine that looks up what the pages define
LIGHT = [  # imported without any package of HEAVY
    "competition",
    "metrics",
    "engine.cli",
    "engine.command",
    "engine.config.resolve",
    "engine.store.artifacts",
    "engine.tasks.kinds",
    "engine.pages",
    "engine.data.samples",
    "engine.data.folds",
]
WITHOUT_TORCH = [
    "engine.run.runner",
    "engine.run.previews",
    "engine.run.predict_run",
]  # they refuse before torch is imported
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
    """The folder of comp/engine in which a module lies, or its own name; "" for a page."""
    inside = file.relative_to(COMP).parts
    return inside[1].removesuffix(".py") if inside[0] == "engine" else ""


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


def test_every_folder_of_the_engine_has_its_layer() -> None:
    there = {layer(file) for file in modules()} - {"", "__init__", PAGE_LOOKUP}
    assert there == HEIGHT.keys(), "LAYERS must list each folder and module of comp/engine"


def test_imports_point_down() -> None:
    wrong, seen = [], 0
    for file in modules():
        for name in imports(ast.parse(file.read_text())):
            parts = name.split(".")
            if parts[:2] != ["comp", "engine"] or len(parts) < 3 or parts[2] not in HEIGHT:
                continue
            seen += 1
            if layer(file) in HEIGHT and HEIGHT[parts[2]] > HEIGHT[layer(file)]:
                wrong.append(f"{file.relative_to(COMP)} imports {name}, of a higher layer")
    assert seen > 50
    assert not wrong, "\n".join(wrong)


def test_competition_imports_only_what_a_template_update_never_breaks() -> None:
    ours = {n for n in imports(ast.parse((COMP / "competition.py").read_text())) if n.startswith("comp")}
    assert all(
        n.startswith(("comp.metrics", "comp.engine.config", "comp.engine.tasks", "comp.engine.errors"))
        for n in ours
    ), ours


def loaded_by(names: list[str]) -> set[str]:
    code = f"import sys\nimport {', '.join(f'comp.{name}' for name in names)}\nprint(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=COMP.parent
        ).stdout.split()
    )


def test_light_modules_import_nothing_heavy_at_the_top() -> None:
    loaded = loaded_by(LIGHT)
    assert "comp.engine.cli" in loaded
    assert not HEAVY & loaded


def test_mistakes_are_refused_before_torch_is_imported() -> None:
    loaded = loaded_by(WITHOUT_TORCH)
    assert "comp.engine.run.validate" in loaded
    assert not {"torch", "timm", "albumentations"} & loaded


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom comp.engine import cli\n"
        "try:\n    cli.main(['train', '--help'])\nexcept SystemExit:\n    pass\nprint(*sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=COMP.parent
    ).stdout
    assert "--fold" in printed and not HEAVY & set(printed.split())


def functions(target: str) -> dict[str, ast.FunctionDef]:
    """The functions of the module in "module:function"."""
    file = COMP / "engine" / f"{target.partition(':')[0].replace('.', '/')}.py"
    return {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_verb_calls_a_function_that_takes_its_arguments() -> None:
    """Each argument is a parameter of the verb's function, or of the one that is called instead; nothing is
    left without a value."""
    for name, verb in cli.VERBS.items():
        given = {
            options.get("dest") or names[-1].lstrip("-").replace("-", "_")
            for names, options in verb.arguments
        }
        assert verb.instead.keys() <= given, name
        taken = set()
        for target in (verb.function, *verb.instead.values()):
            function = functions(target).get(target.partition(":")[2])
            assert function, f"comp {name}: there is no {target}"
            parameters = [*function.args.args, *function.args.kwonlyargs]
            defaults = [None] * (
                len(function.args.args) - len(function.args.defaults)
            ) + function.args.defaults
            required = {
                parameter.arg
                for parameter, default in zip(
                    parameters, [*defaults, *function.args.kw_defaults], strict=True
                )
                if default is None
            }
            assert required <= given | {"cfg"}, f"comp {name}: {target} lacks {required - given}"
            taken |= {parameter.arg for parameter in parameters}
        assert given - taken <= {"steal_lock"} | verb.instead.keys(), (
            f"comp {name}: no function takes {given - taken}"
        )


def test_every_job_has_its_function() -> None:
    for target in worker.FUNCTIONS.values():
        assert target.partition(":")[2] in functions(target), target


def test_no_file_is_longer_than_one_sitting() -> None:
    long = {str(f.relative_to(COMP)): n for f in modules() if (n := len(f.read_text().splitlines())) > 500}
    assert not long, f"split these at a real seam: {long}"


def test_the_loop_is_visible() -> None:
    lines = (COMP / "train.py").read_text().splitlines()
    at = {
        word: next(i for i, line in enumerate(lines) if word in line)
        for word in ("compiled_model(images", ".backward(", "scaler.step(")
    }
    assert max(at.values()) - min(at.values()) < 50, "forward, backward and step stand within one screen"


def test_every_knob_stands_in_base_yaml_and_has_no_default_in_python() -> None:
    written = yaml_lines.parse((COMP.parent / "configs" / "base.yaml").read_bytes())[0]
    seen = 0
    for section, field in schema.Config.model_fields.items():
        if section == "competition":
            continue
        for name, knob in field.annotation.model_fields.items():  # type: ignore[union-attr]
            assert knob.is_required(), f"{section}.{name} has a default in Python"
            assert name in written[section], f"{section}.{name} is missing in configs/base.yaml"
            seen += 1
    assert seen > 25


def test_tasks_and_knobs_name_the_same_tasks() -> None:
    assert set(kinds.TASKS) == set(competition_schema.TaskName.__args__)  # type: ignore[attr-defined]


def test_nothing_that_runs_code_is_loaded() -> None:
    for file in modules():
        text = file.read_text()
        assert "pickle" not in text.replace("pickled", "").replace("picklable", ""), file
        assert "weights_only=False" not in text, file

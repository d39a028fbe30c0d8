"""Planted keys: refused before anything is written, found in nothing that is, and kept out of commits."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from comp.engine import cli
from comp.engine.deliver import ledger
from comp.engine.run import provenance
from comp.engine.store import secrets

# Put together here, so that the repository holds nothing that looks like a key.
DIGITS = "0123456789"
KEYS = [
    *(begins + DIGITS + "abcdefghijXYZ" for begins in ("wandb_v1_", "KGAT_", "hf_", "ghp_", "github_pat_", "sk-")), "AKIA" + DIGITS + "ABCDEF",
    "xoxb-" + DIGITS + "ab", (DIGITS + "abcdef") * 2, (DIGITS + "abcdef") * 2 + DIGITS[:8], f"https://me:{DIGITS}pass@host.example/x",
    f"https://{DIGITS}abcdefghij@host.example/x", f"postgresql://me:{DIGITS}@host.example/base",
]  # fmt: skip
ARGUMENTS = [[key] for key in KEYS] + [
    ["--api-key", "0123456789x"],
    ["--token=0123456789x"],
    ["track.token=0123456789x"],
    ["-m", "PLANTED"],
]


def everything(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda given: given[-1][:12])
def test_a_key_in_the_arguments(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", f"planted-{DIGITS}")
    arguments = [each.replace("PLANTED", f"planted-{DIGITS}") for each in arguments]
    before = everything(empty)
    assert cli.main(["train", "exp001", *arguments]) == 2
    out = capsys.readouterr()
    assert "looks like a key" in out.err and "0123456789" not in out.err + out.out
    assert everything(empty) == before


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key[:12])
def test_a_key_in_a_config(empty: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    (empty / "configs" / "exp009.yaml").write_text(f"base: exp001\ntrack: {{project: '{key}'}}\n")
    before = everything(empty)
    assert cli.main(["train", "exp009"]) == 2
    out = capsys.readouterr()
    assert (
        "configs/exp009.yaml:2: track.project: looks like a key" in out.err
        and "0123456789" not in out.err + out.out
    )
    assert everything(empty) == before


def test_what_is_no_key_passes() -> None:
    for text in (
        "optim.lr=3e-4",
        "data.size=224",
        "exp001",
        "larger images",
        "model.name=convnext_tiny.fb_in22k",
        "9h",
        "score>0.9",
        "postgresql://comp@/postgres?host=/nowhere",
    ):
        secrets.validate_arguments([text])


def test_keys_of_the_environment_are_in_nothing_that_is_written(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, name in enumerate(
        ("KAGGLE_KEY", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD")
    ):
        monkeypatch.setenv(name, f"planted-{i}-0123456789")
    ledger.intend(
        "file",
        competition="practice",
        name="a",
        message="see planted-0-0123456789",
        members=["planted-1-0123456789"],
    )
    assert b"planted-" not in ledger.file().read_bytes()
    assert "planted-" not in str(
        provenance.without_secrets({"a": ["planted-2-0123456789", {"b": "planted-3-0123456789"}]})
    )


HEX32, HEX40 = hashlib.md5(b"planted").hexdigest(), hashlib.sha1(b"planted").hexdigest()
MIXED = base64.b64encode(hashlib.sha512(b"planted").digest()).decode().replace("+", "").replace("/", "")
TOKEN, PASSWORD = MIXED[:40], MIXED[40:56]
LONG = base64.b64encode(hashlib.sha512(b"secret").digest()).decode()[:40]  # with + and /, as Amazon's are
PEM = ["-----BEGIN RSA " + "PRIVATE KEY-----", MIXED[:64], MIXED[10:74], "-----END RSA " + "PRIVATE KEY-----"]
# How keys get into a repository: a file's name, its text, and the parts of it that must be nowhere else.
FORMS = {
    "environ item": (".py", f'os.environ["KAGGLE_KEY"] = "{HEX32}"', [HEX32]),
    "environ setdefault": (".py", f'os.environ.setdefault("HF_TOKEN", "{TOKEN}")', [TOKEN]),
    "environ update": (".py", f'os.environ.update(WANDB_API_KEY="{TOKEN}")', [TOKEN]),
    "environ update with a mapping": (".py", f'os.environ |= {{"KAGGLE_USERNAME": "me", "KAGGLE_KEY": "{HEX32}"}}', [HEX32]),
    "getenv's default": (".py", f'token = os.getenv("SERVICE_TOKEN", "{TOKEN}")', [TOKEN]),
    "putenv": (".py", f"os.putenv('API_KEY', '{TOKEN}')", [TOKEN]),
    "annotated": (".py", f'token: str = "{TOKEN}"', [TOKEN]),
    "annotated union": (".py", f'api_key: str | None = "{TOKEN}"', [TOKEN]),
    "annotated final": (".py", f'SECRET: Final[str] = "{TOKEN}"', [TOKEN]),
    "bearer header": (".py", f'headers = {{"Authorization": "Bearer {TOKEN}"}}', [TOKEN]),
    "header of its own": (".sh", f'curl -H "X-Api-Key: {TOKEN}" https://host.example', [TOKEN]),
    "tuple": (".py", f'("KAGGLE_KEY", "{TOKEN}")', [TOKEN]),
    "parentheses over lines": (".py", f'token = (\n    "{TOKEN}"\n)', [TOKEN]),
    "continued line": (".py", f'password = \\\n    "{PASSWORD}"', [PASSWORD]),
    "keyword": (".py", f'wandb.login(key="{TOKEN}")', [TOKEN]),
    "argparse default": (".py", f'parser.add_argument("--token", default="{TOKEN}")', [TOKEN]),
    "two positional": (".py", f'api.authenticate("me", "{HEX32}")', [HEX32]),
    "walrus": (".py", f'if secret := "{TOKEN}":', [TOKEN]),
    "f-string": (".py", f'api_key = f"{TOKEN}"', [TOKEN]),
    "b-string": (".py", f"token = b'{TOKEN}'", [TOKEN]),
    "triple quotes": (".py", f'password = """{PASSWORD}"""', [PASSWORD]),
    "comment": (".py", f"# my key: {HEX40}", [HEX40]),
    "wrapped": (".py", f'token = SecretStr("{TOKEN}")', [TOKEN]),
    "unquoted yaml": (".yaml", f"api_key: {TOKEN}", [TOKEN]),
    "yaml list": (".yaml", f"tokens:\n  - {TOKEN}", [TOKEN]),
    "yaml block": (".yaml", f"secret: >-\n  {TOKEN}", [TOKEN]),
    "toml": (".toml", f'token = "{TOKEN}"', [TOKEN]),
    "json in a notebook": (".py", f'"source": ["api_key = \\"{TOKEN}\\"\\n"]', [TOKEN]),
    "export": (".sh", f"export KAGGLE_KEY={HEX32}", [HEX32]),
    "before a command": (".sh", f"WANDB_API_KEY={PASSWORD} python train.py", [PASSWORD]),
    "wandb login": (".sh", f"wandb login {HEX40}", [HEX40]),
    "option": (".sh", f"service --api-key {TOKEN}", [TOKEN]),
    "magic": (".py", f"%env WANDB_API_KEY={PASSWORD}", [PASSWORD]),
    "magic without =": (".py", f"%env HF_TOKEN {TOKEN}", [TOKEN]),
    "login in a url": (".sh", f"git clone https://me:{PASSWORD}@host.example/x", [PASSWORD]),
    "netrc line": (".sh", f"echo machine host login me password {PASSWORD} >> ~/.netrc", [PASSWORD]),
    "gitlab": (".py", f'login("{"gl" + "pat-" + TOKEN[:20]}")', [TOKEN[:20]]),
    "google": (".py", f'maps = "{"AI" + "za" + TOKEN[:35]}"', [TOKEN[:35]]),
    "github": (".yaml", f"run: push {'gh' + 'p_' + TOKEN[:36]}", [TOKEN[:36]]),
    "stripe": (".py", f'charge("{"sk" + "_live_" + TOKEN[:24]}")', [TOKEN[:24]]),
    "amazon": (".toml", f'aws_secret_access_key = "{LONG}"', [LONG]),
    "amazon's id": (".py", f'client("{"AK" + "IA" + TOKEN[:16].upper()}")', [TOKEN[:16].upper()]),
    "slack": (".sh", f"notify {'xo' + 'xb-' + TOKEN}", [TOKEN]),
    "web token": (".py", f'jwt = "{"ey" + "J" + TOKEN}.{"ey" + "J" + TOKEN}.{TOKEN}"', [TOKEN]),
    "private key": (".py", 'pem = """' + "\n".join(PEM) + '"""', PEM[1:3]),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The diff that runs store, and the messages of the hook: one file per syntax, one start of git and of
    the hook."""
    root = tmp_path_factory.mktemp("planted")

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True)

    git("init", "-q")
    for number, (suffix, text, _) in enumerate(FORMS.values()):
        (root / f"form{number}{suffix}").write_text(f"before = 1\n{text}\n")
    difference = provenance.code(root)[1]
    git("add", ".")
    hook = subprocess.run(
        [sys.executable, "-m", "comp.engine.store.secrets"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert hook.returncode == 1
    return difference, hook.stderr


@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_a_key_passes(planted: tuple[str, str], form: str) -> None:
    """In runs/**/code.diff, through the hook, in what W&B keeps of config and command line."""
    difference, hook = planted
    number, (suffix, text, keys) = list(FORMS).index(form), FORMS[form]
    file = f"form{number}{suffix}"
    part = difference.split(f"diff --git a/{file} ")[1].split("diff --git")[0]
    assert f"+++ b/{file}" in part and "+before = 1" in part
    assert f"{file}:{2 + text[: text.index(keys[0])].count(chr(10))}: looks like a key" in hook
    wandb = json.dumps(provenance.without_secrets({"notes": text, "command": f"comp train a {text}", "list": [text]}))  # fmt: skip
    for key in keys:
        for copy in (part, hook, wandb):
            assert key not in copy and key[4:-4] not in copy
    added = [line for line in part.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert len(added) == 2 + text.count("\n"), "git apply counts lines"


def test_this_repository_gives_no_alarm() -> None:
    """False positives are below one in 1,000 lines, including hashes of requirements.txt and these tests;
    otherwise users would disable the hook."""
    here = Path(__file__).resolve().parents[2]
    listed = subprocess.run(
        ["git", "-C", str(here), "ls-files", "-z"], capture_output=True, text=True, check=False
    ).stdout.split("\0")[:-1]
    lines, alarms = 0, []
    for name in listed or [str(file.relative_to(here)) for file in here.rglob("*.py")]:
        try:
            text = (here / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # pictures; deleted files
        lines += text.count("\n")
        alarms += [f"{name}:{1 + text.count(chr(10), 0, start)}" for start, _ in secrets.find_secrets(text)]
    assert lines > 10_000 and not alarms


def test_long_lines_are_read_in_no_time() -> None:
    """A notebook has images as lines of megabytes, which a pattern with quadratic time would scan for
    hours."""
    image = base64.b64encode(bytes(range(256)) * 4000).decode()
    ((start, end),) = secrets.find_secrets(f'"image/png": "{image}"\n"token": "{TOKEN}"')
    assert end - start == len(TOKEN)


def test_no_key_gets_into_a_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", str(tmp_path), *arguments], capture_output=True, text=True, check=False
        )

    def look() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "comp.engine.store.secrets"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    git("init", "-q")
    digits = "987654321098765432"
    planted = {
        "kaggle.json": "{}", ".netrc": "x", "sub/.env": "A=1", "deep/access_token": "x", "a.py": f'api_key = "abc{digits}"\n', "b.sh": f"export WANDB_API_KEY=abc{digits}\n",
        "c.ipynb": f'{{"outputs": ["KGAT_abc{digits}"]}}', "d.yaml": f"url: https://me:{digits}@host.example\n", "e.txt": f"machine x login y password {digits}\n",
    }  # fmt: skip
    for name, text in planted.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        git("add", "-f", name)
        done = look()
        assert done.returncode == 1 and name in done.stderr and digits not in done.stderr + done.stdout, name
        git("rm", "-q", "--cached", name)
    (tmp_path / "fine.py").write_text("token = read()\nkey = 'a'\n")
    git("add", "fine.py")
    assert look().returncode == 0


def test_the_hook_is_there_and_runs(tmp_path: Path) -> None:
    """tests/test_commit_hooks.py commits in a generated project, with all hooks."""
    here = Path(secrets.__file__).resolve().parents[3]
    shutil.copy(here / ".pre-commit-config.yaml", tmp_path)
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    (tmp_path / "kaggle.json").write_text("{}")
    subprocess.run(["git", "-C", str(tmp_path), "add", "-f", "kaggle.json"], check=True)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), *sys.path]),
        "PRE_COMMIT_HOME": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "pre_commit", "run", "keys"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "kaggle.json: a file of this name holds keys" in done.stdout

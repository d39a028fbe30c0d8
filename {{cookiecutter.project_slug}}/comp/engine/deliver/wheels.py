"""The wheels that a bundle carries, for a notebook without internet: packages that Kaggle's image does not
have, and timm."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from comp.engine.data import image_key
from comp.engine.data.samples import Samples
from comp.engine.errors import UserError
from comp.engine.readers import decode

PYTHON = "3.12"  # of Kaggle's image
IMAGE = {  # the packages of Kaggle's image with their versions; update it when Kaggle does
    "torch": "2.10", "torchvision": "0.25", "timm": "1.0.26", "albumentations": "2.0.8", "numpy": "2.0", "pandas": "2.2",
    "scikit-learn": "1.6", "opencv-python-headless": "4.13", "pyarrow": "18", "pydantic": "2.12", "safetensors": "0.7",
    "pillow": "11", "PyYAML": "6", "tqdm": "4.66", "scipy": "1.15", "matplotlib": "3.9", "wandb": "0.26",
}  # fmt: skip
ALWAYS = ("timm",)  # its models change between versions, and weights fit one of them
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64")


def build_wheels(folder: Path, table: Samples, raw: Path) -> list[Path]:
    """Every wheel of a bundle, written into `folder`."""
    return [_wheel(folder, name) for name in sorted({*of_imports(), *of_images(table, raw)})]


def of_imports() -> list[str]:
    """timm, and what comp/competition.py imports if Kaggle's image does not have it."""
    source = (Path(__file__).resolve().parents[2] / "competition.py").read_text()
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add((node.module or "").split(".")[0])
    distributions = metadata.packages_distributions()
    external = imported - set(sys.stdlib_module_names) - {"comp"}
    used = {distributions[name][0] for name in external if name in distributions}
    image = {name.lower() for name in IMAGE}
    return sorted({*ALWAYS, *(name for name in used if name.lower() not in image)})


def of_images(table: Samples, raw: Path) -> list[str]:
    """Packages that decode this competition's images. A suffix may be wrong or missing, so the first bytes of
    one file for each suffix are looked at too."""
    names = (name for images in table.frame["images"] for key in images for name in image_key.files(key))
    by_suffix = {Path(name).suffix.lower(): name for name in names}
    found = set()
    for suffix, name in by_suffix.items():
        try:
            start = decode.read(raw / name, name)[:132]
        except decode.DamagedImage:  # the raw files may have been deleted
            start = b""
        if suffix in (".dcm", ".dicom") or start[128:] == b"DICM":
            found.add("pydicom")
        if suffix in (".jpg", ".jpeg") or start.startswith(b"\xff\xd8\xff"):
            found.add("simplejpeg")
    return sorted(found)


def _wheel(folder: Path, name: str) -> Path:
    """A pure Python distribution is packed as it is installed here; one with compiled code is downloaded for
    Kaggle's image."""
    folder.mkdir(exist_ok=True)
    distribution = metadata.distribution(name)
    tag = re.search(r"^Tag: (.+)$", distribution.read_text("WHEEL") or "", re.MULTILINE)
    if tag is None or not tag[1].endswith("-none-any"):
        return _download(folder, name, distribution.version)
    file = folder / f"{re.sub(r'[-_.]+', '_', name)}-{distribution.version}-{tag[1]}.whl"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path in sorted(distribution.files or [], key=str):
            installed = Path(str(distribution.locate_file(path)))
            if ".." in path.parts or path.suffix == ".pyc" or not installed.is_file():
                continue
            entry = zipfile.ZipInfo(path.as_posix())  # without a time: the same bytes every time
            entry.compress_type = zipfile.ZIP_DEFLATED
            wheel.writestr(entry, installed.read_bytes())
    return file


def _download(folder: Path, name: str, version: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--no-deps", "--python-version", PYTHON]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True, check=False)
    found = sorted(folder.glob(f"{re.sub(r'[-_.]+', '_', name)}-{version}-*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            "wheel-missing",
            where=f"{name} {version}",
            what=f"not in Kaggle's image, and no wheel for Python {PYTHON} could be downloaded ({reason})",
        )
    return found[0]

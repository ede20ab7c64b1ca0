"""What is shipped: a wheel that works by itself, and files that name no machine."""

import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = Path(__file__).parents[1]


def files() -> list[Path]:
    """Every file of the project: what git knows or would add, else all but hidden folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True) if shutil.which("git") else None
    if listed is not None and listed.returncode == 0 and listed.stdout:
        found = [ROOT / name for name in listed.stdout.splitlines()]
    else:
        found = [p for p in ROOT.rglob("*") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
    return [path for path in found if path.is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in files():
        if (name := path.relative_to(ROOT)).parts[0] not in ("tests", "experiments", "colabs", ".git"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_its_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged = {path.relative_to(ROOT).as_posix() for path in files() if path.is_relative_to(ROOT / "tokjax")}
    assert packaged <= names
    assert {"tokjax/py.typed", "tokjax/bench/report.html", "tokjax/main.py"} <= packaged
    others = {name.split("/")[0] for name in names - packaged}
    assert all(name.endswith(".dist-info") for name in others), others
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_metadata_needs_what_a_user_installs(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = archive.read(name).decode()
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    assert len(required) > 10 and all(f"Requires-Dist: {line}\n" in metadata for line in required)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"Version: {version}\n" in metadata and "# tokjax" in metadata


def test_wheel_works_by_itself(wheel, tmp_path):
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    code = "import tokjax, tokjax.bench.report; print(tokjax.__file__); print(tokjax.reducers.tome(r=3))"
    env = {**os.environ, "PYTHONPATH": str(target)}
    run = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target)) and "ToMe(r=3" in done.stdout
    done = subprocess.run([sys.executable, "-m", "tokjax.main", "--list"], **run)
    assert done.returncode == 0 and "tome" in done.stdout, done.stderr


# Paths below home or temporary folders, and addresses, belong to one machine.
PLACES = re.compile(rb"(?<![\w.~-])/(?:home|root|Users|work|mnt|private)/\w|[A-Z]:\\\\?Users|\bfile://")
HOSTS = re.compile(rb"\b(?:\d{1,3}\.){3}\d{1,3}\b|\blocalhost:\d|\b[\w-]+\.(?:internal|local|lan|corp)\b")


def test_files_name_no_machine():
    found = []
    for path in files():
        content = path.read_bytes()
        if path == Path(__file__) or b"\0" in content[:1024]:
            continue
        found += [f"{path.relative_to(ROOT)}: {m[0]!r}" for rule in (PLACES, HOSTS) for m in rule.finditer(content)]
    assert not found


def test_lock_pins_versions_and_nothing_else():
    lines = (ROOT / ".ci" / "requirements.lock").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*(ROOT / "requirements.txt").read_text().splitlines(), *project["optional-dependencies"]["test"]]
    named = {re.sub(r"[-_.]+", "-", m[0]).lower() for line in wanted if (m := re.match(r"[A-Za-z0-9_.-]+", line))}
    assert len(named) > 20 and named <= pinned
    assert len(pinned) == len(lines)

"""The distributions: what is in them, what an index shows of them, and that they work without the repository.

A fresh virtual environment here has the wheel of its own, and by a path the libraries of the one that runs the tests.
A path file among those is not read, so that an editable install there is not seen.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from paths import REPOSITORY


pytest.importorskip("build", reason="needs the extra 'dist'")


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command, which must end well."""
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it: once for all the processes of a test run.

    They are built from a copy: setuptools also packs what an earlier build listed in *.egg-info.
    """
    root = tmp_path_factory.getbasetemp()
    out = (root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root) / "dist"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            unfinished, source = out.with_suffix(".unfinished"), out.with_suffix(".source")
            made = (".git", ".venv*", ".*_cache", "__pycache__", ".hypothesis", "*.egg-info", "build", "dist")
            shutil.copytree(REPOSITORY, source, ignore=shutil.ignore_patterns(*made, "outputs"))
            run(sys.executable, "-m", "build", "--no-isolation", "--outdir", unfinished, source, cwd=root)
            unfinished.rename(out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def metadata(dist: tuple[Path, Path]) -> Message:
    with zipfile.ZipFile(dist[1]) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def fresh(dist: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of a virtual environment with the wheel."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    commands = folder / "bin"
    pip = (sys.executable, "-m", "pip", "--python", commands / "python", "install", "--no-deps", "--no-index")
    run(*pip, dist[1], cwd=folder)
    (own,) = (folder / "lib").glob("python*/site-packages")
    (own / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return commands


def files_of(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def test_the_source_distribution_holds_the_repository(dist):
    if not (REPOSITORY / ".git").exists():
        pytest.skip("compares with git's files")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY).stdout.splitlines()
    tracked = {name for name in listed if (REPOSITORY / name).exists()}
    made = {name for name in files_of(dist[0]) if name == "PKG-INFO" or name.startswith("peft_reft.egg-info/")}
    assert files_of(dist[0]) - made == tracked


def test_the_wheel_holds_the_packages_and_nothing_else(dist):
    with zipfile.ZipFile(dist[1]) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    where = {name: name for name in ("peft_reft", "peft_reft_autoload", "peft_reft_cli")}
    where["integrations"] = "peft_reft/integrations"
    expected = {"peft_reft_autoload.pth"}
    for folder, package in where.items():
        for file in (REPOSITORY / folder).rglob("*"):
            if file.suffix == ".py" or file.name == "py.typed":
                expected.add(f"{package}/{file.relative_to(REPOSITORY / folder).as_posix()}")
    assert inside == expected


def test_an_index_takes_it(dist):
    pytest.importorskip("twine", reason="needs the extra 'dist'")
    run(sys.executable, "-m", "twine", "check", "--strict", *dist, cwd=dist[0].parent)


def test_metadata(metadata):
    import peft_reft

    assert metadata["Version"] == peft_reft.__version__ and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The peft-reft contributors" and len(metadata["Keywords"].split(",")) > 5
    addresses = dict(one.split(", ", 1) for one in metadata.get_all("Project-URL"))
    assert set(addresses) == {"Repository", "Documentation", "Changelog", "Issues", "Paper"}
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == peft_reft.__version__


def test_links_of_the_long_description_lead_somewhere(metadata):
    """Every link is an address, or a heading of the page itself; those into the repository name a file in it."""
    page = metadata.get_payload(decode=True).decode()
    readme = (REPOSITORY / "README.md").read_text()
    links = r"!?\[[^\]]*\]\(([^)\s]+)\)"
    assert re.sub(links, "", page).strip() == re.sub(links, "", readme).strip()
    repository = dict(one.split(", ", 1) for one in metadata.get_all("Project-URL"))["Repository"]
    inside = []
    for target, written in zip(re.findall(links, page), re.findall(links, readme), strict=True):
        assert target.startswith(("https://", "#")), target
        if target != written:
            kind = "raw" if written.endswith((".svg", ".png")) else "blob"
            assert target == f"{repository}/{kind}/v{metadata['Version']}/{written}"
            inside.append(written.partition("#")[0])
    assert len(inside) > 10 and all((REPOSITORY / name).exists() for name in inside)


def test_the_wheel_works_alone(fresh, tmp_path):
    """Away from the repository, and without axolotl: the import registers ReFT, the command runs, a YAML is read."""
    code = (
        "import peft_reft, peft_reft_cli, peft; print(peft_reft.__file__); print(peft_reft_cli.__file__); "
        "print(peft.PeftConfig.from_peft_type(peft_type='REFT', r=3).r)"
    )
    *files, rank = run(fresh / "python", "-c", code, cwd=tmp_path).stdout.split()
    assert all(Path(file).is_relative_to(fresh.parent) for file in files) and rank == "3"
    assert run(fresh / "peft-reft", "--version", cwd=tmp_path).stdout.startswith("peft-reft ")
    (tmp_path / "config.yaml").write_text("adapter: lora\n")
    block = "import sys; sys.modules['axolotl'] = None; from peft_reft_cli import main; main()"
    command = [fresh / "python", "-c", block, "positions", "config.yaml", "--text", "x"]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)
    assert "config.yaml has adapter: lora, which is not a ReFT adapter" in done.stderr


def test_tests_of_the_source_distribution_run_against_the_wheel(dist, fresh, tmp_path):
    with tarfile.open(dist[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for name in ("peft_reft", "peft_reft_autoload", "peft_reft_cli", "integrations"):
        (source / name).rename(tmp_path / f"{name}.aside")
    chosen = ["tests/positions/test_positions.py", "tests/tools/test_explain.py"]
    quick = ["-k", "not adapter and not dataset and not mistakes", "-p", "no:cacheprovider"]
    done = run(fresh / "python", "-m", "pytest", "-q", *quick, *chosen, cwd=source, HF_HUB_OFFLINE="1")
    assert re.search(r"\b\d\d+ passed", done.stdout) and "failed" not in done.stdout
    # Every file of tests can be read and its imports are met. Folders need what other tests of the stack need.
    collected = run(fresh / "python", "-m", "pytest", "-q", "--collect-only", "tests/tuner", "tests/cli", cwd=source)
    assert "error" not in collected.stdout.splitlines()[-1]


# -- the release workflow and the forms of the repository -------------------------------------------------------------


def test_what_stops_a_release(dist):
    spec = importlib.util.spec_from_file_location("check_release", REPOSITORY / "scripts" / "check_release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with zipfile.ZipFile(dist[1]) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    (repository,) = re.findall(r"^Project-URL: Repository, (.+)$", text, re.MULTILINE)
    (version,) = re.findall(r"^Version: (.+)$", text, re.MULTILINE)
    assert module.faults(dist[1], f"v{version}", repository) == []
    found = module.faults(dist[1], "v9", "https://git.example/another")
    assert len(found) == 2 and found[0].startswith("The tag is v9") and "REPOSITORY = " in found[1]


def test_the_release_workflow():
    """What is published is what was tested, it is built once, and one job alone may publish."""
    flow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "release.yml").read_text())
    jobs = flow["jobs"]
    assert jobs["test"]["needs"] == "build" and jobs["publish"]["needs"] == ["build", "test"]
    builds = [name for name, job in jobs.items() if any("-m build" in step.get("run", "") for step in job["steps"])]
    assert builds == ["build"]
    assert flow["permissions"] == {"contents": "read"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["environment"] == "pypi"
    assert [name for name, job in jobs.items() if "permissions" in job] == ["publish"]
    named = re.findall(r"tests/[\w/.]+", str(jobs["test"]["steps"]))
    assert named and all((REPOSITORY / name).exists() for name in named)


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_forms_ask_for_the_environment(name):
    form = yaml.safe_load((REPOSITORY / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    (asked,) = (field for field in form["body"] if field.get("id") == "env")
    assert "`peft-reft env`" in asked["attributes"]["label"] and asked["validations"]["required"]

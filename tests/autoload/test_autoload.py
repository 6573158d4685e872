"""An import of PEFT brings ReFT's, and nothing else that a process does is touched.

Most tests run a Python without site-packages on stand-ins of the libraries, so that each takes milliseconds. The last
ones use this environment, and the libraries themselves.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from paths import REPOSITORY

from peft_reft_autoload.run import STARTUP, command_line, environment


PTH = REPOSITORY / "peft_reft_autoload" / "peft_reft_autoload.pth"
# Stand-ins by path. Each says that it was imported.
LIBRARIES = {
    "peft/__init__.py": "print('peft begins')\nimport time; time.sleep(0.02)\nprint('peft ends')",
    "peft_reft/__init__.py": "import peft\nprint('peft_reft')\nfrom peft_reft_autoload import serve\nserve()",
    "peft_reft/tools/__init__.py": "",
    "peft_reft/tools/trainers.py": (
        "def serve_trainers():\n    from transformers.trainer import Trainer\n    print('serves')"
    ),
    "peft_reft/integrations/__init__.py": "",
    "peft_reft/integrations/lm_eval.py": (
        "def install():\n    from lm_eval.models.huggingface import HFLM\n    print('tells')"
    ),
    "transformers/__init__.py": "",
    "transformers/trainer.py": "import peft\nclass Trainer: pass\nprint('trainer')",
    "lm_eval/__init__.py": "",
    "lm_eval/models/__init__.py": "",
    "lm_eval/models/huggingface.py": "class HFLM: pass\nprint('harness')",
}


@pytest.fixture
def libraries(tmp_path) -> Path:
    for name, code in LIBRARIES.items():
        file = tmp_path / "libraries" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    return tmp_path / "libraries"


def python(libraries: Path, code: str, *options: str, start: bool = True, **variables: str) -> list[str]:
    """The lines that a program prints, in a Python that finds the stand-ins alone. `start`: runs the .pth file first,
    as a start of Python does."""
    code = (f"exec({PTH.read_text()!r})\n" if start else "") + code
    paths = os.pathsep.join([str(libraries), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-S", *options, "-c", code],
        env={"PYTHONPATH": paths, **variables},
        cwd=libraries.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), *(line for line in done.stderr.splitlines() if "peft_reft" in line)]


IMPORTED = ["peft begins", "peft ends", "peft_reft"]


def test_peft_brings_peft_reft(libraries):
    assert python(libraries, "import peft") == IMPORTED
    assert python(libraries, "import peft_reft") == IMPORTED
    assert python(libraries, "import importlib; importlib.import_module('peft')") == IMPORTED
    assert python(libraries, "from peft import __name__") == IMPORTED
    assert python(libraries, "import peft", start=False) == ["peft begins", "peft ends"]


@pytest.mark.parametrize("value", ["0", "false", "No", " off "])
def test_the_switch(libraries, value):
    assert python(libraries, "import peft", PEFT_REFT_AUTOLOAD=value) == ["peft begins", "peft ends"]
    late = f"import os; os.environ['PEFT_REFT_AUTOLOAD'] = {value!r}\nimport peft"
    assert python(libraries, late) == ["peft begins", "peft ends"]
    off = "import sys; print([f for f in sys.meta_path if 'peft_reft' in type(f).__module__])"
    assert python(libraries, off, PEFT_REFT_AUTOLOAD=value) == ["[]"]


def test_nothing_happens_without_peft(libraries):
    code = "import transformers, json, importlib.util as u\nu.find_spec('peft'); u.find_spec('nothing')"
    assert python(libraries, code) == []
    assert python(libraries, "import lm_eval.models.huggingface") == ["harness"]


def test_what_is_imported_before_stays_as_it_would_be(libraries):
    code = f"import peft\nexec({PTH.read_text()!r})"
    assert python(libraries, code, start=False) == IMPORTED
    loader = (
        "import peft, sys; print(type(peft.__spec__.loader).__name__, 'exec_module' in vars(peft.__spec__.loader))"
    )
    assert python(libraries, loader)[-1] == "SourceFileLoader False"


def test_reload(libraries):
    code = "import peft, importlib\nassert importlib.reload(peft) is peft"
    assert python(libraries, code) == [*IMPORTED, "peft begins", "peft ends"]


def test_trainer_and_harness_are_served_once_their_own_import_is_over(libraries):
    # Trainer's import imports PEFT, and with it peft_reft, before there is a class Trainer.
    assert python(libraries, "import transformers.trainer") == [*IMPORTED, "trainer", "serves"]
    assert python(libraries, "import peft, transformers.trainer") == [*IMPORTED, "trainer", "serves"]
    assert python(libraries, "import lm_eval.models.huggingface, peft") == ["harness", *IMPORTED, "tells"]
    assert python(libraries, "import peft, lm_eval.models.huggingface") == [*IMPORTED, "harness", "tells"]
    # the plain import, where the autoload is off
    plain = python(libraries, "import peft_reft, lm_eval.models.huggingface", PEFT_REFT_AUTOLOAD="0")
    assert plain == [*IMPORTED, "harness", "tells"]


@pytest.mark.parametrize("fault", ["raise RuntimeError('too old')", "import nothing", "syntax error"])
def test_a_broken_peft_reft_is_a_warning(libraries, fault):
    (libraries / "peft_reft" / "__init__.py").write_text(fault)
    for options in ((), ("-W", "error")):  # where warnings are errors, the text goes to the standard error
        lines = python(libraries, "import peft", *options)
        assert lines[:2] == ["peft begins", "peft ends"]
        assert "peft_reft, which peft needs for ReFT adapters, failed: " in lines[2], lines
        assert "PEFT_REFT_AUTOLOAD=0" in lines[2]


def test_peft_fails_as_it_would(libraries):
    (libraries / "peft" / "__init__.py").write_text("import torch_that_is_missing")
    code = "try: import peft\nexcept ModuleNotFoundError as error: print(error.name)\nprint('peft' in sys.modules)"
    assert python(libraries, f"import sys\n{code}") == ["torch_that_is_missing", "False"]
    shutil.rmtree(libraries / "peft")
    assert python(libraries, f"import sys\n{code}") == ["peft", "False"]


def test_the_pth_file_raises_nothing_without_the_package(libraries):
    # One line that begins with "import": Python's site module executes no other.
    text = PTH.read_text()
    assert text.count("\n") == 1 and text.startswith("import ")
    code = f"import sys; sys.path[:] = []\nexec({text!r})\nprint('goes on')"
    assert python(libraries, code, start=False) == ["goes on"]


def test_threads(libraries):
    code = """
import sys, threading
gate = threading.Barrier(8)
def work(name):
    gate.wait()
    __import__(name)
    assert hasattr(sys.modules[name], "__file__")
threads = [threading.Thread(target=work, args=(name,)) for name in ["peft"] * 4 + [OTHER] * 4]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
"""
    for other in ("peft", "peft_reft", "transformers.trainer"):
        lines = python(libraries, code.replace("OTHER", repr(other)))
        assert [lines.count(line) for line in IMPORTED] == [1, 1, 1], (other, lines)
        assert len(lines) == (5 if other == "transformers.trainer" else 3), lines


def test_zipped_packages(libraries, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name, code in LIBRARIES.items():
            archive.writestr(name, code)
    assert python(tmp_path / "all.zip", "import peft") == IMPORTED


def test_subinterpreters(libraries):
    module = next(
        (name for name in ("_interpreters", "_xxsubinterpreters") if __import__("importlib").util.find_spec(name)),
        None,
    )
    if module is None:
        pytest.skip("this Python has no module for subinterpreters")
    inner = f"exec({PTH.read_text()!r})\nimport peft, sys\nsys.stdout.flush()"
    code = f"import {module} as i\nnumber = i.create()\ni.run_string(number, {inner!r})"
    assert python(libraries, code) == IMPORTED


def test_other_hooks_may_search_too(libraries):
    """A hook that searches by `sys.meta_path`, as this one does, and one of an old kind: neither leads to a circle."""
    code = """
import sys
class Searching:
    calls = 0
    def find_spec(self, name, path=None, target=None):
        if name == "peft":
            Searching.calls += 1
            others = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
            return next(filter(None, (f.find_spec(name, path) for f in others)), None)
for place in PLACES:
    sys.meta_path.insert(place, Searching())
import peft
assert Searching.calls <= 2, Searching.calls
"""
    for places in ((0,), (1,)):
        assert python(libraries, code.replace("PLACES", repr(places))) == IMPORTED


# -- peft-reft run ----------------------------------------------------------------------------------------------------


def test_run_brings_it_where_no_pth_file_does(libraries, tmp_path, monkeypatch):
    """In a Python without the .pth file, as after `pip install --target`, and in a process below it."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(libraries), str(REPOSITORY)]))
    monkeypatch.setenv("PEFT_REFT_AUTOLOAD", "0")
    (libraries / "sitecustomize.py").write_text("print('the site has its own')")
    script = tmp_path / "script.py"
    script.write_text("import sys, subprocess\nimport peft\nprint(sys.argv[1:])\n")
    nested = tmp_path / "nested.py"
    nested.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, {str(script)!r}, 'below'])")
    monkeypatch.setattr(sys, "executable", sys._base_executable)

    def printed(*words: str, **options) -> list[str]:
        done = subprocess.run(
            command_line(list(words)), capture_output=True, text=True, timeout=60, cwd=tmp_path, **options
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    own = "the site has its own"
    assert printed(str(script), "a", "--help", env=environment()) == [own, *IMPORTED, "['a', '--help']"]
    assert printed("-m", "script", "b", env=environment()) == [own, *IMPORTED, "['b']"]
    assert printed("-c", "import peft", env=environment()) == [own, *IMPORTED]
    assert printed(str(nested), env=environment()) == [own, own, *IMPORTED, "['below']"]
    assert printed(str(script), env=dict(os.environ)) == [own, "peft begins", "peft ends", "[]"]
    (libraries / "sitecustomize.py").unlink()
    assert printed("-c", "import peft", env=environment()) == IMPORTED


def test_command_lines(tmp_path, monkeypatch):
    here = Path(sys.executable).parent
    assert command_line(["-m", "lm_eval", "--x"]) == [sys.executable, "-m", "lm_eval", "--x"]
    assert command_line(["python", "-V"]) == [str(here / "python"), "-V"]
    monkeypatch.setenv("PATH", str(tmp_path))
    tool = tmp_path / "tool-of-another-folder"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert command_line([tool.name, "a"]) == [str(tool), "a"]
    with pytest.raises(ValueError, match="'missing.py'.*train.py"):
        command_line(["missing.py"])
    assert environment()["PYTHONPATH"].split(os.pathsep)[0] == str(STARTUP)


# -- this environment -------------------------------------------------------------------------------------------------


def started(*options: str, code: str = "", **variables: str) -> set[str]:
    """The modules of a Python that has just started, and run a line of code."""
    done = subprocess.run(
        [sys.executable, *options, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_a_start_of_python_imports_this_one_module():
    # Python's own start imports os, which -S leaves out.
    assert started("-S", code=PTH.read_text()) - started("-S", code="import os") == {"peft_reft_autoload"}


@pytest.mark.parametrize("options", [(), ("-I",), ("-s",), ("-E",)])
def test_this_environment_starts_with_it(options):
    assert "peft_reft_autoload" in started(*options), "there is no .pth file here: install the project again"
    assert "peft_reft_autoload" not in started("-S", *options)


LINES = ("import os", "import os\n" + PTH.read_text())


def start_times(pairs: int) -> list[float]:
    """Processor time of `python -c pass` in ms, without the .pth file's line and with it: medians of pairs."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * pairs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-S", "-c", LINES[number % 2]], env={"PYTHONPATH": str(REPOSITORY)}, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times[number % 2].append(1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    return [statistics.median(one) for one in times]


def test_a_start_of_python_takes_no_longer():
    without, with_line = start_times(pairs=40)
    print(f"python -c pass: {without:.2f} ms, and {with_line - without:+.2f} ms with the line of the .pth file")
    assert with_line - without < 3  # an import of json takes about 3 ms, of typing 6, of torch thousands

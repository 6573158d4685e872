"""The console command: quick where no model is needed, JSON for scripts, errors that name the option and the value."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import typer
from models import chat_model, tokenizer
from paths import REPOSITORY
from peft import get_peft_model
from typer.testing import CliRunner

from benchmarks.startup import ASKED, beyond_python
from peft_reft import ReftConfig, explain_positions
from peft_reft.evaluation.tasks import describe_tasks
from peft_reft.tools import formats
from peft_reft_cli import app, main, options


OPENING = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, an adapter, and rows of data."""
    root = tmp_path_factory.mktemp("cli")
    base = chat_model()
    base.save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    base.name_or_path = str(root / "base")
    config = ReftConfig(r=2, positions="f1+l2", response_template=OPENING)
    get_peft_model(base, config).save_pretrained(root / "adapter")
    (root / "rows.jsonl").write_text(json.dumps({"prompt": "Why? ", "completion": "No."}) + "\n")
    (root / "none.jsonl").write_text("\n")
    return root


def output(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[str, str]:
    """Standard output and standard error of a command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["peft-reft", *map(str, arguments)])
    with pytest.raises(SystemExit):
        main()
    shown = capfd.readouterr()
    return shown.out, shown.err


# -- quick ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ASKED, ids=" ".join)
def test_half_a_second_beyond_python(asked):
    """Processor time: other work on the machine does not count. `benchmarks.startup` checks the exit status."""
    assert beyond_python(asked) < 0.5


def test_nothing_large_is_imported_before_a_command_runs():
    large = ("torch", "transformers", "peft", "peft_reft", "huggingface_hub", "numpy", "yaml", "rich")
    code = f"import sys, peft_reft_cli; print([name for name in {large} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_help_says_nothing_else():
    done = subprocess.run([sys.executable, "-m", "peft_reft_cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("Usage: ")
    assert "..." not in done.stdout.partition("Commands:")[2]  # each subcommand is said in a line that fits


def test_the_version_is_the_packages():
    import peft_reft

    assert CliRunner().invoke(app, ["--version"]).output == f"peft-reft {peft_reft.__version__}\n"


def test_names_that_are_known_without_an_import():
    assert options.TEMPLATES == formats.TEMPLATES
    assert options.describe_tasks() == describe_tasks()


@pytest.mark.parametrize(
    "words, expected",
    [
        ("peft-reft pos", ["positions"]),
        ("peft-reft evaluate comm", ["commonsense", "commonsense_170k"]),
        ("peft-reft prepare SV", ["SVAMP"]),
        ("peft-reft positions x --template c", ["chat", "completion"]),
    ],
)
def test_a_shell_completes_words(words, expected):
    variables = {
        "_PEFT_REFT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = str(Path(sys.executable).with_name("peft-reft"))
    done = subprocess.run([command], env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.stdout.split() == expected, done.stderr


def test_the_page_lists_what_the_command_takes():
    spec = importlib.util.spec_from_file_location("cli_page", REPOSITORY / "scripts" / "cli_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    group = typer.main.get_command(app)
    if group.commands["convert"].params[0].help is None:
        pytest.skip("this Typer loses the help of arguments under this Click (seen: 0.25.1 under 8.5.1)")
    written = module.TARGET.read_text()
    assert written == module.page(written), "run: python scripts/cli_page.py"
    for name in ("prepare", "evaluate", "positions", "convert", "env", "run"):
        assert f"## `peft-reft {name} " in written


# -- JSON -------------------------------------------------------------------------------------------------------------


def test_positions_as_json(folder, capfd, monkeypatch):
    rows = folder / "rows.jsonl"
    out, err = output(
        capfd, monkeypatch, "positions", folder / "adapter", "--dataset", rows, "--text", "Why? No.", "--json"
    )
    found = json.loads(out)
    assert (found["positions"], found["template"]) == ("f1+l2", "completion")
    assert f"{rows}: rows read as --template completion" in err
    config = ReftConfig.from_pretrained(str(folder / "adapter"))
    batch = formats.pad_rows([{"input_ids": tokenizer()("Why? No.")["input_ids"]}])
    (known,) = explain_positions(config, tokenizer(), batch, quiet=True)
    (one,) = found["text"]
    assert (one["ids"], one["first"], one["last"], one["source"]) == (known.ids, known.first, known.last, known.source)
    assert one["warnings"] == known.warnings and len(found["dataset"]) == 1


def test_convert_as_json(folder, tmp_path):
    arguments = ["convert", folder / "adapter", tmp_path / "out", "--to", "pyreft", "--json"]
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exception is None, done.exception
    found = json.loads(done.stdout)
    assert (found["folder"], found["from"], found["to"]) == (str(tmp_path / "out"), "peft", "pyreft")
    assert (found["intervention"], found["r"], found["positions"]) == ("loreft", 2, "f1+l2")


# -- models that are not there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evaluate", "mawps", "--base", "./nowhere"], "--base ./nowhere: there is no such folder, and no name on"),
        (
            ["evaluate", "mawps", "--base", "no/where"],
            "--base no/where: there is no such folder, and it is not in",
        ),
        (["evaluate", "mawps", "--base", "adapter"], "--base adapter: the folder has no config.json"),
        (["evaluate", "mawps", "--base", "rows.jsonl"], "--base rows.jsonl is a file. Give the folder"),
        (["evaluate", "mawps", "--base", "base", "--adapter", "a=b/c"], "--adapter b/c: there is no such folder"),
        (["positions", "adapter", "--text", "x", "--tokenizer", "no/where"], "--tokenizer no/where: there is no such"),
        (["positions", "adapter", "--text", "x", "--tokenizer", "adapter"], "--tokenizer adapter: no tokenizer could"),
        (["positions", "nowhere", "--text", "x"], "ADAPTER_OR_CONFIG nowhere: there is no such folder"),
        (["positions", "nowhere.yaml", "--text", "x"], "nowhere.yaml: there is no such file"),
        (["positions", "adapter", "--dataset", "nowhere.jsonl"], "--dataset nowhere.jsonl: there is no such file"),
        (["positions", "adapter", "--dataset", "none.jsonl"], "--dataset none.jsonl has no rows"),
        (["convert", "base", "out", "--base-model", "no/where", "--positions", "l1"], "--base-model no/where: there"),
    ],
)
def test_an_error_names_the_option_and_the_value(folder, arguments, message, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    _, error = output(capfd, monkeypatch, *arguments)
    (line,) = [line for line in error.splitlines() if line.startswith("peft-reft: ")]
    assert line.startswith(f"peft-reft: {message}") and "http" not in line


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does for a gated, a missing and an incomplete repository, by the repository's name."""

    ANSWERS = {"gated": (403, "GatedRepo"), "missing": (404, "RepoNotFound"), "incomplete": (404, "EntryNotFound")}

    def do_HEAD(self) -> None:
        status, code = self.ANSWERS[self.path.split("/")[2]]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


@pytest.mark.parametrize(
    "name, reason",
    [
        ("gated", "the Hub asks you to accept the model's terms there"),
        ("missing", "the Hub has none of this name"),
        ("incomplete", "on the Hub it has no config.json"),
        ("unreached", "the Hub itself did not answer"),
    ],
)
def test_what_the_hub_says_in_words(name, reason):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    if name == "unreached":
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    code = f"from peft_reft_cli.options import check_model; check_model('--base', 'org/{name}')"
    variables = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    if name != "unreached":
        server.shutdown()
        server.server_close()
    assert f"ValueError: --base org/{name}: there is no such folder, and " in done.stderr
    assert reason in done.stderr.splitlines()[-1]


# -- rows and YAMLs ---------------------------------------------------------------------------------------------------

TURNS = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Blue."},
]


@pytest.mark.parametrize(
    "row, template",
    [
        ({"messages": TURNS}, "chat"),
        ({"conversations": TURNS, "id": 1}, "chat"),
        ({"prompt": "Why?", "completion": "No."}, "completion"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:2]}, "completion"),
        ({"instruction": "Why?", "input": "", "output": "No."}, "alpaca"),
        ({"text": "Why?"}, "text"),
    ],
)
def test_rows_are_known_by_their_fields(row, template):
    assert formats.template_of(row) == template
    assert formats.encode_row(row, template, tokenizer())["input_ids"]


def test_rows_that_leave_a_doubt():
    with pytest.raises(ValueError, match="instruction, output, text, which fit the templates alpaca, text"):
        formats.template_of({"instruction": "a", "output": "b", "text": "c"})
    with pytest.raises(ValueError, match="fields prompt, chosen, rejected, which no template reads"):
        formats.template_of({"prompt": "a", "chosen": "b", "rejected": "c"})


def test_a_completion_of_messages_is_the_only_answer():
    tokens = tokenizer()
    row = formats.encode_row({"prompt": TURNS[:3], "completion": TURNS[3:]}, "completion", tokens)
    assert row["input_ids"] == formats.encode_row({"messages": TURNS}, "chat", tokens)["input_ids"]
    answer = [label for label in row["labels"] if label != -100]
    assert tokens.decode(answer).startswith("Blue.") and row["labels"][-len(answer) :] == answer


def yaml_shown(folder: Path, text: str, *, blocked: str = "axolotl") -> subprocess.CompletedProcess[str]:
    """`peft-reft positions` of a YAML, in a process in which axolotl can't be imported."""
    (folder / "config.yaml").write_text(text)
    code = f"import sys; sys.modules[{blocked!r}] = None; from peft_reft_cli import main; main()"
    command = [sys.executable, "-c", code, "positions", "config.yaml", "--dataset", "rows.jsonl", "--json"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_yaml_is_read_without_axolotl(folder):
    keys = "adapter: reft\nbase_model: base\nlora_r: 4\nreft:\n  positions: f2+l1\n  debug: true\n"
    done = yaml_shown(folder, keys)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (row,) = found["dataset"]
    assert found["positions"] == "f2+l1" and row["first"] == [0, 1] and row["last"] == [row["prompt"][-1]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("adapter: lora\nbase_model: base\n", "config.yaml has adapter: lora, which is not a ReFT adapter"),
        ("adapter: loraft\nbase_model: base\n", "config.yaml has adapter: loraft"),
        ("adapter: loreftt\n", "adapter: loreftt is not a ReFT adapter. They are loreft"),
        ("adapter: loreft\nreft: {position: l1}\n", "config.yaml has reft: position, which ReFT does not know"),
        ("adapter: loreft\nreft: {positions: 7}\n", "positions=7"),
        (
            "adapter: loreft\nbase_model: base\nchat_template: llava\ndatasets: [{path: x, type: chat_template}]\n",
            "config.yaml names a chat_template, which axolotl finds: pip install 'peft-reft[axolotl]'",
        ),
        ("- 1\n", "config.yaml holds no keys of an axolotl config, but list"),
    ],
)
def test_a_wrong_yaml(folder, text, message):
    done = yaml_shown(folder, text)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


# -- env --------------------------------------------------------------------------------------------------------------


def test_env(folder, capfd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a secret")
    monkeypatch.setenv("HF_HUB_CACHE", "/somewhere")
    out, _ = output(capfd, monkeypatch, "env", folder / "adapter", "--json")
    found = json.loads(out)
    assert found["versions"]["torch"].startswith("2.") and found["peft_reft"]["imports"] == "yes"
    assert found["variables"]["HF_HUB_CACHE"] == "/somewhere" and "secret" not in out
    assert found["adapter"]["settings"]["positions"] == "f1+l2"
    assert found["adapter"]["files"]["adapter_model.safetensors"] > 0
    text, _ = output(capfd, monkeypatch, "env", folder / "adapter")
    assert "    positions: f1+l2" in text and "  imports: yes" in text
    _, error = output(capfd, monkeypatch, "env", folder / "base")
    assert "ADAPTER" in error and "no adapter_config.json" in error


def test_env_of_a_broken_installation():
    code = "import sys; sys.modules['peft'] = None; from peft_reft_cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "env", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "ModuleNotFoundError" in found["peft_reft"]["imports"] and found["versions"]["peft"]

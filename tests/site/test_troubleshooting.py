"""docs/troubleshooting.md: what it quotes stands in the code, and what the code says on a user's way is quoted."""

from __future__ import annotations

import re

import pytest
from messages import GAP, Site, closed, sites, texts
from paths import REPOSITORY


PAGE = REPOSITORY / "docs" / "troubleshooting.md"
# Errors in the use of ReFT. What evaluation and conversion say is in the page too, in groups.
ON_A_USERS_WAY = ("peft_reft/tuner/", "peft_reft/tools/", "peft_reft_autoload/", "peft_reft_cli/", "integrations/")
# Places whose text is another's, or that no user sees. Each by file and function.
ELSEWHERE = {
    "integrations/axolotl/__init__.py:__getattr__": "Python's own, for a name that the module lacks",
    "integrations/vllm/plugin.py:process": "the refusal of another version of vLLM, by require_parameters' words",
    "peft_reft/tuner/chat_template.py": "reasons, which the message 'no response template was found' quotes",
    "peft_reft/tuner/rules.py:tokenizer": "a reason, like those",
}
CODE = re.compile(r"(`+) ?(.*?) ?\1")


def quotes() -> list[str]:
    """The texts of the page's first columns, PEFT's own left out."""
    found = []
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            cell = line.split(" | ")[0].removeprefix("| ")
            found += [code[2] for part in cell.split("<br>") if (code := CODE.match(part))]
    return [quote for quote in found if "KeyError" not in quote]


def said_in_code() -> list[str]:
    return [*texts(), *(site.text for site in sites())]


def stands_in(quote: str, text: str) -> bool:
    """Whether a text has the quote's words in their order, with a value at least where the quote has a gap."""
    pattern = f"{GAP}.*?".join(re.escape(part) for part in quote.strip(GAP).split(GAP))
    return re.search(pattern, text, re.DOTALL) is not None


def test_the_page_quotes_the_code():
    said = said_in_code()
    strangers = [quote for quote in quotes() if not any(stands_in(quote, text) for text in said)]
    assert not strangers, "No text of the code says this any more. Mend the page:\n" + "\n".join(strangers)


def is_quoted(site: Site, quoted: list[str]) -> bool:
    return any(stands_in(quote, site.text) for quote in quoted)


def test_every_error_on_a_users_way_is_on_the_page():
    quoted = quotes()
    missing = [
        site
        for site in sites()
        if site.file.startswith(ON_A_USERS_WAY)
        and site.text
        and "is not allowed. Allowed" not in site.text  # ReftConfig's refusals have one entry for all fields
        and not is_quoted(site, quoted)
        and f"{site.file}:{site.function}" not in ELSEWHERE
        and site.file not in ELSEWHERE
    ]
    assert not missing, "Add these to docs/troubleshooting.md, or to ELSEWHERE with a reason:\n" + "\n".join(
        f"{site.file}:{site.line} {site.text}" for site in missing
    )


@pytest.mark.parametrize(
    "quote, text, expected",
    [
        ("r=… is above the width", f"r={GAP} is above the width {GAP} of {GAP}", True),
        ("r=… is above the width", "r=4 is beyond the width", False),
        ("… has shape …, but", f"{GAP} has shape {GAP}, but the batch", True),
        ("a … c", "a b c", False),
    ],
)
def test_a_quote_is_found_by_its_words_and_gaps(quote, text, expected):
    assert stands_in(quote, text) == expected


def test_the_reader_of_messages_joins_what_the_code_splits():
    said = {site.text for site in sites()}
    assert closed(f"a{GAP}{GAP}b") == f"a{GAP}b"
    assert any(text.startswith(f"adapter_name={GAP} is not possible: PEFT makes it a part of") for text in said)
    assert len(said) > 150 and len(quotes()) > 100

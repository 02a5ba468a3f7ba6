"""Every code block of the README, of CONTRIBUTING and of the guide does what it says.

A page's Python blocks run in order in one namespace, its shell blocks in between, all in one folder that is empty at
first; a block whose title is a file's name is that file too. A comparison that leaves the budget or the executor open
gets the smallest budget, and runs in this process. What cannot run here
stands after a comment `<!-- not run: why -->`, and may only be one of a few commands.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from fairtrial import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMALLEST = {"--trials": "1", "--seeds": "2", "--executor": "inline"}
NOT_RUN = (
    "make ",
    "python -m pip ",
    "python -m venv ",
    "fairtrial calibrate ",
    "fairtrial check ",
    "fairtrial models ",
    "fairtrial compare smollm2-",
    "tensorboard ",
    "ray ",
    "export ",
)
ELSEWHERE = ("--executor ray", "postgresql://")  # their own tests start a cluster and a server


@dataclass(frozen=True)
class Block:
    language: str
    file: str | None
    code: str
    line: int
    not_run: bool


def blocks(page: Path) -> Iterator[Block]:
    said = ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            language, _, title = token.info.partition(" title=")
            not_run = said.startswith("<!-- not run: ")
            yield Block(language, title.strip('"') or None, token.content, token.map[0] + 1, not_run)
        said = token.content if token.type == "html_block" else ""


def commands(block: Block) -> list[list[str]]:
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def with_smallest_budget(words: list[str]) -> list[str]:
    if words[0] in ("compare", "report"):
        for option, value in SMALLEST.items():
            words = words if option in words else [*words, option, value]
    return words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_works(page, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAIRTRIAL_STORE", str(tmp_path / "kept.db"))
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.not_run or block.language == "text":
            continue
        if block.file is not None:
            Path(block.file).write_text(block.code, encoding="utf-8")
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
            continue
        assert block.language == "bash", f"line {block.line}: say what the block is: python, bash or text"
        for program, *words in commands(block):
            assert program == "fairtrial", f"line {block.line}: no shell is here to run {program}"
            with pytest.raises(SystemExit) as end:
                cli.main(with_smallest_budget(words))
            assert end.value.code == 0, f"line {block.line}: {' '.join(words)}: {capfd.readouterr().err}"


def test_only_a_few_commands_are_not_run():
    marked = [(page, block) for page in PAGES for block in blocks(page) if block.not_run]
    assert marked
    for page, block in marked:
        assert block.language == "bash", f"{page}, line {block.line}"
        for words in commands(block):
            command = " ".join([*words, ""])
            left_out = command.startswith(NOT_RUN) or any(part in command for part in ELSEWHERE)
            assert left_out, f"{page}, line {block.line}: {command}"

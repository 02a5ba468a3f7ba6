import csv
import io
import json
import re
from dataclasses import asdict, replace

import made
import pytest

from fairtrial.contract import BadInput, Choice
from fairtrial.report.formats import FORMATS, as_text, csv_text, json_text, markdown
from fairtrial.report.origin import Origin
from fairtrial.report.page import page


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_every_format_is_there_and_another_is_refused():
    found = made.usual()
    assert list(FORMATS) == ["html", "md", "csv", "json"]
    assert as_text(found, made.ORIGIN, "html") == page(found, made.ORIGIN)
    for form in FORMATS:
        assert as_text(found, made.ORIGIN, form) == as_text(made.usual(), made.ORIGIN, form)
    with pytest.raises(BadInput, match="no format 'pdf'; there is: html, md, csv, json"):
        as_text(found, made.ORIGIN, "pdf")


def test_markdown_has_the_verdict_table_and_what_must_be_known():
    found = made.usual()
    text = markdown(found, made.ORIGIN)
    table = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in table} == {10}
    assert [row[0] for row in table[2:]] == ["A", "Better", "Worse", "Alike", "Broken"]
    assert [row[4] for row in table[2:]] == ["", "better", "worse", "equivalent", "undecided"]
    better = found.recipes[1].difference
    assert table[3][2] == rf"{better.mean:+.4f} \[{better.low:+.4f}, {better.high:+.4f}\]"
    assert "- Better is better than A." in text
    assert "- Broken, seed 5: died (RuntimeError: it broke)" in text
    assert "```sh\nfairtrial compare digits optimizer=A,B --trials 3 --seeds 8\n```" in text


def test_markdown_takes_no_name_for_markup():
    names = ["A|B", "<script>", "a\nb", "[x](http://evil.example)", "`c`", "# d", "**e**", "\\"]
    odd = made.comparison({name: [made.finished(n / 10) for n in range(6)] for name in names})
    text = markdown(odd, Origin("run ```\nit", {"python": "3 | 4"}))
    table = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in table} == {10}
    assert [row[0] for row in table[2:]] == [
        r"A\|B",
        r"\<script\>",
        "a b",
        r"\[x\](http&#8203;://evil.example)",
        r"\`c\`",
        r"\# d",
        r"\*\*e\*\*",
        "\\\\",
    ]
    assert "````sh\nrun ```\nit\n````" in text


def test_csv_has_a_row_for_each_recipe_with_figures_that_read_back():
    found = made.usual()
    rows = list(csv.DictReader(io.StringIO(csv_text(found, made.ORIGIN))))
    assert [row["recipe"] for row in rows] == ["A", "Better", "Worse", "Alike", "Broken"]
    for row, judged in zip(rows, found.recipes, strict=True):
        assert float(row["mean"]) == judged.mean
        assert json.loads(row["values"]) == judged.values
        assert json.loads(row["choices"]) == judged.recipe.as_json()
        assert len(json.loads(row["tuned"])) == 8
        assert (row["verdict"] or None) == judged.verdict
        for key, value in asdict(judged.difference).items() if judged.difference else ():
            assert float(row["difference" if key == "mean" else key]) == value
    assert rows[0]["difference"] == ""
    assert [row["code"] for row in rows] == ["0123abcd", "", "", "", ""]
    assert rows[4]["failed"] == "3"


def test_a_spreadsheet_takes_no_name_for_a_formula():
    odd = made.comparison({"=cmd|'/C calc'!A0": [made.finished(0.5)] * 6, "@B": [made.finished(0.4)] * 6}, task="+1")
    rows = list(csv.DictReader(io.StringIO(csv_text(odd, made.ORIGIN))))
    assert [row["recipe"] for row in rows] == ["'=cmd|'/C calc'!A0", "'@B"]
    assert rows[0]["task"] == "'+1"
    assert float(rows[1]["difference"]) == pytest.approx(-0.1)


def test_json_is_what_compare_prints_and_where_it_comes_from():
    found = made.usual()
    told = json.loads(json_text(found, made.ORIGIN))
    origin = told.pop("origin")
    assert told == json.loads(json.dumps(found.as_json()))
    assert origin == {
        "command": made.ORIGIN.command,
        "environment": dict(made.ORIGIN.environment),
        "code": ["0123abcd"],
    }


def test_intervals_without_ends_are_left_open():
    few = made.comparison({"A": [made.finished(v) for v in (0.5, 0.6)], "B": [made.finished(v) for v in (0.7, 0.9)]})
    row = list(csv.DictReader(io.StringIO(csv_text(few, made.ORIGIN))))[1]
    assert (row["low"], row["high"]) == ("", "")
    assert json.loads(json_text(few, made.ORIGIN))["recipes"][1]["difference"]["low"] is None
    assert "| +0.2500 |" in markdown(few, made.ORIGIN)


def test_letters_of_all_languages_pass():
    found = made.usual()
    odd = replace(
        found.recipes[1], name="Ünïcøde 学习", recipe=replace(found.recipes[1].recipe, choices={"o": Choice("学习")})
    )
    found = replace(found, recipes=[found.recipes[0], odd, *found.recipes[2:]])
    for form in FORMATS:
        assert "学习" in as_text(found, made.ORIGIN, form)

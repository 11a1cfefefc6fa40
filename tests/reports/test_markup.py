"""HTML: text from files stays text."""

import json
import re

from tests.reports.pages import Page
from vit_jax.reports.page import write
from vit_jax.reports.runs import read_run


def test_run_name_is_escaped(run, unrendered):
    page = Page(write(run.rename(run.with_name("<b>&'\"$x_1$"))))
    assert "<b>&'\"$x_1$" in page.text and "b" not in page.tags


def test_text_from_files_is_escaped(run, unrendered):
    meta = json.loads((run / "final.json").read_text())
    meta["class_names"] = ["a\u202eb", "\x1b[31m", "<i>", *meta["class_names"][3:]]
    meta["source_sha256"] = "\u200f<i>"
    (run / "final.json").write_text(json.dumps(meta))
    (run / "environment.json").write_text(json.dumps({"jax\u202e": "\x9b<i>", "command": "\x00"}))
    path = write(run.rename(run.with_name("tiny\u202e\x1b")))
    page = Page(path)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e]", page.source)
    assert "i" not in page.tags and "tiny\\u202e\\x1b" in page.text
    assert list(read_run(path.parent).class_names[:3]) == ["a\\u202eb", "\\x1b[31m", "<i>"]

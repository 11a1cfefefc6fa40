"""The reader of metrics.jsonl."""

import pytest

from vit_jax.metrics import read


@pytest.mark.parametrize("content", [b"5\n", b'{"a": 1}\n', b'{"step": "x"}\n', b"\xff\xfe\n", b'{"step": 1'])
def test_reader_leaves_out_lines_that_are_not_metrics(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content + b'\n{"step": 2}\n')
    assert read(tmp_path) == [{"step": 2}]


def test_read_gives_the_lines_up_to_a_step(tmp_path):
    assert read(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n{"step": 2}\n{"step": 3}\n')
    assert read(tmp_path, until=2) == [{"step": 1, "train/loss": 0.5}, {"step": 2}]

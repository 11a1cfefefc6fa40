"""The table of what augmentations cost."""

import re

from benchmarks import augment


def test_table_has_a_row_for_each_transform(monkeypatch):
    chosen = {name: augment.TRANSFORMS[name] for name in ("only scaling", "mixup")}
    monkeypatch.setattr(augment, "TRANSFORMS", chosen)
    _, _, *rows = augment.table((8, 16), 2)
    assert [re.sub(r"[\d.]+ ", "1 ", row) for row in rows] == ["| only scaling | 1 | 1 |", "| mixup | 1 | 1 |"]


def test_median_of_alternated_calls_is_given(monkeypatch):
    order, clock = [], iter(range(1000))
    monkeypatch.setattr(augment.time, "perf_counter", lambda: next(clock))
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    assert augment.milliseconds(calls, 3) == [1000, 1000] and order == ["a", "b"] * 3

"""The model of steps on many GPUs: volumes by hand, limits, and that docs/scaling.md has the tables it prints."""

import re
from pathlib import Path

import pytest

from benchmarks import scaling

ROOT = Path(__file__).parents[2]

B16 = 85_875_556  # parameters with a head of 100 classes


def test_bytes_are_those_of_ring_sums_and_gathers():
    assert scaling.parameters("B/16") == B16
    assert scaling.exchanged("B/16", 8) == pytest.approx(2 * 2 * B16 * 7 / 8)
    shared = (2 + 3.32) * B16 * 7 / 8
    assert scaling.exchanged("B/16", 8, fsdp=8) == pytest.approx(shared)
    assert scaling.exchanged("B/16", 64, fsdp=8) == pytest.approx(shared + 2 * 2 * B16 / 8 * 7 / 8)
    assert scaling.exchanged("B/16", 1) == 0


def test_step_is_never_faster_than_its_products_and_slower_on_more_nodes():
    for fsdp in (1, 8):
        seconds = [scaling.step_seconds("B/16", gpus, fsdp) for gpus in scaling.GPUS]
        assert all(scaling.compute_seconds("B/16") <= hidden <= exposed for exposed, hidden in seconds)
        assert [exposed for exposed, _ in seconds] == sorted(exposed for exposed, _ in seconds)
    # 3 × 35.1 GFLOP × 64 images at 0.3 × 989 TFLOP/s
    assert scaling.compute_seconds("B/16") == pytest.approx(0.0227, rel=0.01)


def test_sum_in_a_node_takes_its_bytes_at_the_speed_of_nvlink():
    assert scaling.reduced(360e9, 8) == pytest.approx(2 * 7 / 8)
    assert scaling.reduced(360e9, 16) == pytest.approx(2 * 7 / 8 + 2 * 45 / 40 / 2 + 2 * scaling.LATENCY)


def test_page_has_the_tables_that_the_command_prints(capsys):
    assert scaling.main([]) == 0
    page = (ROOT / "docs" / "scaling.md").read_text()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page


def test_measured_rows_are_next_to_one_device(monkeypatch):
    monkeypatch.setattr(scaling, "_throughput", lambda devices, hosts, *options: 100.0 * devices * hosts + len(options))
    rows = scaling.measured_table()
    assert rows[2] == "| 1 | mesh | 100 | 1.00 |" and "| 8 | fsdp | 801 | 8.01 |" in rows
    assert "| 2 processes × 4 | mesh | 800 | 8.00 |" in rows and all(re.fullmatch(r"\|.*\|", row) for row in rows)


def test_throughput_is_that_of_a_run(monkeypatch):
    def run(command, **options):
        folder = Path(command[command.index("--workdir") + 1])
        assert "--hosts=2" in command and "--config.training.batch_size=64" in command
        assert options["env"]["XLA_FLAGS"] == "--xla_force_host_platform_device_count=4"
        lines = [f'{{"step": {step}, "train/images_per_second": {step}}}' for step in range(1, 12)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    monkeypatch.setattr(scaling.subprocess, "run", run)
    assert scaling._throughput(4, 2) == 8.5  # the median of steps 6 to 11

"""The table of an ablation from the files of its runs."""

import json

import pytest

from vit_jax.config_files import to_json
from vit_jax.studies import ablation
from vit_jax.studies.grid import Cell


@pytest.fixture
def study(config, tmp_path):
    """A base and two changes with two seeds each; no run is there."""
    import copy

    cells: dict = {}
    for name, rate in (("base", 0.03), ("slow", 0.01), ("fast", 0.1)):
        cells[name] = {}
        for seed in (0, 1):
            changed = copy.deepcopy(config)
            changed.seed, changed.optimizer.learning_rate = seed, rate
            cells[name][seed] = Cell(f"{name}/seed{seed}", changed)
    return ablation.Study(
        tmp_path,
        cells,
        ("test/raw_accuracy", "test/accuracy"),
        "accuracy on test",
        "accuracy on test, the test images",
        "the command",
    )


def finish(study, name, seed, **metrics):
    """Writes what a run leaves."""
    cell = study.cells[name][seed]
    folder = study.folder / cell.name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(cell.config))
    (folder / "final.npz").touch()
    lines = [{"step": 1, "train/images_per_second": 8.0}, {"step": 12, "train/images_per_second": 4.0, **metrics}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_table_has_means_paired_differences_and_what_is_missing(study):
    for seed, base, slow in ((0, 0.70, 0.72), (1, 0.74, 0.75)):
        finish(study, "base", seed, **{"test/accuracy": base})
        finish(study, "slow", seed, **{"test/accuracy": 0.1, "test/raw_accuracy": slow})
    finish(study, "fast", 0, **{"test/accuracy": 0.9})
    text = ablation.write(study)
    base, slow, fast = text.splitlines()[-3:]
    # Differences 2 and 1: mean 1.5, standard error 0.5, Student's t with one degree of freedom 12.71.
    assert base == "| base | 2 | 72.00 | 2.83 | – | – | – | 6.0 |"
    assert slow == "| slow | 2 | 73.50 | 2.12 | +1.50 | 6.35 | 0.50 | 6.0 |"
    assert fast == "| fast | 1 of 2 missing | 90.00 | – | +20.00 | 8.98 | – | 6.0 |"
    assert "Student's t with 1 degree of freedom" in text and "over seeds 0 to 1" in text


def test_run_that_diverged_is_a_row_that_says_so(study):
    finish(study, "base", 0, **{"test/accuracy": 0.7})
    finish(study, "fast", 0, **{"diverged": "loss is nan"})
    text = ablation.write(study)
    assert "| fast | 1 of 2 diverged, 1 of 2 missing | – | – | – | – | – | – |" in text and "There is no interval" in text


def test_description_leaves_out_what_is_finished(study):
    finish(study, "slow", 1, **{"test/accuracy": 0.5})
    _, base, slow, _, total = ablation.describe(study)
    assert "2 runs, 384 training images" in base and "1 runs (1 finished), 192 training images" in slow
    assert total.startswith("5 runs, ")

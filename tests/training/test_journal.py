"""The log of a run: what a new start drops, what it says, and a disk that is full."""

import json
import resource
import signal

import pytest

from vit_jax.training.journal import Journal, gaps


def test_start_drops_the_lines_past_its_step(tmp_path, capsys):
    with Journal(tmp_path, 0, 5) as journal:
        for step in range(1, 5):
            journal.write(step, {"train/loss": step / 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train')  # a kill cut it short
    with Journal(tmp_path, 2, 5) as journal:
        journal.write(3, {"train/loss": 9.0})
        journal.flush()
        found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [{"step": step, "train/loss": loss} for step, loss in ((1, 0.5), (2, 1.0), (3, 9.0))]
    assert f"resuming from step 2 of 5 in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "start", "messages"),
    [
        (set(), 0, []),
        ({1, 2, 3}, 2, ["resuming from step 2 of 9 in {here}"]),
        (
            {1, 4},
            3,
            ["resuming from step 3 of 9 in {here}", "{here}/metrics.jsonl does not hold the lines of 2 of the steps up to 3"],
        ),
        ({1, 4}, 0, ["{here} holds no saved state, although metrics.jsonl reaches step 4: starting from the beginning"]),
    ],
)
def test_start_reports_what_the_folder_does_not_hold(tmp_path, found, start, messages):
    said = list(gaps(tmp_path, found, start, 9))
    assert len(said) == len(messages)
    assert all(text.startswith(message.format(here=tmp_path)) for text, message in zip(said, messages, strict=True))


@pytest.fixture
def limit():
    """limit(bytes): no file of this process can grow beyond that, which is what a full disk does; no argument: as before."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def change(size=before[0]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield change
    change()
    signal.signal(signal.SIGXFSZ, handler)


def test_lines_wait_while_the_disk_is_full(tmp_path, capsys, limit):
    with Journal(tmp_path, 0, 5) as journal:
        journal.write(1, {"train/loss": 1.0})
        limit(50)  # in the middle of the second line
        for step in (2, 3):
            journal.write(step, {"train/loss": 1.0})
        with pytest.raises(OSError, match="File too large.*metrics.jsonl"):
            journal.flush()
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 1.0}\n'
        limit()
        journal.write(4, {"train/loss": 1.0})
        journal.flush()
        written = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in written.splitlines()] == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl cannot be written (File too large): its lines wait in memory") == 1
    assert said.count("TensorBoard gets no more events from this start (File too large)") == 1


def test_lines_that_stay_unwritten_are_an_error(tmp_path, capsys, limit):
    with pytest.raises(OSError, match=r"File too large.*metrics.jsonl"), Journal(tmp_path, 0, 5) as journal:
        limit(10)
        journal.write(1, {"train/loss": 1.0})

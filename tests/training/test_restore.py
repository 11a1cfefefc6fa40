"""States that are damaged, vanish or belong to another run, and what is read in their place."""

import collections
import json
import random
import shutil

import jax
import jax.numpy as jnp
import pytest

from tests.training.states import ABSTRACT, OPTIMIZER, read_state, restored, same, saved, state_at
from vit_jax.config import Config
from vit_jax.config_files import to_json
from vit_jax.config_rules import with_steps
from vit_jax.errors import ConfigError, TrainingError
from vit_jax.training import restore
from vit_jax.training.saving import Saver
from vit_jax.training.state import create


def test_restore_of_an_empty_folder_is_none(tmp_path):
    assert restored(tmp_path) == (None, None)


@pytest.mark.parametrize("damage", ["bits", "truncated", "missing", "record"])
def test_damaged_newest_state_falls_back_to_the_one_before(tmp_path, damage, caplog):
    saved(tmp_path)
    newest = tmp_path / "checkpoints" / "3"
    files = sorted((path for path in (newest / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if damage == "bits":
        for file in files[-3:]:
            content = bytearray(file.read_bytes())
            for place in range(0, len(content), 7):
                content[place] ^= 0x04
            file.write_bytes(content)
    elif damage == "truncated":
        files[-1].write_bytes(files[-1].read_bytes()[:-9])
    elif damage == "missing":
        shutil.rmtree(newest / "state")
    else:
        record = newest / "record" / "metadata"
        record.write_text(record.read_text()[:-9])
    assert same(read_state(tmp_path), state_at(2)) and newest.exists()  # a reader changes nothing
    state, _ = restored(tmp_path)
    assert same(state, state_at(2))
    assert caplog.text.count("the state of step 3 is damaged") == 2
    assert list((tmp_path / "checkpoints").glob("damaged-3-*"))  # set aside, not thrown away
    saved(tmp_path, steps=(3,))  # the step is free to be saved again
    assert same(restored(tmp_path)[0], state_at(3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the states 2 and 3, whose best parameters are those of step 1."""
    folder = tmp_path_factory.mktemp("whole")
    saved(folder)
    return folder


@pytest.mark.parametrize("damage", ["bits", "truncated", "emptied", "removed"])
def test_damage_of_any_file_is_reported_or_has_no_effect(tmp_path, whole, damage, caplog):
    newest, draw, effects = tmp_path / "checkpoints" / "3", random.Random(0), collections.Counter()
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        spoilt = {"truncated": content[: draw.randrange(len(content) or 1)], "emptied": b"", "bits": bytearray(content)}
        for _ in range(3 * bool(content)):
            spoilt["bits"][draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.unlink()
        if damage in spoilt:
            path.write_bytes(spoilt[damage])
        caplog.clear()
        found = restore.read_newest(tmp_path / "checkpoints", ABSTRACT, Config())
        damaged = "the state of step 3 is damaged" in caplog.text
        assert same(found.state, state_at(2 if damaged else 3)), path
        assert same(found.best_params, state_at(1).params) and found.record["best"] == {"step": 1, "accuracy": 0.9}, path
        effects[damaged] += 1
        path.write_bytes(content)
    assert effects[True] >= 5, effects  # the other files are of no use to Orbax


def test_silently_changed_value_is_detected(tmp_path, caplog):
    """Orbax restores a state silently whose value was changed under the same hash."""
    saved(tmp_path, steps=(1, 2))
    changed = state_at(9)
    with Saver(tmp_path / "other", {}, Config()) as saver:
        saver.save(changed)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "state")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "9" / "state", tmp_path / "checkpoints" / "2" / "state")
    state, _ = restored(tmp_path)
    assert same(state, state_at(1)) and "does not have the SHA-256 of its record" in caplog.text


def test_damage_of_all_states_is_an_error(tmp_path):
    saved(tmp_path)
    for step in ("2", "3"):
        (tmp_path / "checkpoints" / step / "record" / "metadata").write_text("{")
    with pytest.raises(TrainingError, match="no state in .* can be read .* move the working directory away"):
        restored(tmp_path)
    assert (tmp_path / "checkpoints" / "3").exists()  # nothing is thrown away


def test_state_of_another_shape_is_refused(tmp_path):
    saved(tmp_path)
    other = jax.eval_shape(lambda: create({"head": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(2)}}, OPTIMIZER))
    with Saver(tmp_path, {}, Config()) as saver, pytest.raises(TrainingError, match="no state in .* can be read"):
        saver.restore(other)


def test_permission_error_is_not_reported_as_damage(tmp_path, monkeypatch):
    saved(tmp_path)

    def refuses(*args):
        raise ValueError("Error opening file [OS error 24: EMFILE Too many open files]")  # as TensorStore says it

    with Saver(tmp_path, {}, Config()) as saver, monkeypatch.context() as patch:
        patch.setattr(restore, "_read", refuses)
        with pytest.raises(OSError, match="Too many open files"):
            saver.restore(ABSTRACT)
    assert same(restored(tmp_path)[0], state_at(3))


def test_reader_does_not_touch_an_unfinished_save(tmp_path):
    saved(tmp_path)
    unfinished = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "3", unfinished)
    assert same(read_state(tmp_path), state_at(3))
    assert unfinished.exists()


def test_record_with_any_bit_flipped_falls_back(tmp_path):
    saved(tmp_path)
    path = tmp_path / "checkpoints" / "3" / "record" / "metadata"
    content = path.read_bytes()
    positions = [*range(0, len(content), 97), *range(content.index(b'"best"'), content.index(b'"best"') + 45)]
    for position in positions:
        for bit in (1, 4):
            flipped = bytearray(content)
            flipped[position] ^= bit
            path.write_bytes(flipped)
            try:
                record = restore._read_record(tmp_path / "checkpoints", 3)
            except Exception:
                continue
            assert json.loads(content)["best"] == record["best"]  # white space, or a letter JSON escapes
    assert same(read_state(tmp_path), state_at(3)) or same(read_state(tmp_path), state_at(2))
    path.write_bytes(content.replace(b'"accuracy": 0.9', b'"accuracy": 4.4'))
    assert same(read_state(tmp_path), state_at(2))
    path.write_bytes(content.replace(b'"best": {', b'"bust": {'))
    assert same(read_state(tmp_path), state_at(2))


@pytest.mark.parametrize(
    ("name", "instead", "read"),
    [
        ("record/metadata", "folder", 2),
        ("record/metadata", "nothing", 2),
        ("record", "nothing", 2),
        ("state/_METADATA", "folder", 2),
        ("state/manifest.ocdbt", "folder", 2),
        ("state/manifest.ocdbt", "nothing", 2),
        ("_CHECKPOINT_METADATA", "folder", 3),  # of which nothing is read
    ],
)
def test_folder_or_nothing_in_place_of_a_file_falls_back(tmp_path, name, instead, read):
    saved(tmp_path)
    path = tmp_path / "checkpoints" / "3" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if instead == "folder":
        path.mkdir()
    assert same(restored(tmp_path)[0], state_at(read))


def test_state_that_vanishes_during_reading_is_read_again(tmp_path, monkeypatch, caplog):
    """A training next to the reader saves two states and removes those that the reader has listed."""
    saved(tmp_path, steps=(1, 2))
    original = restore._read_record

    def read_record(folder, step):
        if step == 2:
            saved(tmp_path, steps=(3, 4))
            assert restore.steps(folder) == [4, 3]
        return original(folder, step)

    monkeypatch.setattr(restore, "_read_record", read_record)
    assert same(read_state(tmp_path), state_at(4)) and not caplog.text


def test_states_that_always_vanish_are_an_error(tmp_path, monkeypatch):
    listed = iter(range(100))
    monkeypatch.setattr(restore, "steps", lambda folder: [next(listed)])
    with pytest.raises(TrainingError, match="replaced faster than they can be read; try again"):
        read_state(tmp_path)


def test_states_of_another_configuration_are_refused(tmp_path):
    saved(tmp_path)
    config = Config()
    config.optimizer.learning_rate, config.training.steps = 0.5, 2
    config.run.parallel = "pmap"  # changes no numbers
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate = 0.03 when it was saved, 0.5 now, training.steps = 1000"):
        restore.read_newest(tmp_path / "checkpoints", ABSTRACT, config)


def test_epochs_of_another_number_of_images_are_not_resumed(config, tmp_path):
    config.training.epochs = 2.0
    saved = with_steps(config, 64)
    restore._check_config(tmp_path, {"config": json.loads(to_json(saved))}, saved)
    with pytest.raises(ConfigError, match="training.steps = 8 when it was saved, 16 now"):
        restore._check_config(tmp_path, {"config": json.loads(to_json(saved))}, with_steps(config, 128))

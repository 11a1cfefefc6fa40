"""The compiled programs of a run."""

from vit_jax.training import loop


def test_step_is_traced_once(config, tmp_path, monkeypatch):
    traces = []
    original = loop.assemble

    def counting(*args, **kwargs):
        parts = original(*args, **kwargs)
        traces.append(parts.program.train_step)
        return parts

    monkeypatch.setattr(loop, "assemble", counting)
    loop.train(config, tmp_path)
    assert traces[0]._cache_size() == 1

"""The wall time of a run from its TensorBoard files."""

from vit_jax.reports.events import wall_time


def test_wall_time_is_the_span_of_the_events(tmp_path):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    assert wall_time(tmp_path) is None
    for name, times in (("a", (100.0, 103.5, 110.0)), ("b", (1000.0, 1005.0))):
        board = EventsWriter(str(tmp_path / "events"), name)
        for step, at in enumerate(times):
            board.write_event(Event(wall_time=at, step=step, summary=Summary(value=[Summary.Value(tag="x", simple_value=1)])))
        board.close()
    for path in tmp_path.iterdir():  # the writer's own first event has the time of now
        data = path.read_bytes()
        path.write_bytes(data[16 + int.from_bytes(data[:8], "little") :])
    assert wall_time(tmp_path) == 15
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-3])
    assert 0 < wall_time(tmp_path) <= 15

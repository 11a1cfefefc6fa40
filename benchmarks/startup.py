"""main.py until its first step is done, with the time that each part of the way takes: run by the benchmark's `startup`.

The time at which the command was given comes in VIT_JAX_BEGAN. Nothing is done differently: the functions on the way tell
when they are called. The last line of the output is JSON, seconds of each part.
"""

import json
import os
import runpy
import sys
import time
from typing import Any

from benchmarks.processes import ROOT


def main() -> None:
    """Runs main.py with this process's arguments up to the first step."""
    began = float(os.environ["VIT_JAX_BEGAN"])
    marks, compiling = dict[str, float](), dict[str, float]()

    def mark(name: str) -> None:
        marks[name] = time.time() - began - sum(marks.values())

    import jax

    from vit_jax.training import assemble, devices

    def count(event: str, duration_secs: float, **_: Any) -> None:
        if "first" in compiling:
            compiling[event] = compiling.get(event, 0.0) + duration_secs

    jax.monitoring.register_event_duration_secs_listener(count)
    start, splits, load, train = devices.start, assemble.splits, assemble.load, devices.Layout.train

    def started(*arguments: Any) -> Any:
        mark("import")
        layout = start(*arguments)
        mark("devices")
        return layout

    def opened(*arguments: Any) -> Any:
        found = splits(*arguments)
        mark("data")
        return found

    def loaded(*arguments: Any, **fields: Any) -> Any:
        found = load(*arguments, **fields)
        mark("load")
        return found

    def compiled(self: Any, step: Any) -> Any:
        inner = train(self, step)

        def first(*arguments: Any) -> Any:
            mark("state")  # with the data, on the device
            compiling["first"] = 0.0
            found = inner(*arguments)
            mark("dispatch")
            jax.block_until_ready(found)
            mark("step")
            events = {name.rsplit("/", 1)[-1]: seconds for name, seconds in compiling.items()}
            marks["total"] = sum(marks[name] for name in ("import", "devices", "data", "load", "state", "dispatch"))
            marks["trace"] = events.get("jaxpr_trace_duration", 0.0) + events.get("jaxpr_to_mlir_module_duration", 0.0)
            marks["compile"] = events.get("backend_compile_duration", 0.0)
            print(json.dumps(marks), flush=True)
            os._exit(0)

        return first

    doors: Any = devices, assemble, devices.Layout
    doors[0].start, doors[1].splits, doors[1].load, doors[2].train = started, opened, loaded, compiled
    os.chdir(ROOT)
    sys.argv = ["main.py", *sys.argv[1:]]
    sys.path.insert(0, str(ROOT))
    runpy.run_path("main.py", run_name="__main__")


if __name__ == "__main__":
    main()

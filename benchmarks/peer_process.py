"""timm or the original as a contestant, in its own process: `python -P benchmarks/peer_process.py timm+bf16 WORK.json`.

`python -m benchmarks` starts it and drives it over standard input and output. It runs by its path, because the package of
the original is called vit_jax too, and it imports nothing of ours but the file vit_jax/interop/peers.py. A training step is
forward, backward, clipping by global norm and SGD with momentum on random images; inference is a forward pass.
"""

import functools
import importlib.metadata
import json
import os
import resource
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Timed = tuple[Callable[[int], float], Callable[[], dict[str, Any]]]  # n units → seconds; its report
_PEERS = str(Path(__file__).resolve().parents[1] / "vit_jax" / "interop" / "peers.py")


def _random_batch(work: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Random images float32 [B, H, W, 3] in [-1, 1] and labels int64 [B]."""
    draw, shape = np.random.default_rng(0), (work["batch"], work["size"], work["size"], 3)
    labels = draw.integers(0, work["geometry"]["num_classes"], work["batch"])
    return draw.uniform(-1, 1, shape).astype(np.float32), labels


def report(memory: int, device: str, *packages: str) -> dict[str, Any]:
    """What a contestant reports: its peak memory in bytes (if 0, that of its process), device, versions of packages."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"memory": memory or resident, "device": device, "versions": versions}


def report_jax(device: Any, *packages: str) -> dict[str, Any]:
    """The report of a contestant in JAX."""
    return report((device.memory_stats() or {}).get("peak_bytes_in_use", 0), device.device_kind, *packages)


def _timm_model(work: dict[str, Any]) -> Any:
    geometry = work["geometry"]
    if geometry["resnet"] is not None or geometry["representation_size"]:
        raise SystemExit("error: timm is timed only on Vision Transformers without ResNet and pre_logits")
    runpy.run_path(_PEERS)["import_torchvision"]()
    from timm.models.vision_transformer import VisionTransformer

    token = geometry["classifier"] == "token"
    fields = dict(img_size=work["size"], patch_size=geometry["patch_size"], embed_dim=geometry["hidden_size"])
    fields |= dict(depth=geometry["num_layers"], num_heads=geometry["num_heads"], num_classes=geometry["num_classes"])
    fields |= dict(mlp_ratio=geometry["mlp_dim"] / geometry["hidden_size"], act_layer="gelu_tanh", fc_norm=False)
    return VisionTransformer(**fields, class_token=token, global_pool="token" if token else "avg")


def _timm(work: dict[str, Any], options: set[str], _: str) -> Timed:
    """timm's model with images and labels on the device in the layout that the model wants."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.set_float32_matmul_precision("highest")  # as ours: float32 is not TF32
    layout = torch.channels_last if "channels_last" in options else torch.contiguous_format
    model = _timm_model(work).to(device=device, memory_format=layout)
    pixels, classes = _random_batch(work)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device=device, memory_format=layout)
    labels = torch.from_numpy(classes).to(device)
    train, parameters = work["kind"] == "train", list(model.train(work["kind"] == "train").parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, **({"fused": True} if cuda else {}))
    if "compile" in options:
        model.compile()
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled="bf16" in options)

    def act() -> None:
        with torch.inference_mode(not train), autocast():
            logits = model(images)
        if train:
            torch.nn.functional.cross_entropy(logits.float(), labels).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def run(n: int) -> float:
        began = time.perf_counter()
        for _ in range(n):
            act()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def about() -> dict[str, Any]:
        memory, name = (torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()) if cuda else (0, "cpu")
        return report(memory, name, "torch", "timm")

    return run, about


def _original(work: dict[str, Any], _: set[str], checkout: str) -> Timed:
    """The update function of the original (vit_jax/train.py, make_update_fn) without TensorFlow, under pmap.

    Every step gets float32 images and one-hot labels from the host, as the original's pipeline hands them over; the cost of
    that pipeline is not included.
    """
    model = runpy.run_path(_PEERS)["original_model"](checkout, work["geometry"])
    import jax
    import jax.numpy as jnp
    import optax

    devices = jax.local_device_count()
    images, labels = _random_batch(work)
    one_hot = np.eye(work["geometry"]["num_classes"], dtype=np.float32)[labels]
    images, one_hot = (array.reshape(devices, -1, *array.shape[1:]) for array in (images, one_hot))
    variables = jax.jit(lambda key: model.init(key, images[0], train=False))(jax.random.PRNGKey(0))
    sgd = optax.sgd(optax.cosine_decay_schedule(1e-3, 10**6), momentum=0.9, accumulator_dtype="bfloat16")
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), sgd)

    def update(params: Any, opt_state: Any, images: Any, labels: Any) -> Any:
        def loss_of(params: Any) -> Any:
            logits = model.apply({"params": params}, images, train=True)  # without dropout, so without keys
            return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * labels, axis=1))

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(jax.lax.pmean(gradients, "batch"), opt_state)
        return optax.apply_updates(params, updates), opt_state, jax.lax.pmean(loss, "batch")

    train, infer = jax.pmap(update, "batch", donate_argnums=0), jax.pmap(functools.partial(model.apply, train=False))
    params, opt_state = jax.pmap(lambda _: (variables["params"], optimizer.init(variables["params"])))(jnp.arange(devices))

    def run(n: int) -> float:
        nonlocal params, opt_state
        began = time.perf_counter()
        for _ in range(n):
            if work["kind"] == "train":
                params, opt_state, last = train(params, opt_state, images, one_hot)
            else:
                last = infer({"params": params}, images)
        jax.block_until_ready((last, params))
        return time.perf_counter() - began

    return run, functools.partial(report_jax, jax.local_devices()[0], "jax", "flax")


def serve(prepare: Callable[[], Timed]) -> None:
    """Serves a contestant, which it prepares for the first line of standard input, until standard input ends.

    The line "5" runs five units and is answered with {"seconds": …}, "about" with the report, in a line of JSON each. All
    else that the process prints goes to standard error.
    """
    sys.stdout.flush()
    answers, contestant = os.fdopen(os.dup(1), "w"), functools.cache(prepare)
    os.dup2(2, 1)
    for line in sys.stdin:
        run, about = contestant()
        print(json.dumps(about() if line.strip() == "about" else {"seconds": run(int(line))}), file=answers, flush=True)


if __name__ == "__main__":
    (peer, *options), task, checkout = sys.argv[1].split("+"), json.loads(sys.argv[2]), sys.argv[3]
    serve(lambda: {"timm": _timm, "original": _original}[peer](task, set(options), checkout))

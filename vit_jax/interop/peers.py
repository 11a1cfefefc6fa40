"""The same weights and the same work in other people's implementations: their stages as an IO.npz, or their speed.

    python -P vit_jax/interop/peers.py timm FOLDER --images IMAGES.npz --output IO.npz
    python -P vit_jax/interop/peers.py huggingface FOLDER --images IMAGES.npz --output IO.npz
    python -P vit_jax/interop/peers.py original WEIGHTS.npz --images IMAGES.npz --output IO.npz --original CHECKOUT
        --geometry JSON
    python -P vit_jax/interop/peers.py time timm+bf16+compile --work JSON [--original CHECKOUT]

A FOLDER is what `convert --to timm` or `--to huggingface` left, IMAGES.npz holds `images` as a model gets them. `time` is
driven over standard input and output by `python -m benchmarks`, which writes the JSON. Each runs in a process of its
own and by this file's path, for the original's package is called vit_jax too: nothing of ours is imported. The only file of
the product that imports the peers, inside functions.
"""

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

Stages = dict[str, np.ndarray]
Timed = tuple[Callable[[int], float], Callable[[], dict[str, Any]]]  # n units → seconds; what there is to say of it
_DECLARED: list[Any] = []  # torch.library.Library objects: their declarations go when they go


def import_torchvision() -> None:
    """Imports torchvision where it is installed, as timm and transformers do, also where its operators do not load.

    A wheel made for another build of PyTorch than the one installed (as from the package index beside PyTorch's for the
    CPU) fails on import over the names of its operators; no Vision Transformer calls them, so the names are declared.
    """
    import torch

    try:
        importlib.import_module("torchvision")
        return
    except ModuleNotFoundError:  # transformers does without
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
    for operator in ("nms", "qnms"):
        _DECLARED[-1].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")


def _outputs(modules: dict[str, Any], call: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What `call` returns, and the last output of each of PyTorch's modules while it ran."""
    found: dict[str, Any] = {}
    handles = []
    for name, module in modules.items():

        def keep(_module: Any, _inputs: Any, output: Any, name: str = name) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(keep))
    try:
        return call(), found
    finally:
        for handle in handles:
            handle.remove()


def timm_stages(model: Any, images: np.ndarray) -> Stages:
    """The stages of a timm Vision Transformer, in the layout of IO.npz; `images` float32 [B, H, W, 3]."""
    import torch

    inputs = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    modules = {"embedding": model.patch_embed, **{f"block_{i}": block for i, block in enumerate(model.blocks)}}
    with torch.inference_mode():
        tokens, found = _outputs(modules, lambda: model.forward_features(inputs))
        found["embedding"] = found["embedding"].reshape(len(images), *model.patch_embed.grid_size, -1)
        found["features"] = model.forward_head(tokens, pre_logits=True)
        if model.num_classes:
            found["logits"] = model.forward_head(tokens)
    return {name: output.float().numpy() for name, output in found.items()}


def huggingface_stages(model: Any, images: np.ndarray) -> Stages:
    """The stages of a transformers ViTModel or ViTForImageClassification, in the layout of IO.npz; `images` as above."""
    import torch

    inputs = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    encoder = getattr(model, "vit", model)
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer  # since transformers 5, and before
    patches = encoder.embeddings.patch_embeddings
    modules = {"embedding": patches, **{f"block_{i}": layer for i, layer in enumerate(layers)}, "features": encoder.layernorm}
    with torch.inference_mode():
        output, found = _outputs(modules, lambda: model(inputs))
    height, width = (size // patch for size, patch in zip(patches.image_size, patches.patch_size, strict=True))
    found["embedding"] = found["embedding"].reshape(len(images), height, width, -1)
    found["features"] = found["features"][:, 0]
    if getattr(output, "pooler_output", None) is not None:
        found["pre_logits"] = output.pooler_output
    if hasattr(output, "logits"):
        found["logits"] = output.logits
    return {name: array.float().numpy() for name, array in found.items()}


def _timm(arguments: argparse.Namespace, images: np.ndarray) -> Stages:
    import_torchvision()
    timm = importlib.import_module("timm")
    model = timm.create_model(f"local-dir:{Path(arguments.source).resolve()}", pretrained=True)
    return timm_stages(model.eval(), images)


def _huggingface(arguments: argparse.Namespace, images: np.ndarray) -> Stages:
    import_torchvision()
    transformers = importlib.import_module("transformers")
    config = json.loads((Path(arguments.source) / "config.json").read_text())
    options = {} if "pooler_act" in config or "ViTModel" not in config["architectures"] else {"add_pooling_layer": False}
    model = getattr(transformers, config["architectures"][0]).from_pretrained(arguments.source, **options)
    return huggingface_stages(model.eval(), images)


def _original_model(checkout: str | None, geometry: dict[str, Any]) -> Any:
    """The original's model, without dropout, of the fields of our VisionTransformer."""
    if not checkout or not (Path(checkout) / "vit_jax" / "models_vit.py").is_file():
        raise SystemExit(
            f"there is no vit_jax/models_vit.py below {checkout or 'the current folder'}: give --original the path "
            "of a checkout of github.com/google-research/vision_transformer"
        )
    sys.path.insert(0, str(Path(checkout).resolve()))
    models_vit = importlib.import_module("vit_jax.models_vit")  # theirs, which needs no TensorFlow
    resnet = geometry["resnet"]
    return models_vit.VisionTransformer(
        num_classes=geometry["num_classes"],
        patches=SimpleNamespace(size=2 * (geometry["patch_size"],)),
        transformer={
            "num_layers": geometry["num_layers"],
            "mlp_dim": geometry["mlp_dim"],
            "num_heads": geometry["num_heads"],
            "dropout_rate": 0.0,
            "attention_dropout_rate": 0.0,
        },
        hidden_size=geometry["hidden_size"],
        resnet=None if resnet is None else SimpleNamespace(num_layers=resnet, width_factor=geometry["resnet_width"] / 64),
        representation_size=geometry["representation_size"] or None,
        classifier=geometry["classifier"],
    )


def _original(arguments: argparse.Namespace, images: np.ndarray) -> Stages:
    geometry = json.loads(arguments.geometry)
    model = _original_model(arguments.original, geometry)
    import jax
    import ml_dtypes
    from flax.traverse_util import flatten_dict, unflatten_dict

    jax.config.update("jax_default_matmul_precision", "highest")
    # The published names count the layers of a block as Linen's predecessor did; today's Linen counts those of a kind.
    linen = {"LayerNorm_2": "LayerNorm_1", "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0"}
    linen |= {"MlpBlock_3": "MlpBlock_0"}
    flat = {}
    with np.load(arguments.source) as file:
        for name in file.files:
            path, leaf = tuple(linen.get(part, part) for part in name.split("/")), file[name]
            if leaf.dtype == "V2":  # bfloat16, which NumPy stores without its meaning and theirs does not read
                leaf = leaf.view(ml_dtypes.bfloat16).astype(np.float32)
            flat[path] = leaf.reshape(-1) if leaf.shape[:-1] == (1, 1, 1) and path[-2].startswith("gn") else leaf
    wanted = flatten_dict(jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"])
    for path in sorted(wanted.keys() | flat.keys()):
        if path not in wanted or path not in flat or wanted[path].shape != flat[path].shape:
            raise SystemExit(f"{arguments.source}: {'/'.join(path)} is not as the original's model has it")

    def captured(module: Any, _method: str) -> bool:
        name = module.name or ""
        return name in ("embedding", "encoder_norm", "pre_logits") or name.startswith("encoderblock_")

    @jax.jit
    def run(params: Any, images: Any) -> Any:
        return model.apply({"params": params}, images, train=False, capture_intermediates=captured, mutable=["intermediates"])

    logits, state = run(unflatten_dict(flat), images)
    state = state["intermediates"]
    encoder = {name: module["__call__"][0] for name, module in state["Transformer"].items()}
    tokens = encoder.pop("encoder_norm")
    found = {"embedding": state["embedding"]["__call__"][0]}
    found |= {f"block_{i}": encoder[f"encoderblock_{i}"] for i in range(geometry["num_layers"])}
    found["features"] = tokens[:, 0] if geometry["classifier"] == "token" else tokens.mean(axis=1)
    if geometry["representation_size"]:
        found["pre_logits"] = jax.numpy.tanh(state["pre_logits"]["__call__"][0])
    if geometry["num_classes"]:
        found["logits"] = logits
    return {name: np.asarray(array) for name, array in found.items()}


# --- The same work, timed -------------------------------------------------------------------------------------------------
#
# A step is forward, backward, clipping by global norm and SGD with momentum on random images; inference is a forward pass.


def _random_images(work: dict[str, Any], axes: str) -> tuple[np.ndarray, np.ndarray]:
    """Random images float32 in [-1, 1], as a model gets them ("NHWC" or "NCHW"), and labels int64 [B]."""
    draw, size = np.random.default_rng(0), work["size"]
    shape = {"N": work["batch"], "H": size, "W": size, "C": 3}
    images = draw.uniform(-1, 1, [shape[axis] for axis in axes]).astype(np.float32)
    return images, draw.integers(0, work["geometry"]["num_classes"], work["batch"])


def _versions(*names: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


def _resident() -> int:
    """The largest memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _plain(work: dict[str, Any], peer: str) -> dict[str, Any]:
    geometry: dict[str, Any] = work["geometry"]
    if geometry["resnet"] is not None or geometry["representation_size"]:
        raise SystemExit(f"{peer} is timed on Vision Transformers without ResNet and pre_logits alone")
    return geometry


def _time_torch(work: dict[str, Any], options: set[str], peer: str, model: Any, call: Callable[..., Any]) -> Timed:
    """`call(model, images)` gives logits. Images and labels lie on the device as the model wants them."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.set_float32_matmul_precision("highest")  # as ours: what is called float32 is no TF32
    layout = torch.channels_last if "channels_last" in options else torch.contiguous_format
    model = model.to(device=device, memory_format=layout)
    pixels, classes = _random_images(work, "NCHW")
    images = torch.from_numpy(pixels).to(device=device, memory_format=layout)
    labels = torch.from_numpy(classes).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, **({"fused": True} if cuda else {}))
    if options & {"compile", "autotune"}:
        mode = "max-autotune-no-cudagraphs" if "autotune" in options else "default"
        model.compile(mode=mode)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled="bf16" in options)

    def step() -> None:
        with autocast():
            logits = call(model, images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def infer() -> None:
        with torch.inference_mode(), autocast():
            call(model, images)

    train = work["kind"] == "train"
    model.train(train)
    act = step if train else infer

    def run(n: int) -> float:
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(n):
            act()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def about() -> dict[str, Any]:
        memory = torch.cuda.max_memory_allocated() if cuda else _resident()
        name = torch.cuda.get_device_name() if cuda else "cpu"
        return {"memory": memory, "device": name, "versions": _versions("torch", peer)}

    return run, about


def _time_timm(work: dict[str, Any], options: set[str], original: str | None) -> Timed:
    import_torchvision()
    vision_transformer = importlib.import_module("timm.models.vision_transformer")
    geometry = _plain(work, "timm")
    token = geometry["classifier"] == "token"
    model = vision_transformer.VisionTransformer(
        img_size=work["size"],
        patch_size=geometry["patch_size"],
        embed_dim=geometry["hidden_size"],
        depth=geometry["num_layers"],
        num_heads=geometry["num_heads"],
        mlp_ratio=geometry["mlp_dim"] / geometry["hidden_size"],
        num_classes=geometry["num_classes"],
        act_layer="gelu_tanh",
        global_pool="token" if token else "avg",
        class_token=token,
        fc_norm=False,
    )
    return _time_torch(work, options, "timm", model, lambda model, images: model(images))


def _time_transformers(work: dict[str, Any], options: set[str], original: str | None) -> Timed:
    import_torchvision()
    transformers = importlib.import_module("transformers")
    geometry = _plain(work, "transformers")
    if geometry["classifier"] != "token":
        raise SystemExit("transformers' ViT classifies from a class token")
    config = transformers.ViTConfig(
        image_size=work["size"],
        patch_size=geometry["patch_size"],
        hidden_size=geometry["hidden_size"],
        num_hidden_layers=geometry["num_layers"],
        num_attention_heads=geometry["num_heads"],
        intermediate_size=geometry["mlp_dim"],
        num_labels=geometry["num_classes"],
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    )
    model = transformers.ViTForImageClassification(config)
    return _time_torch(work, options, "transformers", model, lambda model, images: model(pixel_values=images).logits)


def _time_keras_hub(work: dict[str, Any], options: set[str], original: str | None) -> Timed:
    os.environ["KERAS_BACKEND"] = "jax"
    keras = importlib.import_module("keras")
    keras_hub = importlib.import_module("keras_hub")
    import jax

    geometry, size = _plain(work, "keras_hub"), work["size"]
    keras.config.set_image_data_format("channels_last")
    keras.config.set_dtype_policy("mixed_bfloat16" if "bf16" in options else "float32")
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(size, size, 3),
        patch_size=(geometry["patch_size"],) * 2,
        num_layers=geometry["num_layers"],
        num_heads=geometry["num_heads"],
        hidden_dim=geometry["hidden_size"],
        mlp_dim=geometry["mlp_dim"],
    )
    pooling = "token" if geometry["classifier"] == "token" else "gap"
    model = keras_hub.models.ViTImageClassifier(
        backbone=backbone, num_classes=geometry["num_classes"], preprocessor=None, pooling=pooling
    )
    model.compile(
        optimizer=keras.optimizers.SGD(1e-3, momentum=0.9, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    images, labels = _random_images(work, "NHWC")

    def batches(n: int) -> Iterable[tuple[np.ndarray, ...]]:
        for _ in range(n):
            yield (images, labels) if work["kind"] == "train" else (images,)

    def run(n: int) -> float:
        began = time.perf_counter()
        # keras.Model's own: KerasHub's put a preprocessor before it, which there is not, and make arrays of what they get.
        if work["kind"] == "train":
            keras.Model.fit(model, batches(n), steps_per_epoch=n, verbose=0)
        else:
            keras.Model.predict(model, batches(n), steps=n, verbose=0)
        return time.perf_counter() - began

    return run, functools.partial(about_jax, "keras", "keras-hub", "jax", device=jax.local_devices()[0])


def about_jax(*names: str, device: Any) -> dict[str, Any]:
    """What a contestant in JAX says of itself: its memory in bytes, its device, the versions of these packages."""
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use") or _resident()
    return {"memory": memory, "device": device.device_kind, "versions": _versions(*names)}


def _time_original(work: dict[str, Any], options: set[str], original: str | None) -> Timed:
    """Their update function (vit_jax/train.py, make_update_fn) without TensorFlow, under pmap.

    Every step gets float32 images and one-hot labels from the host, as their pipeline hands them over; what their pipeline
    costs before that is not in it.
    """
    model = _original_model(original, work["geometry"])
    import jax
    import jax.numpy as jnp
    import optax

    devices = jax.local_device_count()
    images, labels = _random_images(work, "NHWC")
    one_hot = np.eye(work["geometry"]["num_classes"], dtype=np.float32)[labels]
    images, one_hot = (array.reshape(devices, -1, *array.shape[1:]) for array in (images, one_hot))
    variables = jax.jit(lambda key: model.init(key, images[0], train=False))(jax.random.PRNGKey(0))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.sgd(optax.cosine_decay_schedule(1e-3, 10**6), momentum=0.9, accumulator_dtype="bfloat16"),
    )

    def update(params: Any, opt_state: Any, images: Any, labels: Any, key: Any) -> Any:
        _, following = jax.random.split(key)
        dropout = jax.random.fold_in(key, jax.lax.axis_index("batch"))

        def loss_of(params: Any) -> Any:
            logits = model.apply({"params": params}, images, train=True, rngs={"dropout": dropout})
            return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * labels, axis=1))

        loss, gradients = jax.value_and_grad(loss_of)(params)
        gradients = jax.lax.pmean(gradients, "batch")
        updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state, jax.lax.pmean(loss, "batch"), following

    def replicate(tree: Any) -> Any:
        return jax.pmap(lambda _: tree)(jnp.arange(devices))

    train = jax.pmap(update, "batch", donate_argnums=0)
    infer = jax.pmap(functools.partial(model.apply, train=False))
    params = replicate(variables["params"])
    state = [params, replicate(optimizer.init(variables["params"])), None, replicate(jax.random.PRNGKey(0))]

    def run(n: int) -> float:
        began, last = time.perf_counter(), None
        for _ in range(n):
            if work["kind"] == "train":
                state[0], state[1], last, state[3] = train(state[0], state[1], images, one_hot, state[3])
            else:
                last = infer({"params": params}, images)
        jax.block_until_ready((last, state[0]))
        return time.perf_counter() - began

    return run, functools.partial(about_jax, "jax", "flax", device=jax.local_devices()[0])


def serve(prepare: Callable[[], Timed]) -> None:
    """A contestant of `python -m benchmarks`, driven by lines on standard input, until it ends.

    Writes a line of JSON when it is ready, then one for each line: "5" runs five units and answers {"seconds": …}, "about"
    answers with what there is to say. All else that this process prints goes to standard error.
    """
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run, about = prepare()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        answer = about() if line.strip() == "about" else {"seconds": run(int(line))}
        print(json.dumps(answer), file=answers, flush=True)


_TIMED = {
    "timm": (_time_timm, {"bf16", "compile", "autotune", "channels_last"}),
    "transformers": (_time_transformers, {"bf16", "compile", "autotune", "channels_last"}),
    "keras_hub": (_time_keras_hub, {"bf16"}),
    "original": (_time_original, set[str]()),
}


def variant(name: str) -> tuple[str, set[str]]:
    """The peer and the options of a name such as "timm+bf16+compile"; ValueError for what there is not."""
    peer, *options = name.split("+")
    if peer not in _TIMED:
        raise ValueError(f"there is no peer {peer!r} to time; there are {', '.join(_TIMED)}")
    allowed = _TIMED[peer][1]
    if unknown := sorted(set(options) - allowed):
        having = f"; it has {', '.join(sorted(allowed))}" if allowed else ""
        raise ValueError(f"{peer} has no option {unknown[0]!r}{having}")
    return peer, set(options)


_PEERS = {"timm": _timm, "huggingface": _huggingface, "original": _original}
_INSTALL = {
    "timm": "pip install torch torchvision timm",
    "huggingface": "pip install torch transformers",
    "transformers": "pip install torch transformers",
    "keras_hub": "pip install keras-hub",
    "original": "pip install -r requirements.txt",
}


def main(argv: list[str] | None = None) -> None:
    """The command line: one subcommand a peer. Exits with 2 and a sentence where the peer is not installed."""
    parser = argparse.ArgumentParser(description="What a peer makes of the same weights, stage by stage, as an IO.npz.")
    peers = parser.add_subparsers(dest="peer", required=True)
    for name in _PEERS:
        peer = peers.add_parser(name)
        peer.add_argument("source", help="the weights" if name == "original" else "the exported folder")
        peer.add_argument("--images", required=True, help="an npz with `images`, float32 [B, H, W, 3]")
        peer.add_argument("--output", required=True, help="the IO.npz to write")
        if name == "original":
            peer.add_argument("--original", required=True, help="a checkout of github.com/google-research/vision_transformer")
            peer.add_argument("--geometry", required=True, help="the fields of our VisionTransformer, as JSON")
    timing = peers.add_parser("time", help="its speed, driven over standard input by python -m benchmarks")
    timing.add_argument("name", help="a peer with options, such as timm+bf16+compile")
    timing.add_argument("--work", required=True, type=json.loads, help="kind, geometry, size and batch, as JSON")
    timing.add_argument("--original", help="a checkout of github.com/google-research/vision_transformer")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything lies in the folder
    name = arguments.peer
    try:
        if name == "time":
            name, options = variant(arguments.name)
            serve(functools.partial(_TIMED[name][0], arguments.work, options, arguments.original))
            return
        with np.load(arguments.images) as file:
            images = file["images"]
        found = _PEERS[name](arguments, images)
    except ImportError as error:
        print(f"{name} cannot be imported here ({error}): {_INSTALL[name]}", file=sys.stderr)
        raise SystemExit(2) from None
    np.savez(arguments.output, images=images, maker=np.array(arguments.peer), **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

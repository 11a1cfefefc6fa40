"""The configuration of a run: one typed dataclass tree. The rules it must keep are in config_rules.py.

Only the training loop and the command lines see a whole `Config`; every other part is handed the section or the values
it needs. Standard library only, so that reading a configuration costs nothing. Field types are what
`ml_collections.config_flags` can override on a command line: no Optional, no Literal; "" and 0 mean "not set".
"""

import dataclasses
import re
from typing import Any

from vit_jax.errors import ConfigError, printable

AUTO = "auto"  # of a field that a run resolves when it begins, and writes out then
DATA, FSDP = "data", "fsdp"  # the axes of run.mesh


@dataclasses.dataclass(slots=True)  # so that a misspelt field of a configuration file is an error
class Model:
    """What is trained."""

    checkpoint: str = ""  # to start from: a published name, a file (npz, safetensors) or a run's folder; "": random weights
    variant: str = ""  # without a checkpoint, a row of vit_jax.models.variants.VARIANTS, such as "B/16"
    keep_head: str = "auto"  # of the checkpoint: "true", "false" (a zero head), or "auto": if its classes have the same names
    dropout: float = 0.0  # after the positions, each MLP layer and the attention's output; in [0, 1)
    attention_dropout: float = 0.0  # on the attention weights; in [0, 1)
    stochastic_depth: float = 0.0  # share of the images that skip each branch of the last block; 0 at the first; in [0, 1)
    tune: str = "all"  # "head"; "attention", "lora" or "ssf", and the head; "frozen_embedding": all but the embedding
    lora_rank: int = 8  # of the two factors that LoRA adds to the query and value kernels; at most the model's width
    lora_alpha: float = 0.0  # their product is multiplied by alpha / rank; 0: alpha is the rank
    dtype: str = "auto"  # of the computation; "auto": bfloat16 on a GPU, else float32; parameters are always float32
    attention: str = "auto"  # implementation of attention; "cudnn" needs bfloat16; "auto": cuDNN if a trial run agrees with XLA


@dataclasses.dataclass(slots=True)
class Data:
    """What it is trained and tested on."""

    task: str = "cifar100"  # a name of `vit_jax data list`, or own images: "folder:PATH" or "csv:FILE"
    on_error: str = "raise"  # own images that cannot be read: an error, or "skip" to leave them out and count them
    train_split: str = ""  # in TFDS's language, such as "train[:98%]"; "": the task's training split
    test_split: str = ""  # the split that is evaluated, in TFDS's language; "": the task's test split
    validation_split: str = ""  # chooses the best state, so that test images do not; "own": the task's; "": the test split
    image_size: int = 224  # pixels, height and width of the model's input
    normalization: str = "google"  # "google": to [-1, 1]; "dataset": by the task's channel means and deviations


@dataclasses.dataclass(slots=True)
class Augment:
    """What happens to an image on its way into the model."""

    crop: str = "torchvision"  # distribution of torchvision or TensorFlow; "resize_crop": at 7/6 of the size; "pad"; "none"
    crop_area: tuple[float, float] = (0.05, 1.0)  # smallest and largest fraction of the image's area
    flip: bool = True  # mirror half of the images left to right
    padding: int = 4  # of the crop "pad": black pixels on each side of the stored image, of which its own size is cut out
    randaugment_layers: int = 0  # operations of RandAugment, one after the other; 0: none; published: 2
    randaugment_magnitude: float = 10.0  # of each operation, on the scale of big_vision, up to 30; 0: the identity
    erasing: float = 0.0  # probability that a random rectangle of an image is erased; in [0, 1]; published: 0.25 to 0.5
    mixup: float = 0.0  # both parameters of the beta distribution that weights two images; 0: off; published: 0.2 to 1
    cutmix: float = 0.0  # the same of CutMix, which replaces a rectangle; with mixup, each pair of images gets one of the two
    eval_crop: str = "none"  # of evaluation: the whole image, or "center": its central square, 7/8 of the shorter side


@dataclasses.dataclass(slots=True)
class Optimizer:
    """How gradients become updates."""

    name: str = "sgd"  # "sgd" with momentum, "adamw", "lamb" or "lars" for large batches, "muon" on the kernels of the blocks
    learning_rate: float = 0.03  # peak learning rate
    base_batch_size: int = 0  # batch size that the rate is given for, and scaled from; 0: the rate is as given
    rate_scaling: str = "linear"  # with base_batch_size: the rate times batch_size / base_batch_size, or its root: "sqrt"
    warmup_steps: int = 0  # the rate rises linearly from 0 for this many updates; fewer than training.steps
    decay: str = "cosine"  # after the warm-up: "cosine" to 0 or "linear" to 1e-5; the last update is one step before that end
    momentum: float = 0.9  # of SGD, LARS and Muon; b1 of AdamW, LAMB and Muon's Adam
    b2: float = 0.999  # of AdamW, LAMB and Muon's Adam
    weight_decay: float = 0.0  # on kernels only; SGD and LARS add it to the gradient, the others to the update
    clip_norm: float = 1.0  # largest global norm of the gradient; 0: not clipped
    accumulator_dtype: str = "bfloat16"  # type in which the momentum is stored
    layer_decay: float = 1.0  # the rate is multiplied by this once more for each block further from the head; in (0, 1]
    sam_rho: float = 0.0  # SAM, twice the work: the gradient is taken this far (in global norm) up the slope; 0: off
    ema: float = 0.0  # decay of the average of the parameters, which the run then yields; in [0, 1); 0: no average


@dataclasses.dataclass(slots=True)
class Training:
    """How many steps, how large, and how often to evaluate and save."""

    steps: int = 1000  # updates of the parameters
    epochs: float = 0.0  # if above 0, the number of steps is that of so many passes over the training images
    patience: int = 0  # evaluations without a better validation accuracy after which training ends; 0: all steps
    batch_size: int = 64  # images per update, over all devices
    label_smoothing: float = 0.0  # part of each label that is spread evenly over all classes; in [0, 1)
    grad_accum_steps: int = 1  # microbatches that a batch is split into, to save memory
    eval_every: int = 100  # steps between evaluations, of the validation split or else the test split; the last always is
    save_every: int = 100  # steps between saved states; the last step is always saved
    on_nan: str = "raise"  # on a training loss that is not finite; "rollback": go back and skip its batch, 3 times at most


@dataclasses.dataclass(slots=True)
class Run:
    """What does not change the numbers; a run may continue with other values."""

    data_dir: str = ""  # where TFDS keeps prepared data; "": $TFDS_DATA_DIR, else ~/tensorflow_datasets
    device_budget_mib: int = 4096  # a split of at most this size is kept on every device as uint8; a larger one is streamed
    data_workers: int = -1  # processes that read streamed images; -1: one for each CPU core, 16 at most; 0: the run's own
    eval_batch_size: int = 256  # images; rounded up to a multiple of the number of devices
    remat: bool = False  # compute each block again for the gradient: a fraction of the memory, a third more time
    parallel: str = "mesh"  # "mesh": jit over a mesh of all devices; "pmap": the same step under jax.pmap, on one host
    mesh: str = ""  # sizes of the mesh's axes: "data:4,fsdp:2" shares parameters and momentum in two; "": all devices on data
    deterministic: bool = False  # compile for a GPU with deterministic kernels, which are slower; other devices have no others
    watchdog_minutes: float = 10.0  # without a finished step, after which the stack of every thread is printed; 0: never
    expected: dict[str, float] = dataclasses.field(default_factory=dict)  # metric or its description → value to compare with


@dataclasses.dataclass(slots=True)
class Config:
    """One run. A run is a function of this and nothing else."""

    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    augment: Augment = dataclasses.field(default_factory=Augment)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    training: Training = dataclasses.field(default_factory=Training)
    run: Run = dataclasses.field(default_factory=Run)
    seed: int = 0  # seed of all random numbers; below 2**32


def fields(node: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Every field of a configuration: dotted name → (value, type), in the order of their definition."""
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(node):
        value, name = getattr(node, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            found |= fields(value, name + ".")
        else:
            found[name] = (value, field.type)
    return found


def shown(value: Any) -> str:
    """A value as an error message quotes it, whatever its size."""
    try:
        return printable(repr(value), 80)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number of more than 4,300 digits"


def mesh_sizes(text: str) -> dict[str, int]:
    """The size of each axis that `run.mesh` names, as in "data:4,fsdp:2"; none for "". Raises ConfigError."""
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else ():
        axis, _, size = part.strip().partition(":")
        if axis not in (DATA, FSDP) or axis in sizes or not re.fullmatch("[1-9][0-9]{0,5}", size):
            raise ConfigError(f"run.mesh must be sizes of the axes {DATA} and {FSDP}, as in 'data:4,fsdp:2', got {shown(text)}")
        sizes[axis] = int(size)
    return sizes


def difference(a: Config, b: Config) -> list[str]:
    """Names of fields that differ and change the numbers. "auto" equals every value.

    Those of `run` do not, nor does `training.on_nan`, so that a run whose loss was not finite can go on with another value.
    Of `training.steps` and `training.epochs` only the one that says how long `a` is counts.
    """
    same = "steps" if a.training.epochs else "epochs" if a.training.steps == b.training.steps else ""
    if same:
        a = dataclasses.replace(a, training=dataclasses.replace(a.training, **{same: getattr(b.training, same)}))
    ours, theirs = fields(a), fields(b)

    def differs(ours: Any, theirs: Any) -> bool:
        return ours != theirs and AUTO not in (ours, theirs)

    return [
        name for name in ours if not name.startswith(("run.", "training.on_nan")) and differs(ours[name][0], theirs[name][0])
    ]

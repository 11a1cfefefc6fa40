"""Any checkpoint on your own images or on any task, with steps and batch size from the number of images.

    python main.py --config configs/finetune.py:B/16,folder:photos

`photos` holds a folder of images for each class, or such folders in `train/` and `test/`. `csv:photos.csv` names images in a
file with the columns path, label and, optionally, split. Checkpoints: `python -m vit_jax.checkpoints list`, a file, or
`mini_8`, which comes with the package; tasks: `python -m vit_jax.data list`.

Every training image is seen 20 times, but between 12,800 and 320,000 images are seen in all: 200 to 5,000 steps of 64. The
rate of 0.01 is that of published fine-tunings of B/16 with SGD and batches of 64 to 128 on CIFAR-100 (93 %). Values given on
the command line take precedence, as in `--config.training.steps=500`.
"""

import dataclasses
import math
import sys

from vit_jax import Config
from vit_jax.checkpoints.load import architecture
from vit_jax.data.splits import count
from vit_jax.data.tasks import task
from vit_jax.errors import ConfigError

EPOCHS, LEAST, MOST = 20, 12_800, 320_000  # images seen


def get_config(argument: str = "") -> Config:
    checkpoint, _, name = argument.partition(",")
    if not checkpoint or not name:
        raise ConfigError("configs/finetune.py wants a checkpoint and a task, as in configs/finetune.py:B/16,folder:photos")
    config = Config()
    config.model.checkpoint = checkpoint
    config.data.task = name
    config.data.image_size = architecture(checkpoint)[1]
    # Unreadable images are counted or not when the run opens its data, as its data.on_error says.
    images = count(task(name), dataclasses.replace(config.data, on_error="skip"))
    config.augment.crop_area = (0.3, 1.0)
    config.optimizer.learning_rate = 0.01
    config.training.batch_size = min(64, 2 ** int(math.log2(images)))
    seen = min(max(EPOCHS * images, LEAST), MOST)
    config.training.steps = math.ceil(seen / config.training.batch_size)
    config.optimizer.warmup_steps = config.training.steps // 10
    config.training.eval_every = config.training.save_every = max(1, config.training.steps // 10)
    settings = (
        f"{config.training.steps:,} steps of {config.training.batch_size} images at a rate of {config.optimizer.learning_rate}"
    )
    print(f"{name} has {images:,} training images: {settings}, unless the command line says otherwise", file=sys.stderr)
    return config

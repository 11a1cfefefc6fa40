"""The embedded default: a small pre-trained ViT fine-tuned on ten classes of CIFAR-100, offline.

    python main.py --config configs/demo.py

About a minute and a half on 2 CPU cores. The same model from random weights:

    python main.py --config configs/demo.py --config.model.checkpoint= --config.model.variant=Mini/8 --workdir runs/demo-random
"""

from vit_jax import Config


def get_config() -> Config:
    config = Config()
    config.model.checkpoint = "mini_8"
    config.data.task = "cifar100_excerpt"
    config.data.image_size = 64
    config.augment.crop_area = (0.3, 1.0)
    config.optimizer.learning_rate = 0.03
    config.optimizer.warmup_steps = 8
    config.training.steps = 80
    config.training.batch_size = 64
    config.training.eval_every = 40
    config.training.save_every = 40
    config.run.expected = {"test/accuracy": 0.802, "test/accuracy from random weights": 0.504}
    return config

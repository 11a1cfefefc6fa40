"""A small ViT on CIFAR-100 without a checkpoint.

python main.py --config configs/cifar100_scratch.py
"""

from vit_jax import Config


def get_config() -> Config:
    config = Config()
    config.model.variant = "Mini/4"
    config.data.task = "cifar100"
    config.data.image_size = 32
    config.data.normalization = "dataset"
    config.augment.crop_area = (0.3, 1.0)
    config.augment.flip = True
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = 100
    config.training.steps = 40_000
    config.training.batch_size = 128
    config.training.eval_every = 1000
    config.training.save_every = 1000
    return config

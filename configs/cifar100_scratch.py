"""A plain ViT of 10.7 million parameters on CIFAR-100 without a checkpoint, for one GPU.

    python main.py --config configs/cifar100_scratch.py

150 epochs in batches of 512 images at 32 px, 64 patches of 4×4 pixels an image. Without pre-training, a ViT has to learn from
the augmentations that images may be moved, cut and mixed. CutMix, label smoothing, stochastic depth, weight decay and the
magnitude of RandAugment have the values of DeiT (Touvron et al. 2021). Each pair of images gets CutMix or a light mixup.

**Its accuracy is not measured yet.** Held-out images chose Muon (docs/recipes.md). On an H200, three seeds at once train with
44,100 images/s together, so their steps take 9 minutes. `python -m benchmarks.recipes scratch-gpu` trains three seeds.
Choose on `vit_jax ablate --held_out 'train[90%:]'`, not on test images. For a CPU, see configs/cifar100_nano.py.
"""

from vit_jax import Config


def get_config() -> Config:
    config = Config()
    config.model.variant = "Midi/4"
    config.model.stochastic_depth = 0.1
    config.data.task = "cifar100"
    config.data.image_size = 32
    config.data.normalization = "dataset"
    config.augment.crop = "pad"
    config.augment.flip = True
    config.augment.randaugment_layers = 2
    config.augment.randaugment_magnitude = 9.0
    config.augment.mixup = 0.2
    config.augment.cutmix = 1.0
    config.optimizer.name = "muon"
    config.optimizer.momentum = 0.95
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 500
    config.optimizer.weight_decay = 0.05
    config.training.epochs = 150
    config.training.batch_size = 512
    config.training.label_smoothing = 0.1
    config.training.eval_every = 5000
    config.training.save_every = 5000
    return config

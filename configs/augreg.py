"""Any published checkpoint on any task, fine-tuned as the AugReg models were.

    python main.py --config configs/augreg.py:R+Ti/16,cifar100

Names: `python -m vit_jax.checkpoints list` and `python -m vit_jax.data list`. The values lie in the grid of "How to train
your ViT?" (Steiner et al. 2021): SGD with momentum, batches of 512, 500 or 2,500 steps, rates of 0.001, 0.003, 0.01 or
0.03, cosine decay, gradients clipped to a norm of 1, no weight decay or dropout, Inception crops and flips. Expect what the
paper's table says of 30 and 300 epochs of B/16 on CIFAR-100: 91.6 % and 93.2 %, the best of that grid. For few training
images take `--config.training.steps=500`; on 8 or more devices `--config.training.grad_accum_steps=1`.
"""

from vit_jax import Config
from vit_jax.checkpoints.load import architecture
from vit_jax.errors import ConfigError


def get_config(argument: str = "") -> Config:
    model, _, task = argument.partition(",")
    if not model or not task:
        raise ConfigError("configs/augreg.py wants a checkpoint and a task, as in configs/augreg.py:R+Ti/16,cifar100")
    config = Config()
    config.model.checkpoint = model
    config.data.task = task
    config.data.image_size = architecture(model)[1]
    config.augment.crop = "tensorflow"
    config.augment.crop_area = (0.05, 1.0)
    config.augment.flip = True
    config.optimizer.learning_rate = 0.01
    config.optimizer.warmup_steps = 200
    config.training.steps = 2500
    config.training.batch_size = 512
    config.training.grad_accum_steps = 8  # as the original, to fit the memory of one device
    config.training.eval_every = 500
    config.training.save_every = 500
    return config

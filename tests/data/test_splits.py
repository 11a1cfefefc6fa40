"""Two splits that are opened together, and the warnings about them."""

from vit_jax.config import Data
from vit_jax.data.splits import open_splits, warnings
from vit_jax.data.tasks import task

EXCERPT = task("cifar100_excerpt")


def test_default_splits_are_those_of_the_task():
    assert [len(source) for source in open_splits(EXCERPT, Data())[:2]] == [1000, 500]
    assert [len(source) for source in open_splits(EXCERPT, Data(train_split="train[:64]", test_split="test[:50]"))[:2]] == [
        64,
        50,
    ]


def test_images_in_both_splits_and_repeated_images_give_warnings():
    def found(train: str, test: str, batch_size: int) -> list[str]:
        data = Data(train_split=train, test_split=test)
        return list(warnings(EXCERPT, data, open_splits(EXCERPT, data), batch_size))

    assert found("train[:64]", "test[:50]", 64) == []
    shared, repeated = found("train[:8]+test[:20]", "test[:50]", 32)
    assert shared.startswith("20 of the 50 test images are training images too (data.train_split = 'train[:8]+test[:20]'")
    assert repeated.startswith("training.batch_size = 32 is larger than the training split of 28 images")

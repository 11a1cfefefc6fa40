"""Each peer in its own process, as `check --against` runs them."""

import numpy as np
import pytest

from vit_jax.errors import CheckpointError
from vit_jax.formats.google import save_npz
from vit_jax.interop.parity import compare, peer_stages
from vit_jax.models.variants import build

FIELDS = dict(hidden_size=48, num_layers=2, num_heads=4, mlp_dim=100, num_classes=5, representation_size=24)


@pytest.mark.parametrize(
    ("peer", "absent"), [("timm", {"pre_logits", "logits"}), ("transformers", {"logits"}), ("original", set())]
)
def test_peer_stages_agree(peer, absent, request, random_params, random_images, our_stages):
    checkout = request.getfixturevalue(peer) if peer == "original" else request.getfixturevalue(peer) and None
    model = build("B/16", **FIELDS)
    params, images = random_params(model, 32), random_images(32)
    ours = our_stages(model, params, images)
    name = "huggingface" if peer == "transformers" else peer
    found = dict(compare(ours, peer_stages(name, model, params, None, images, original=checkout)))
    assert found.keys() == ours.keys() - absent and list(found)[:3] == ["embedding", "block_0", "block_1"]
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize("resnet", [(), (1, 1)])
def test_original_reads_a_hybrid_from_its_file(resnet, original, random_params, random_images, our_stages, tmp_path):
    model = build("R+Ti/16", hidden_size=48, num_layers=1, num_heads=4, mlp_dim=100, num_classes=5, patch_size=2,
                  resnet=resnet, resnet_width=32)  # fmt: skip
    params, images = random_params(model, 32), random_images(32)
    save_npz(tmp_path / "x.npz", params)
    theirs = peer_stages("original", model, params, None, images, original=original, source=tmp_path / "x.npz")
    found = compare(our_stages(model, params, images), theirs)
    assert len(found) == 4 and max(difference for _, difference in found) < 1e-5


def test_failing_peer_is_an_error_with_its_message(random_params, tmp_path):
    model = build("B/16", **FIELDS)
    with pytest.raises(CheckpointError, match="original failed: there is no vit_jax/models_vit.py below .*--original"):
        peer_stages("original", model, random_params(model, 32), None, np.zeros((1, 32, 32, 3)), original=tmp_path)

# SPDX-License-Identifier: Apache-2.0
import torch

from hf_nmsparse.fingerprint import digest, fingerprint, to_hex


def test_golden_values_are_stable():
    weight = torch.arange(64, dtype=torch.float32).reshape(4, 16) / 7
    assert to_hex(fingerprint(weight)) == "87d51e7d9466b6ab238f37a6ebf7082a"
    assert to_hex(digest(torch.arange(8, dtype=torch.uint8))) == "0da2ae50b3b4ebff8aa21ac543df8c6e"


def test_a_bfloat16_checkpoint_and_its_float32_copy_agree():
    weight = torch.randn(48, 96).bfloat16()
    assert torch.equal(fingerprint(weight), fingerprint(weight.float()))


def test_layout_in_memory_does_not_matter_but_shape_does():
    weight = torch.randn(32, 32)
    assert torch.equal(fingerprint(weight), fingerprint(weight.T.contiguous().T))
    assert not torch.equal(fingerprint(weight), fingerprint(weight.T))
    assert not torch.equal(fingerprint(weight), fingerprint(weight.reshape(16, 64)))


def test_other_weights_have_another_fingerprint():
    weight = torch.randn(300, 200)
    other = weight + 0.01 * torch.randn(300, 200)
    assert not torch.equal(fingerprint(weight), fingerprint(other))


def test_unreadable_weights_have_none():
    assert fingerprint(torch.empty(4, 4, device="meta")) is None
    assert fingerprint(torch.zeros(4, 4, dtype=torch.int8)) is None
    assert fingerprint(torch.empty(0)) is None


def test_a_digest_sees_every_bit_dtype_and_shape():
    data = torch.randint(0, 256, (5, 7), dtype=torch.uint8)
    reference = digest(data)
    for position in range(data.numel()):
        changed = data.clone()
        changed.view(-1)[position] ^= 1
        assert not torch.equal(digest(changed), reference)
    assert not torch.equal(digest(data.view(torch.int8)), reference)
    assert not torch.equal(digest(data.reshape(7, 5)), reference)
    assert torch.equal(digest(data.T.contiguous().T), reference)

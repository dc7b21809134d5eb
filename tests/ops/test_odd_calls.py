"""Odd calls: tensors of any strides are served, and raw ops called past the Python checks read no foreign memory."""

import pytest
import torch

import vlkernels as vk
from vlkernels.core import native

pytestmark = pytest.mark.skipif(native.load() is not None, reason="the compiled library is not built")


@pytest.mark.parametrize("impl", ["cpp", "torch", "reference"])
def test_any_strides_are_served(impl):
    layout, spread = vk.SegmentLayout([[3], [4]]), torch.randn(7, 3, 2, 16)
    index = torch.tensor([1, 9, 0, 9])[::2]
    served = vk.attention(*spread[..., ::2].unbind(1), layout=layout, kv_layout=layout, kv_index=index, impl=impl)
    packed = spread[..., ::2].contiguous()
    expected = vk.attention(*packed.unbind(1), layout=layout, kv_layout=layout, kv_index=index.contiguous(), impl=impl)
    assert torch.equal(served, expected)
    whole = vk.attention_qkvpacked(spread[..., ::2], layout=layout, impl=impl)
    assert torch.equal(whole, vk.attention_qkvpacked(packed, layout=layout, impl=impl))


@pytest.mark.parametrize("scale", [torch.full((1,), 0.5).expand(6), torch.linspace(0, 1, 12)[::2]], ids=["expanded", "strided"])
def test_row_scale_may_have_any_stride(scale):
    x = torch.randn(6, 16)
    served, expected = (vk.layer_norm(x, None, None, row_scale=s, impl="cpp") for s in (scale, scale.clone().contiguous()))
    assert torch.equal(served, expected)


def test_heads_without_width_are_refused():
    with pytest.raises(ValueError, match="width K of at least 1, got 0"):
        vk.attention_qkvpacked(torch.randn(3, 3, 2, 0), layout=vk.SegmentLayout([[3]]))


def test_the_raw_join_reads_no_foreign_memory():
    layout = vk.SegmentLayout([[3], [2]])
    with pytest.raises(RuntimeError, match="padded parts must have 2 samples, got 1"):
        torch.ops.vlkernels.join_segments([torch.randn(1, 3, 4)], [0], None, layout.starts, layout.lengths, 5)


def test_the_raw_attention_backward_reads_no_foreign_memory():
    layout, qkv = vk.SegmentLayout([[3]]), [torch.randn(3, 3, 2, 8)]
    where = [layout.starts, layout.lengths, None, None, None, vk.SegmentMask.full(1).table("cpu"), layout.sample_ids, None]
    lse = torch.ops.vlkernels.attention_cpp_forward(qkv, *where, 1.0, 0, 0)[1]
    with pytest.raises(RuntimeError, match=r"grad_out must be \[3, 2, 8\]"):
        torch.ops.vlkernels.attention_cpp_backward(torch.randn(1, 1, 48), None, qkv, *where, lse, 1.0, 0, 0)


def test_the_raw_embedding_needs_ids_for_tables():
    with pytest.raises(RuntimeError, match="tables need ids"):
        torch.ops.vlkernels.embed_layer_norm_forward(None, [torch.randn(2, 4)], *[None] * 6, 0, 0, 1e-5)

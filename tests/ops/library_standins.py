"""Libraries that need a card or a build, in plain PyTorch: the signatures and refusals of theirs that the peers rely on."""

import sys
import types

import torch
import torch.nn.functional as F


def install(monkeypatch):
    """Put all of them where an import finds them."""
    for name, members in MODULES.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


# apex.normalization.fused_layer_norm; one dtype, normalized_shape a list of ints


def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype == bias.dtype and not memory_efficient
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype and not memory_efficient
    return F.rms_norm(input, normalized_shape, weight, eps)


# apex.contrib.layer_norm.layer_norm


class FastLayerNormFN:
    @staticmethod
    def apply(x, gamma, beta, epsilon, memory_efficient=False):
        assert gamma.dtype == beta.dtype and x.is_contiguous() and not memory_efficient
        return F.layer_norm(x, gamma.shape, gamma, beta, epsilon)


# liger_kernel.transformers.functional


def liger_layer_norm(X, W, B, eps):
    return F.layer_norm(X, W.shape, W, B, eps)


class InPlace(torch.autograd.Function):
    """Writes into the cotangent, as Liger's RMSNorms do unless they are told not to."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy.mul_(2).div(2)


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    y = F.rms_norm(X, W.shape, W + offset, eps)
    return InPlace.apply(y) if in_place else y


def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    return liger_rms_norm(X + R, W, eps, offset, casting_mode, in_place), X + R


# flash_attn.ops.triton.layer_norm


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
):
    assert x1 is weight1 is bias1 is rowscale is None and not prenorm and not residual_in_fp32
    z = F.dropout(x, dropout_p)
    return F.layer_norm(z if residual is None else z + residual, weight.shape, weight, bias, eps)


def rms_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
):
    assert bias is x1 is weight1 is bias1 is rowscale is None and not prenorm and not residual_in_fp32
    z = F.dropout(x, dropout_p)
    return F.rms_norm(z if residual is None else z + residual, weight.shape, weight, eps)


# quack.rmsnorm: kernels without autograd, parameters of LayerNorm in float32


def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
    assert x.dim() == 2 and weight.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
    assert return_rstd and return_mean
    wide = x.float()
    mean, variance = wide.mean(1), wide.var(1, unbiased=False)
    return F.layer_norm(wide, weight.shape, weight, bias, eps).to(x.dtype), (variance + eps).rsqrt(), mean


def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
    assert dout.is_contiguous() and has_bias
    xhat, dy = (x.float() - mean[:, None]) * rstd[:, None], dout.float()
    g = dy * weight
    dx = rstd[:, None] * (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True))
    return dx.to(x.dtype), (dy * xhat).sum(0), dy.sum(0)


def rmsnorm(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False):
    assert bias is out_dtype is residual_dtype is None and not prenorm
    return F.rms_norm(x if residual is None else x + residual, weight.shape, weight, eps)


# flash_attn.bert_padding


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    assert hidden_states.shape[:2] == attention_mask.shape and unused_mask is None
    indices = attention_mask.flatten().nonzero().flatten()
    sizes = attention_mask.sum(-1, dtype=torch.int32)
    bounds = F.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, bounds, sizes.max().item(), sizes


def pad_input(hidden_states, indices, batch, seqlen):
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def index_first_axis(input, indices):
    assert indices.unique().numel() == indices.numel(), "its backward would keep one of the gradients"
    return input.index_select(0, indices)


MODULES = {
    "apex.normalization.fused_layer_norm": {
        "fused_layer_norm_affine": fused_layer_norm_affine,
        "fused_rms_norm_affine": fused_rms_norm_affine,
    },
    "apex.contrib.layer_norm.layer_norm": {"FastLayerNormFN": FastLayerNormFN},
    "liger_kernel.transformers.functional": {
        "liger_layer_norm": liger_layer_norm,
        "liger_rms_norm": liger_rms_norm,
        "liger_fused_add_rms_norm": liger_fused_add_rms_norm,
    },
    "flash_attn.ops.triton.layer_norm": {"layer_norm_fn": layer_norm_fn, "rms_norm_fn": rms_norm_fn},
    "quack.rmsnorm": {"layernorm_fwd": layernorm_fwd, "layernorm_bwd": layernorm_bwd, "rmsnorm": rmsnorm},
    "flash_attn.bert_padding": {"unpad_input": unpad_input, "pad_input": pad_input, "index_first_axis": index_first_axis},
}

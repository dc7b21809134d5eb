"""impl "triton" of vk.attention where there is no card: who is chosen for a card's tensors, and that the choice compiles."""

import subprocess
import sys

import pytest
import torch

import vlkernels as vk
from vlkernels.core import dispatch, triton_runtime
from vlkernels.testing.arguments import map_tensors


@pytest.fixture
def card(monkeypatch):
    """Dispatch believes that Triton has a card; meta tensors stand for the card's."""
    monkeypatch.setattr(triton_runtime, "_missing_on_a_card", lambda: None)


def by_position(tokens):
    return vk.RelativeBias(torch.arange(tokens, dtype=torch.int32)[:, None], [torch.zeros(8, 1)], num_buckets=8, max_distance=20)


def on_meta(value):
    return map_tensors(value, lambda t: torch.empty_like(t, device="meta").requires_grad_(t.requires_grad))


@pytest.mark.parametrize(
    "change, expected",
    (
        ({}, "triton"),
        ({"dropout_p": 0.1}, "triton"),
        ({"bias": torch.zeros(1, 1, 9, 9)}, "triton"),
        ({"bias": by_position(9)}, "triton"),
        ({"softmax_scale": 0.0}, "reference"),
        ({"qkv": torch.randn(9, 3, 1, 8, dtype=torch.float64)}, "reference"),
        ({"qkv": torch.randn(9, 3, 1, 264)}, "reference"),
    ),
)
def test_auto_takes_triton_on_a_card_where_it_serves(card, change, expected):
    arguments = {"qkv": torch.randn(9, 3, 1, 8), "layout": vk.SegmentLayout([[4, 5]])} | change
    with dispatch.recorded() as served:
        vk.attention_qkvpacked(**on_meta(arguments))
    assert served == [("attention_qkvpacked", expected)]


def test_without_a_card_or_an_interpreter_the_reason_is_said():
    qkv, layout = torch.randn(4, 3, 1, 8), vk.SegmentLayout([[4]])
    with pytest.raises(ValueError, match='cannot run with impl="triton": on a CPU it runs in Triton\'s interpreter only'):
        vk.attention_qkvpacked(qkv, layout=layout, impl="triton")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='cannot run with impl="triton": there is no CUDA device'):
            vk.attention_qkvpacked(*on_meta((qkv,)), layout=on_meta(layout), impl="triton")


def test_a_compiled_graph_holds_the_choice(card):
    layout, mask = on_meta(vk.SegmentLayout([[4, 5]])), vk.SegmentMask.prefix_lm()
    mask.table("meta")  # as after a warm-up: a graph cannot make a meta tensor of numbers

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(qkv):
        return vk.attention_qkvpacked(qkv, layout=layout, mask=mask)

    qkv = torch.empty(9, 3, 1, 8, device="meta", requires_grad=True)
    out = call(qkv)
    assert out.shape == (9, 1, 8) and torch.autograd.grad(out, qkv, torch.empty_like(out))[0].shape == qkv.shape


def test_the_op_works_without_triton():
    code = "import sys; sys.modules['triton'] = None; import vlkernels.ops.attention.spec, vlkernels.__main__"
    subprocess.run([sys.executable, "-c", code], check=True)


def shifted(tensor, by):
    """The same values, ``by`` elements behind the start of their memory."""
    return torch.cat((tensor.new_zeros(by), tensor.flatten()))[by:].view(tensor.shape)


def launches_of(kind, shift):
    """The kernels of a step of two to five samples; what is read beside q, k, v lies ``shift`` elements into its memory."""
    from vlkernels.ops.attention.gpu import launches as streaming, resident, variants

    layout = vk.SegmentLayout([[4, 3 + shift]] * (2 + shift))
    call = variants._call(torch.bfloat16, 16, True, layout, None if kind == "slots" else kind)
    side_inputs = ("starts", "lengths", "table", "bias", "coordinates", "sample_ids")
    call = call._replace(**{name: shifted(getattr(call, name), shift) for name in side_inputs if getattr(call, name) is not None})
    q, (dq, dk, dv) = call.heads[0], torch.empty_like(call.qkv[0]).unbind(1)
    out, lse = torch.empty_like(dq), torch.empty(q.shape[1], q.shape[0])
    if kind == "slots":
        return [resident.forward_launch(call, out, lse, 90), resident.backward_launch(call, out, lse, None, (dq, dk, dv), 90)]
    found = [
        streaming.forward_launch(call, out, lse, 90),
        streaming.query_gradient_launch(call, out, out, lse, None, lse, dq, None, 90),
        streaming.key_gradient_launch(call, out, lse, lse, dk, dv, 90),
    ]
    if kind == "shared":
        found.append(streaming.shared_gradient_launch(call, out, lse, lse, torch.empty(1, *call.bias.shape), 90))
    if isinstance(kind, int):
        replicas = 1 + 15 * shift  # more for shorter tables
        counts = torch.empty(replicas, *call.distance_bias.shape, dtype=torch.int64)
        found.append(streaming.distance_gradient_launch(call, out, lse, lse, counts, torch.empty(()), 90))
    return found


@pytest.mark.parametrize("kind", ("slots", "shared", "own", 1))
def test_no_size_and_no_place_in_memory_of_a_batch_compiles_another_kernel(kind):
    pytest.importorskip("triton")
    from benchmarks import offline

    with offline.card(90):
        keys = [[identity(launch) for launch in launches_of(kind, shift)] for shift in (0, 1, 2, 3)]
    assert all(key == keys[0] for key in keys[1:])


def identity(launch):
    """What Triton chooses a compiled kernel by: the types of the arguments, and what it knows of them."""
    from triton.runtime.driver import driver

    *_, binder = launch.kernel.device_caches[driver.active.get_current_device()]
    _, specialization, _ = binder(*launch.arguments, debug=False, instrumentation_mode="", **launch.options)
    return specialization

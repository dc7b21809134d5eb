"""What is special to the transport distance: known values, joint streams, empty sides, extremes, graphs."""

import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import vlkernels as vk
from vlkernels.core import dispatch, native
from vlkernels.core.spec import InputMaker
from vlkernels.ops.optimal_transport import spec

HERE = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "cpp" and native.load() is not None, reason="the compiled library is not built"
        ),
    )
    for name in ("cpp", "reference")
]
each_impl = pytest.mark.parametrize("impl", HERE)
TEXTS, IMAGES = [3, 1, 5, 2], [7, 4, 1, 9]
SPEC = spec.SPECS[0]
UNITER_LIKE = SPEC.benchmarks["b64 text 10-20 regions 10-100"].make


def layout_of(lengths):
    return vk.SegmentLayout([[n] for n in lengths])


def waves(rows, step, dtype=torch.float32):
    angles = torch.arange(1, rows * 16 + 1, dtype=torch.float64) * step
    return torch.sin(angles).view(rows, 16).to(dtype)


def one_sample(images, texts, **options):
    layouts = {"image_layout": layout_of([len(images)]), "text_layout": layout_of([len(texts)])}
    return vk.optimal_transport(images, texts, **layouts, **options)


def padded_transport(images, texts, image_lengths, text_lengths, beta=0.5, iterations=50):
    """The published algorithm on padded samples, with large numbers instead of infinities in the padding."""

    def presence(lengths):
        return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(images.dtype)

    def padded(rows, lengths):
        return torch.nn.utils.rnn.pad_sequence(rows.split(lengths), batch_first=True)

    has_text, has_image = presence(text_lengths), presence(image_lengths)
    m, n = has_text.sum(1, keepdim=True), has_image.sum(1, keepdim=True)
    similarity = F.cosine_similarity(
        padded(texts, text_lengths)[:, :, None], padded(images, image_lengths)[:, None], dim=3, eps=1e-10
    )
    both = has_text[:, :, None] * has_image[:, None]
    cost = (1 - similarity) * both
    kernel, plan, sigma = both * (-cost.detach() / beta).exp(), both.clone(), has_text / m
    for _ in range(iterations):
        q = kernel * plan
        delta = 1 / (n * torch.einsum("bmn,bm->bn", q, sigma) + 1e4 * (1 - has_image))
        sigma = 1 / (m * torch.einsum("bmn,bn->bm", q, delta) + 1e4 * (1 - has_text))
        plan = torch.einsum("bm,bmn,bn->bmn", sigma, q, delta)
    return (plan * cost).sum((1, 2))


# --- known values -------------------------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize(
    "options, distances, norms",
    [
        ({}, [0.96053334, 1.01267384, 0.99441956, 0.97347220], [0.26427673, 0.23620628]),
        (
            {"beta": 1.0, "iterations": 7},
            [0.98789214, 1.01267384, 0.99441956, 0.99130740],
            [0.20149493, 0.21276300],
        ),
        (
            {"beta": 0.1, "iterations": 20},
            [0.95974484, 1.01267384, 0.99441956, 0.97325098],
            [0.26954814, 0.23953382],
        ),
    ],
)
def test_the_published_implementation_gave_these_numbers(impl, options, distances, norms):
    texts, images = waves(11, 0.7).requires_grad_(), waves(21, 1.1).requires_grad_()
    layouts = {"image_layout": layout_of(IMAGES), "text_layout": layout_of(TEXTS)}
    found = vk.optimal_transport(images, texts, **layouts, **options, impl=impl)
    assert found.tolist() == pytest.approx(distances, abs=5e-7)
    gradients = torch.autograd.grad(found.sum(), (texts, images))
    assert [g.norm().item() for g in gradients] == pytest.approx(norms, abs=5e-7)


@each_impl
@pytest.mark.parametrize("options", [{}, {"beta": 0.2, "iterations": 11}])
def test_padded_samples_agree(impl, options):
    generator = random.Random(3)
    image_lengths, text_lengths = ([generator.randint(1, 40) for _ in range(12)] for _ in range(2))
    images, texts = (torch.randn(sum(n), 48, dtype=torch.float64) for n in (image_lengths, text_lengths))
    expected = padded_transport(images, texts, image_lengths, text_lengths, **options)
    layouts = {"image_layout": layout_of(image_lengths), "text_layout": layout_of(text_lengths)}
    dtype = torch.float64 if impl == "reference" else torch.float32
    found = vk.optimal_transport(images.to(dtype), texts.to(dtype), **layouts, **options, impl=impl)
    assert found.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@each_impl
def test_one_token_each_costs_one_minus_the_cosine(impl):
    image, text = (torch.tensor([row], requires_grad=True) for row in ([3.0, 4.0], [2.0, 0.0]))
    distance = one_sample(image, text, impl=impl)
    assert distance.item() == pytest.approx(0.4, abs=1e-7)
    of_image, of_text = torch.autograd.grad(distance, (image, text))
    # d(1 - cos) = -(other unit row, across the own one) / own norm
    torch.testing.assert_close(of_image, torch.tensor([[-0.128, 0.096]]))
    torch.testing.assert_close(of_text, torch.tensor([[0.0, -0.4]]))


@each_impl
def test_one_token_against_many_costs_their_mean(impl):
    images = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, -1.0], [5.0, 0.0]])
    text = torch.tensor([[1.0, 0.0]])
    expected = (0 + 1 + 2 + 1 + 0) / 5
    assert one_sample(images, text, impl=impl).item() == pytest.approx(expected, abs=1e-6)
    assert one_sample(text, images, impl=impl).item() == pytest.approx(expected, abs=1e-6)


@each_impl
@pytest.mark.parametrize("iterations", [1, 2, 50])
def test_two_against_two_by_hand(impl, iterations):
    """Costs [[0, 1], [1, 0]]: by symmetry step t keeps exp(-t / beta) of a half beside the diagonal."""
    axes = torch.eye(2)
    off = torch.exp(torch.tensor(-iterations / 0.5, dtype=torch.float64))
    expected = (off / (1 + off)).item()
    distance = one_sample(axes, axes, iterations=iterations, impl=impl).item()
    assert distance == pytest.approx(expected, rel=2e-6, abs=1e-30)


@each_impl
def test_the_first_update_starts_from_uniform_texts(impl):
    """One step on two texts and three images: images are scaled before texts, and the order shows."""
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    costs = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    kernel = torch.exp(-costs / 0.5)
    delta = 1 / (3 * (kernel / 2).sum(0))
    sigma = 1 / (2 * (kernel * delta).sum(1))
    expected = (sigma[:, None] * kernel * delta * costs).sum().item()
    assert one_sample(images, texts, iterations=1, impl=impl).item() == pytest.approx(expected, abs=1e-6)
    assert one_sample(texts, images, iterations=1, impl=impl).item() != pytest.approx(expected, abs=1e-3)


def test_the_peer_computes_the_same():
    """What is timed beside the op: its distances, and its gradients row by row."""
    arguments = UNITER_LIKE(InputMaker(torch.float32))
    call, (images, texts) = SPEC.peers["eager, padded"].prepare(**arguments)
    theirs, mine = call(), vk.optimal_transport(**arguments)
    torch.testing.assert_close(theirs, mine, rtol=0, atol=2e-6)
    (joint,) = torch.autograd.grad(mine.sum(), arguments["image_tokens"])
    of_rows = vk.unpack(joint, arguments["image_layout"])
    for segment, found in zip((1, 0), torch.autograd.grad(theirs.sum(), (images, texts)), strict=True):
        torch.testing.assert_close(found, of_rows[segment], rtol=1e-4, atol=1e-7)


# --- streams and layouts ------------------------------------------------------------------------------------


@each_impl
def test_a_joint_stream_is_read_in_place(impl):
    lengths = [[3, 7, 2], [1, 4, 0], [5, 1, 1], [2, 9, 3]]
    layout = vk.SegmentLayout(lengths, capacity=50)
    hidden = torch.randn(50, 16, requires_grad=True)
    joint = vk.optimal_transport(
        hidden, hidden, image_layout=layout, text_layout=layout, image_segment=1, text_segment=0, impl=impl
    )
    texts, images = (vk.take_segments(hidden, layout, (s,)) for s in (0, 1))
    layouts = {"image_layout": layout_of(IMAGES), "text_layout": layout_of(TEXTS)}
    packed = vk.optimal_transport(images, texts, **layouts, impl=impl)
    assert torch.equal(joint, packed)
    cotangent = torch.randn(4)
    mine, expected = (torch.autograd.grad(d, hidden, cotangent)[0] for d in (joint, packed))
    torch.testing.assert_close(mine, expected)
    others = layout.token_segment() % 3 == 2  # the third segment, and -1: nobody's
    assert (mine[others] == 0).all() and (mine[~others].abs().sum(1) > 0).all()


@each_impl
def test_empty_sides_cost_nothing(impl):
    layouts = {"image_layout": layout_of([0, 3, 0, 2]), "text_layout": layout_of([4, 0, 0, 2])}
    images, texts = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    distances = vk.optimal_transport(images, texts, **layouts, impl=impl)
    assert distances[:3].tolist() == [0, 0, 0] and distances[3] > 0
    of_images, of_texts = torch.autograd.grad(distances.sum(), (images, texts))
    assert (of_images[:3] == 0).all() and (of_texts[:4] == 0).all()
    assert (of_images[3:] != 0).any() and (of_texts[4:] != 0).any()


@each_impl
def test_only_one_side_wants_a_gradient(impl):
    images, texts = torch.randn(5, 8), torch.randn(3, 8, requires_grad=True)
    one_sample(images, texts, impl=impl).sum().backward()
    both = texts.detach().requires_grad_()
    expected = torch.autograd.grad(one_sample(images.requires_grad_(), both, impl=impl).sum(), both)[0]
    assert torch.equal(texts.grad, expected) and images.grad is None


@each_impl
def test_rows_of_any_stride_are_served(impl):
    images, texts = torch.randn(5, 2, 8).transpose(1, 2)[..., 0], torch.randn(8, 3).T
    expected = one_sample(images.contiguous(), texts.contiguous(), impl=impl)
    assert torch.equal(one_sample(images, texts, impl=impl), expected)


@pytest.mark.skipif(native.load() is not None, reason="needs the compiled library")
@torch.no_grad()
def test_a_loose_bound_of_the_lengths_costs_no_memory():
    tokens, bounds = torch.randn(5, 8), torch.tensor([0, 3, 5])
    exact, loose = (vk.SegmentLayout.from_cu_seqlens(bounds, max_seqlen=n) for n in (3, 2**40))
    found, expected = (
        vk.optimal_transport(tokens, tokens.flip(1), image_layout=layout, text_layout=layout, impl="cpp")
        for layout in (loose, exact)
    )
    assert torch.equal(found, expected)


# --- numbers at the edge ------------------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("length", [1, 2, 17, 512])
def test_equal_and_opposite_tokens(impl, length):
    same = torch.ones(length, 6)
    assert one_sample(same, same, impl=impl).item() == pytest.approx(0, abs=1e-6)
    assert one_sample(same, -same, impl=impl).item() == pytest.approx(2, abs=1e-5)


def equal_and_opposite(samples, axes):
    """Tokens along a few axes in uneven numbers: pairs that the first steps give up are needed again later."""
    generator = random.Random(1)
    for _ in range(samples):
        directions = torch.randn(axes, generator.randint(1, 5))
        directions = torch.cat((directions, -directions))
        counts = generator.randint(1, 40), generator.randint(1, 40)
        yield [directions[torch.randint(0, 2 * axes, (count,))] for count in counts]


def unfloored_transport(images, texts, beta, iterations):
    """The published algorithm on logarithms in float64, where no share is too small."""
    texts, images = (F.normalize(tokens.double(), dim=1) for tokens in (texts, images))
    cost = 1 - texts @ images.T
    log_m, log_n = (torch.tensor(float(n)).double().log() for n in cost.shape)
    plan, text_scale = torch.zeros_like(cost), -log_m
    for _ in range(iterations):
        weighted = plan - cost / beta
        image_scale = -log_n - (weighted + text_scale).logsumexp(0)
        text_scale = (-log_m - (weighted + image_scale).logsumexp(1))[:, None]
        plan = text_scale + weighted + image_scale
    return (plan.exp() * cost).sum().item()


@each_impl
@pytest.mark.parametrize("beta, iterations", [(0.5, 50), (0.5, 400), (0.1, 50), (0.1, 400)])
def test_plans_that_reach_the_floor_are_the_definitions(impl, beta, iterations):
    options = {"beta": beta, "iterations": iterations}
    for images, texts in equal_and_opposite(8, axes=3):
        found = one_sample(images, texts, **options, impl=impl)
        expected = one_sample(images.double(), texts.double(), **options)
        assert found.item() == pytest.approx(expected.item(), abs=1e-5)


@each_impl
@pytest.mark.parametrize("beta, iterations", [(0.5, 50), (0.1, 10), (0.2, 20)])
def test_up_to_100_beta_steps_the_floor_changes_nothing(impl, beta, iterations):
    dtype, tolerance = (torch.float64, 1e-13) if impl == "reference" else (torch.float32, 1e-5)
    for images, texts in equal_and_opposite(30, axes=2):
        found = one_sample(images.to(dtype), texts.to(dtype), beta=beta, iterations=iterations, impl=impl)
        expected = unfloored_transport(images, texts, beta, iterations)
        assert found.item() == pytest.approx(expected, abs=tolerance)


def test_beyond_100_beta_steps_the_floor_gives_another_plan():
    """Entries at the floor come back before those that fell lower: MATH.md says so, and where."""
    apart = 0.0
    for images, texts in equal_and_opposite(60, axes=2):
        floored = one_sample(images.double(), texts.double(), beta=0.1).item()
        apart = max(apart, abs(floored - unfloored_transport(images, texts, 0.1, 50)))
    assert apart > 0.05


@each_impl
def test_long_samples(impl):
    images, texts = torch.randn(512, 20), torch.randn(400, 20)
    exact = padded_transport(images.double(), texts.double(), [512], [400])
    torch.testing.assert_close(one_sample(images, texts, impl=impl).double(), exact, rtol=0, atol=1e-5)


@each_impl
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_sample(impl, poison):
    layouts = {
        "image_layout": layout_of([3, 2, 4]),
        "text_layout": vk.SegmentLayout([[2], [5], [1]], capacity=9),
    }
    images, texts = torch.randn(9, 8), torch.randn(9, 8)
    texts[8] = poison  # nobody's
    clean = vk.optimal_transport(images, texts, **layouts, impl=impl)
    assert clean.isfinite().all()
    images[4, 1] = poison
    images, texts = images.requires_grad_(), texts.requires_grad_()
    distances = vk.optimal_transport(images, texts, **layouts, impl=impl)
    assert distances[1].isnan() and torch.equal(distances[::2], clean[::2])
    of_images, of_texts = torch.autograd.grad(distances.sum(), (images, texts))
    assert of_images[3:5].isnan().any() and of_images[[0, 1, 2, 5, 6, 7, 8]].isfinite().all()
    assert of_texts[2:7].isnan().any() and of_texts[[0, 1, 7, 8]].isfinite().all()


@each_impl
def test_autocast_leaves_it_in_float32(impl):
    images, texts = torch.randn(6, 64), torch.randn(4, 64)
    expected = one_sample(images, texts, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(one_sample(images, texts, impl=impl), expected)


# --- one definition, one graph, the same bits ---------------------------------------------------------------


def test_the_plan_is_a_constant_of_the_gradient():
    """Were it differentiated too, the gradient would be another one: hence `OpSpec.held`."""
    images, texts = (torch.randn(rows, 5, dtype=torch.float64) for rows in (6, 4))
    images.requires_grad_()
    gradient = torch.autograd.grad(one_sample(images, texts).sum(), images)[0]
    direction, step = torch.randn_like(images), 1e-6
    with torch.no_grad():
        ends = [one_sample(images + sign * step * direction, texts) for sign in (1, -1)]
    total = ((ends[0] - ends[1]) / (2 * step)).item()
    assert abs(total - (gradient * direction).sum().item()) > 1e-3 * abs(total)


@pytest.mark.skipif(native.load() is not None, reason="needs the compiled library")
@pytest.mark.parametrize("level", native.CPU_ISA_LEVELS)
def test_results_do_not_depend_on_threads(level):
    arguments = UNITER_LIKE(InputMaker(torch.float32)) | {"impl": "cpp"}
    hidden = arguments["image_tokens"]

    def results():
        distances = vk.optimal_transport(**arguments)
        return distances.detach(), torch.autograd.grad(distances, hidden, torch.linspace(-1, 1, 64))[0]

    threads, expected = torch.get_num_threads(), results()
    try:
        native.limit_cpu_isa(level)
        once = results()
        for one, other in zip(once, expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        torch.set_num_threads(3)
        assert all(torch.equal(one, other) for one, other in zip(results(), once))
    finally:
        native.limit_cpu_isa(native.CPU_ISA_LEVELS[-1])
        torch.set_num_threads(threads)


@each_impl
def test_one_graph_serves_all_layouts(impl):
    torch._dynamo.reset()
    counter, generator = CompileCounterWithBackend("eager"), random.Random(0)

    def loss(hidden, layout):
        distances = vk.optimal_transport(
            hidden, hidden, image_layout=layout, text_layout=layout, image_segment=1, impl=impl, iterations=3
        )
        return distances.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for trial in range(60):
        lengths = [[generator.randint(2, 6), generator.randint(2, 9)] for _ in range(generator.randint(2, 9))]
        layout = vk.SegmentLayout(lengths)
        hidden = torch.randn(layout.num_tokens, 12, requires_grad=True)
        found = compiled(hidden, layout)
        if trial % 10 == 0:
            mine, expected = (
                torch.autograd.grad(value, hidden)[0] for value in (found, loss(hidden, layout))
            )
            torch.testing.assert_close(mine, expected)
    assert counter.frame_count <= 2


def test_the_compiled_kernel_serves_by_default():
    if native.load() is not None:
        pytest.skip("needs the compiled library")
    with dispatch.recorded() as served:
        one_sample(torch.randn(2, 4), torch.randn(3, 4))
        one_sample(torch.randn(2, 4).double(), torch.randn(3, 4).double())
    assert served == [("optimal_transport", "cpp"), ("optimal_transport", "reference")]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_tokens": torch.randn(6, 7)}, "text_tokens must be [num_tokens, D] = [6, 8], got [6, 7]"),
        ({"image_tokens": torch.randn(4, 8)}, "image_tokens must be [num_tokens, D] = [5, any], got [4, 8]"),
        ({"text_tokens": torch.randn(6, 8).half()}, "text_tokens must be float32, got float16"),
        ({"text_layout": layout_of([6])}, "text_layout must have the samples of image_layout = 2, got 1"),
        ({"image_segment": 1}, "image_segment must be an index below 1, got 1"),
        ({"text_segment": -1}, "text_segment must be an index below 1, got -1"),
        ({"beta": 0.05}, "beta must be finite and at least 0.1, got 0.05"),
        ({"beta": float("nan")}, "beta must be finite and at least 0.1, got nan"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "image_tokens": torch.randn(5, 8),
        "text_tokens": torch.randn(6, 8),
        "image_layout": layout_of([3, 2]),
        "text_layout": layout_of([2, 4]),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        vk.optimal_transport(**(arguments | change))


@pytest.mark.skipif(native.load() is not None, reason="needs the compiled library")
def test_the_raw_op_reads_no_foreign_memory():
    tokens, layout = torch.randn(5, 8), layout_of([3, 2])
    where = [layout.starts, layout.lengths, layout.starts, layout.lengths, 0, 0]
    with pytest.raises(RuntimeError, match="more than there is room for"):
        torch.ops.vlkernels.optimal_transport_forward(tokens, tokens, *where, 2, 3, 0.5, 50, True)
    with pytest.raises(RuntimeError, match="sample 1 has 2 rows from row 3 of 4 of text_tokens"):
        torch.ops.vlkernels.optimal_transport_forward(tokens, tokens[:4], *where, 3, 3, 0.5, 50, True)
    with pytest.raises(RuntimeError, match="sample 1 of text_tokens begins at row 2, the one before .* 3"):
        overlapping = [*where[:2], layout.starts - torch.tensor([[0], [1]], dtype=torch.int32), *where[3:]]
        torch.ops.vlkernels.optimal_transport_forward(tokens, tokens, *overlapping, 3, 3, 0.5, 50, True)
    with pytest.raises(RuntimeError, match="grad_distances must have 2 elements"):
        plans = torch.zeros(2, 3, 3)
        torch.ops.vlkernels.optimal_transport_backward(torch.ones(1), tokens, tokens, *where, plans)

"""Our own CPU kernels: the products that other ways give, whatever rows and threads there are, and
what is said where there are none."""

import copy
import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import random_ids, random_model, tiny

from common import native
from inference import cpu_kernels
from inference.decode import Decoder
from inference.packed import quantised
from inference.weights import Table

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(
    not cpu_kernels.usable(CPU), reason=f"no CPU kernels: {cpu_kernels.missing()}"
)
# (out, in): less than a register, whole groups, several groups and a part, wide and narrow
SHAPES = [(7, 5), (100, 64), (33, 70), (512, 130), (9, 700), (20, 1000)]
BITS = [32, 16, 8, 4]


def whole(tensors: dict[str, torch.Tensor], inputs: int) -> torch.Tensor:
    """The matrix (out, in) in fp32 that quantised tensors stand for."""
    table = Table(tensors, inputs)
    return table(torch.arange(table.held.size(0)))


@needs_kernels
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_that_of_the_weights_as_they_were_rounded(shape, bits):
    outputs, inputs = shape
    tensors = quantised(torch.randn(shape), bits)
    stack = cpu_kernels.Stack([tensors])
    for rows in (1, 3, 9):
        x = torch.randn(rows, inputs)
        add = torch.randn(rows, outputs)
        bias = torch.randn(outputs)
        y = stack(x, add, 0.5, bias=bias)
        expected = x @ whole(tensors, inputs).T + 0.5 * add + bias
        # For integers each x is off by up to half of 3/32,767, at random, and w is up to 3.
        torch.testing.assert_close(y, expected, atol=2e-4 * inputs**0.5, rtol=1e-5)


@needs_kernels
def test_registers_of_either_width_give_the_same_but_for_rounding(monkeypatch):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("no AVX-512: the other tests have the narrow ones")
    weight = torch.randn(50, 330)
    x = torch.randn(9, 330)
    stacks = [cpu_kernels.Stack([quantised(weight, bits)]) for bits in BITS]
    wide = [stack(x, finish="gelu") for stack in stacks]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    cpu_kernels.LIBRARY.forget()
    try:
        assert native.flags_here() == native.FLAGS
        for stack, expected in zip(stacks, wide, strict=True):
            torch.testing.assert_close(stack(x, finish="gelu"), expected, atol=1e-4, rtol=1e-4)
    finally:
        cpu_kernels.LIBRARY.forget()


@needs_kernels
@pytest.mark.parametrize("bits", BITS)
def test_a_row_is_the_same_whatever_rows_and_threads_there_are(bits):
    # large enough for several threads
    stack = cpu_kernels.Stack([quantised(torch.randn(701, 200), bits)])
    x = torch.randn(9, 200)
    together = stack(x)
    assert torch.equal(together, torch.cat([stack(row) for row in x.split(1)]))
    threads = torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(stack(x), together)
    finally:
        torch.set_num_threads(threads)


@needs_kernels
@pytest.mark.parametrize("bits", BITS)
def test_matrices_of_several_sizes_are_one_call(bits):
    shapes = [(10, 70), (4, 130), (16, 64)]
    tensors = [quantised(torch.randn(shape), bits) for shape in shapes]
    x = torch.randn(3, 5, 150)
    stack = cpu_kernels.Stack(tensors, inputs=[shape[1] for shape in shapes])
    y = stack(x)
    assert y.shape == (3, 5, 16)
    for s, (outputs, inputs) in enumerate(shapes):
        expected = x[s, :, :inputs] @ whole(tensors[s], inputs).T
        torch.testing.assert_close(y[s, :, :outputs], expected, atol=2e-3, rtol=1e-4)
        assert not y[s, :, outputs:].any()


@needs_kernels
@pytest.mark.parametrize("shape", [(7, 64), (33, 200)])
def test_4_bit_weights_are_unpacked_as_a_table_reads_them(shape):
    tensors = quantised(torch.randn(shape), 4)
    width = tensors["int4"].size(1) * 2
    table = Table(tensors, width)
    rows = torch.tensor([[3, 0], [6, 3]])
    by_kernel = table(rows)
    table.by_kernel = False
    torch.testing.assert_close(by_kernel, table(rows))
    with pytest.raises(IndexError):
        cpu_kernels.unpacked(*tensors.values(), torch.float32, torch.tensor([shape[0]]))
    expected = table(torch.arange(shape[0]))
    for kind in (torch.float32, torch.bfloat16):
        w = cpu_kernels.unpacked(tensors["int4"], tensors["steps"], kind)
        torch.testing.assert_close(w, expected.to(kind))


@needs_kernels
def test_finishes_are_torchs_functions():
    weight = torch.randn(300, 64)
    stack = cpu_kernels.Stack([{"float32": weight}])
    x = torch.randn(2, 64) * torch.tensor([[0.1], [3.0]])  # small sums, and some far from zero
    sums = x @ weight.T
    torch.testing.assert_close(stack(x, finish="gelu"), F.gelu(sums), atol=1e-5, rtol=1e-5)
    squares = F.relu(sums).square()
    torch.testing.assert_close(stack(x, finish="relu2"), squares, atol=1e-4, rtol=1e-5)
    y = torch.randn(2, 300)
    expected = y * F.silu(sums)
    stack(x, y=y, finish="gate")
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bits, bad):
    stack = cpu_kernels.Stack([quantised(torch.randn(9, 80), bits)])
    x = torch.randn(2, 80)
    x[0, 70] = bad
    y = stack(x)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("bits", [32, 4])
def test_a_copy_has_weights_of_its_own(bits):
    stack = cpu_kernels.Stack([quantised(torch.randn(20, 64), bits)])
    x = torch.randn(2, 64)
    expected = stack(x)
    other = copy.deepcopy(stack)
    for tensor in stack.held[0].values():
        tensor.zero_()
    assert torch.equal(other(x), expected)


def test_groups_of_another_size_are_refused():
    if not cpu_kernels.usable(CPU):
        pytest.skip(cpu_kernels.missing())
    with pytest.raises(ValueError, match="groups of 64"):
        cpu_kernels.Stack([quantised(torch.randn(8, 64), 4, group=32)])


@pytest.mark.skipif(
    sys.platform != "linux"
    or platform.machine() != "x86_64"
    or shutil.which("g++") is None
    or not torch.backends.cpu.get_cpu_capability().startswith("AVX")
    or native.SWITCH in os.environ,
    reason="not where there are such kernels",
)
def test_they_are_there_where_they_can_be():
    assert cpu_kernels.missing() == ""


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """Has the library looked for anew, in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    cpu_kernels.LIBRARY.forget()
    yield monkeypatch
    cpu_kernels.LIBRARY.forget()


def test_without_a_compiler_torch_multiplies_and_the_reason_is_named(afresh):
    afresh.setenv("CXX", "/no/such/compiler")
    assert not cpu_kernels.usable(CPU)
    assert "/no/such/compiler" in cpu_kernels.missing() or "Linux" in cpu_kernels.missing()
    model = random_model(tiny(layers=1))
    ids = random_ids(2, 5)
    with torch.no_grad():
        expected, _ = model(ids)
    for bits, tolerance in ((None, 1e-4), (8, 0.1)):
        logits, _ = Decoder(model, bits)(ids, last_only=False)
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)


def test_a_compiler_that_fails_leaves_nothing_behind(afresh, tmp_path):
    afresh.setenv("CXX", "false")
    assert cpu_kernels.missing()
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.parametrize("compiler", [" ", '"g++'])
def test_a_compiler_that_is_none_is_no_error(afresh, compiler):
    afresh.setenv("CXX", compiler)
    assert cpu_kernels.missing()


def test_a_library_that_others_could_have_written_is_not_loaded(afresh, tmp_path):
    if cpu_kernels.missing():
        pytest.skip(cpu_kernels.missing())
    (library,) = (tmp_path / "cache").rglob("*.so")
    library.chmod(0o777)
    cpu_kernels.LIBRARY.forget()
    assert str(library) in cpu_kernels.missing()


def test_a_library_made_where_the_group_may_write_is_loaded_again(afresh):
    before = os.umask(0o002)
    try:
        reason = cpu_kernels.missing()
        cpu_kernels.LIBRARY.forget()
        assert cpu_kernels.missing() == reason
    finally:
        os.umask(before)


def test_several_threads_may_come_first(afresh):
    with ThreadPoolExecutor(4) as pool:
        reasons = list(pool.map(lambda _: cpu_kernels.missing(), range(4)))
    assert len(set(reasons)) == 1


def test_torchs_kernels_can_be_asked_for(afresh):
    afresh.setenv(native.SWITCH, "torch")
    assert not cpu_kernels.usable(CPU)
    assert native.SWITCH in cpu_kernels.missing()

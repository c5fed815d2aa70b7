"""Compile every Triton kernel as its launchers call it for GPUs that need not be there.

The launchers themselves run, on small CPU tensors, with the launch replaced by a note of it, so that what is compiled
is what a GPU would be asked to run: every dtype, every tile configuration, with the argument specialisations of Triton.
Launches that Triton makes one code of are one.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import source_key
import torch
import triton
from machine_code import READERS, Kept, Usage, functions_of, instructions_of_every_program, repeated_instructions
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dgi_kernels import tiles
from dgi_kernels import triton_common as common
from dgi_kernels.clustering import triton as clustering
from dgi_kernels.cosine import triton as cosine
from dgi_kernels.cosine import triton_logits
from dgi_kernels.cosine.options import Columns, LossOptions
from dgi_kernels.gumbel import triton_softmax as softmax
from dgi_kernels.normalizer import triton as log_normalizer
from dgi_kernels.quantize import triton as quantize
from dgi_kernels.quantize import triton_chunks as quantize_chunks
from dgi_kernels.quantize import triton_forms as quantize_forms
from dgi_kernels.quantize import triton_gradient_kernels as quantize_gradient_kernels
from dgi_kernels.quantize import triton_kernels as quantize_kernels
from dgi_kernels.quantize.options import Operands, QuantizeOptions

MODULES = (
    common,
    cosine.kernels,
    cosine.chunks,
    cosine.fused.products,
    softmax.kernels,
    quantize_kernels,
    quantize_gradient_kernels,
    quantize_chunks,
    log_normalizer.kernels,
    clustering.kernels,
)
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One kernel as one launcher calls it: everything that decides the code Triton makes, and what to call it."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]
    label: str = field(compare=False)

    def case(self) -> str:
        """The label and what the launcher switched on. Of several codes of one case the largest counts."""
        return " ".join([*self.label.split(), *(name for name, value in self.constants if value is True)])

    def name(self) -> str:
        """Op family and kernel."""
        return ".".join([*self.module.split(".")[1:-1], self.kernel])

    def function(self) -> triton.JITFunction:
        return next(getattr(module, self.kernel) for module in MODULES if module.__name__ == self.module)


def describe(label: str, kernel: triton.JITFunction, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """What Triton specialises on: dtypes, None, constants, integers equal to 1, and multiples of 16."""
    if reserved := {"stream", "device", "device_type"} & set(kwargs):
        raise TypeError(f"{kernel.__name__} is launched with {', '.join(reserved)}, a name which Triton keeps")
    values = dict(zip(kernel.arg_names, args, strict=False))
    options = tuple((name, kwargs.pop(name)) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs)
    values |= kwargs
    signature, constants, aligned = [], [], []
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            kind = "constexpr"
            constants.append((parameter.name, value))
        elif isinstance(value, torch.Tensor):
            kind = TYPES[value.dtype]
            aligned += [i] * (value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment)
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned += [i] * (special and value % 16 == 0)
        signature.append((parameter.name, kind))
    return Launch(
        kernel.fn.__module__, kernel.__name__, tuple(signature), tuple(constants), tuple(aligned), options, label
    )


def launches_of(label: str, call: Callable[[], object]) -> list[Launch]:
    """Run a launcher; note its launches instead of making them."""
    noted: list[Launch] = []

    def note(kernel: triton.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        noted.append(describe(label, kernel, args, dict(kwargs)))
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32, torch.int16):
                value.zero_()  # codes, labels and orders that the kernel would have written are indices

    run, triton.JITFunction.run = triton.JITFunction.run, note
    try:
        call()
    finally:
        triton.JITFunction.run = run
    return noted


def cosine_launches() -> Iterator[Launch]:
    """Each dtype and form with aligned sizes, plain and with all that a column may have ("columns": less than all is
    less code), and once each with sizes of which nothing is a multiple of 16."""
    cases = [(dtype, dim) for dtype in cosine.HALF for dim in cosine.FLASH[9]]
    cases += [
        (torch.bfloat16, 100),
        *((dtype, dim) for dtype in cosine.HALF for dim in (256, 768)),
        (torch.bfloat16, 200),
        (torch.float32, 256),
        (torch.float32, 17),
    ]
    for dtype, dim in cases:
        rows, codes = (128, 64) if dim % 16 == 0 else (33, 47)  # whole tiles, or ragged ones
        for columns in (False, True) if dim % 16 == 0 else (False,):

            def call(
                dtype: torch.dtype = dtype,
                dim: int = dim,
                rows: int = rows,
                codes: int = codes,
                columns: bool = columns,
            ) -> None:
                h = torch.randn(rows, dim).to(dtype).requires_grad_()
                weight = torch.randn(codes, dim).to(dtype).requires_grad_()
                target, scale = torch.zeros(rows, dtype=torch.int64), torch.tensor(30.0, requires_grad=True)
                given = Columns.neutral(weight) if columns else Columns()
                # With columns left out, smoothing is for chunks.
                smoothing = 0.0 if columns and cosine.uses_flash(dim, dtype) else 0.1
                options = LossOptions(label_smoothing=smoothing, return_log_normalizer=columns)
                for of_loss in (options, options.per_row()):  # reduced, its gradients may be made with it
                    loss, lse = cosine.cosine_cross_entropy(h, weight, target, scale, given, of_loss)
                    (loss.sum() if lse is None else (loss + lse).sum()).backward()
                with torch.no_grad():
                    cosine.cosine_cross_entropy(h, weight, target, scale, given, options)
                if dtype in cosine.reduced.IN_RANGE and not columns:
                    whole = torch.randn(256, dim).to(dtype).requires_grad_()  # tiles of columns without an end
                    cosine.cosine_cross_entropy(h, whole, target, scale, given, LossOptions())[0].backward()

            label = f"{str(dtype).removeprefix('torch.')} D={dim}{' columns' * columns}"
            with mock.patch.object(cosine, "FLASH_ROWS", 0):  # the flash form, whose rows are many
                yield from launches_of(label, call)
    for dtype, dim in [(dtype, dim) for dtype in cosine.HALF for dim in (256, 768)] + [(torch.bfloat16, 200)]:
        rows, codes = (32, 48) if dim % 16 == 0 else (33, 47)
        h, weight = (torch.randn(n, dim).to(dtype).requires_grad_() for n in (rows, codes))
        label = f"{str(dtype).removeprefix('torch.')} D={dim}"
        yield from launches_of(label, lambda h=h, weight=weight: _logits(h, weight))  # type: ignore[misc]


def _logits(h: Tensor, weight: Tensor) -> None:
    triton_logits.cosine_logits(h, weight, 30.0, 1e-12).sum().backward()


def quantize_launches() -> Iterator[Launch]:
    """Residual quantization: each dtype, form, mode and metric, with and without noise, with all optional gradients
    and with none (less than all is less code), with whole tiles of codes, once each form with ragged ones, and once
    with rows of each size that the chunked form has code for."""
    seed, tau = torch.zeros(1, dtype=torch.int64), torch.tensor(0.5, requires_grad=True)
    cases = [(dtype, dim, 64) for dtype in common.HALF for dim in (*quantize_forms.FLASH[9], 768)]
    cases += [(torch.float32, 64, 64), *((torch.bfloat16, dim, 47) for dim in (*quantize_forms.FLASH[9], 768))]
    cases += [
        (torch.bfloat16, 768, codes) for codes in (4096, quantize_forms.ROW_LARGEST, quantize_forms.ROW_LARGEST + 16)
    ]
    for dtype, dim, codes in cases:
        by_cosine = [
            ("soft", seed, "cosine"),
            ("soft", None, "cosine"),
            ("straight_through", seed, "cosine"),
            ("straight_through", None, "cosine"),
            ("hard", None, "cosine"),
            ("constant tau", seed, "cosine"),  # soft, with the least that a gradient is asked for
        ]
        # By the metric "dot" only the kernels without products differ, which are short: one dtype stands for all.
        by_cosine += [("soft", None, "dot")] * (dtype == torch.bfloat16 and dim != 128)
        by_distance = [("straight_through", seed, "euclidean")]  # with a bias, and noise of a scale: all options

        def step(
            modes: list[tuple[str, Any, str]], dtype: torch.dtype = dtype, dim: int = dim, codes: int = codes
        ) -> None:
            for mode, noise, metric in modes:
                z, *codebooks = (torch.randn(rows, dim).to(dtype).requires_grad_() for rows in (32, codes, codes))
                with torch.set_grad_enabled(mode != "hard"):
                    constant = mode == "constant tau"
                    options = QuantizeOptions("soft" if constant else mode, metric, 0, 1e-12)
                    sigma = torch.ones(32, requires_grad=True) if metric == "euclidean" else None
                    own_tau = tau.detach() if constant else tau
                    operands = Operands(z, codebooks, torch.tensor(30.0), own_tau, sigma, seed=noise)
                    result = quantize.residual_quantize(operands, options)
                if mode != "hard":
                    loss = result.quantized.sum()
                    if noise is not None:
                        loss = loss + result.usage[0].sum() + (0.0 if constant else result.log_normalizer.sum())
                    loss.backward()

        label = f"{str(dtype).removeprefix('torch.')} D={dim}"
        with mock.patch.object(quantize_forms, "FLASH_ROWS", 0):
            yield from launches_of(label, functools.partial(step, by_cosine))
            yield from launches_of(f"{label} euclidean", functools.partial(step, by_distance))


def gumbel_launches() -> Iterator[Launch]:
    """Noise and softmax at each tile."""
    seed, tau = torch.zeros(1, dtype=torch.int64), torch.tensor(0.5, requires_grad=True)
    for dtype in (torch.float32, *common.HALF):

        def sample(dtype: torch.dtype = dtype) -> None:
            for codes in (*(b_k for _, b_k in softmax.SOFTMAX_TILES), 32000, 33):
                logits = torch.randn(4, codes).to(dtype).requires_grad_()
                for hard in (False, True):
                    softmax.gumbel_softmax(logits, tau, hard, seed).sum().backward()

        yield from launches_of(str(dtype).removeprefix("torch."), sample)
    yield from launches_of(
        "", lambda: [softmax.gumbel_noise(seed, 0, 0, 0, 4, codes) for codes in (b_k for _, b_k in softmax.NOISE_TILES)]
    )


def log_normalizer_launches() -> Iterator[Launch]:
    """Each dtype, of rows that are one part and rows that are several, and once with a stride between logits."""
    for dtype in (torch.float32, *common.HALF):

        def read(dtype: torch.dtype = dtype) -> None:
            for logits in (torch.randn(4096, 1024), torch.randn(2, 2, 151_936), torch.randn(2, 151_936, 2).mT):
                log_normalizer.log_normalizer(logits.to(dtype))

        yield from launches_of(str(dtype).removeprefix("torch."), read)


def clustering_launches() -> Iterator[Launch]:
    """Sinkhorn's steps: sums of a few parts, as of rows, and of many, as of codes; and a D of no multiple of 16."""
    for dim in (64, 47):
        x, y = torch.randn(2048, dim), torch.randn(48, dim)
        yield from launches_of(
            f"float32 D={dim}",
            lambda x=x, y=y: (clustering.log_sums(x, y, y[:, 0].clone()), clustering.log_sums(y, x, x[:, 0].clone())),  # type: ignore[misc]
        )


def all_launches() -> Iterator[Launch]:
    yield from quantize_launches()
    yield from gumbel_launches()
    yield from log_normalizer_launches()
    yield from clustering_launches()
    yield from cosine_launches()


def launches(arch: int) -> list[Launch]:
    """All of them for one architecture, each code once; for Hopper's also with the tiles of every file of the package,
    all of which are of GPUs like it."""
    with mock.patch.object(common, "architecture", lambda device: arch // 10):
        found = list(all_launches())
        for path in sorted(tiles.FOLDER.glob("*.json")) if arch == 90 else []:
            with tiles.override(str(path)):
                found += [replace(launch, label=f"{launch.label} {path.stem}") for launch in all_launches()]
    return list(dict.fromkeys(found))


def machine_code(launch: Launch, arch: int) -> tuple[Usage, str]:
    """What a kernel takes but for instructions by element, and its machine code as text."""
    kernel = launch.function()
    constants = {(kernel.arg_names.index(name),): value for name, value in launch.constants}
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(kernel, dict(launch.signature), constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    ((usage, code),) = functions_of(compiled.asm["cubin"]).values()
    return Usage(usage.registers, usage.spilled, compiled.metadata.shared, usage.instructions), code


def elements(launch: Launch) -> float:
    """Of a tile of logits, for each of its threads; 0 for a kernel that has no such tile."""
    blocks, warps = dict(launch.constants), dict(launch.options)["num_warps"]
    rows = blocks.get("b_n", 0 if "b_d" in blocks else 1)
    return rows * blocks.get("b_k", 0) / (32 * warps)


def compile_for(launch: Launch, arch: int) -> tuple[Usage, float]:
    """What a kernel takes, and how many seconds its compilation took.

    Instructions by element, by a thread's elements of a tile: those of its loops over tiles of logits; of the whole
    kernel where a row is one tile; of what every program does where the last one does more. Two variants' difference
    says what one ingredient costs.
    """
    start = time.perf_counter()
    usage, code = machine_code(launch, arch)
    one_tile = usage.instructions if dict(launch.constants).get("one_tile") else 0
    counted = one_tile or instructions_of_every_program(code) or repeated_instructions(code)
    per_element = counted / (elements(launch) or math.inf)
    return (
        Usage(usage.registers, usage.spilled, usage.shared, usage.instructions, round(per_element, 1)),
        time.perf_counter() - start,
    )


@dataclass(frozen=True)
class Case:
    """A launch for an architecture, and what it takes if that is known."""

    launch: Launch
    arch: int
    key: str
    usage: Usage | None


@functools.cache
def _readers() -> str:
    """All that a usage follows from beside the kernel."""
    return triton.__version__ + "".join(
        source_key.of_function(function) for function in (compile_for, machine_code, elements, *READERS)
    )


def key_of(launch: Launch, arch: int) -> str:
    """The hash of all that a launch's usage follows from."""
    meaning = source_key.of_kernel(launch.function())
    text = f"{_readers()}{meaning} {replace(launch, label='', module='')} {arch}"
    return hashlib.sha256(text.encode()).hexdigest()


def cases(architectures: list[int], kept: Kept) -> list[Case]:
    """Every launch for every architecture; what has not changed since it was compiled last is known."""
    found = []
    for arch in architectures:
        for launch in launches(arch):
            key = key_of(launch, arch)
            usages = kept.get(key)
            found.append(Case(launch, arch, key, usages[launch.kernel] if usages else None))
    return found


def compiled(found: list[Case], jobs: int, kept: Kept) -> Iterator[tuple[Case, Usage, float]]:
    """Each case, what it takes, and the seconds that its compilation took. Raises for one that does not compile."""
    with ProcessPoolExecutor(jobs) as pool:
        futures = [None if case.usage else pool.submit(compile_for, case.launch, case.arch) for case in found]
        for case, future in zip(found, futures, strict=True):
            usage, seconds = case.usage, 0.0
            if future is not None:
                try:
                    usage, seconds = future.result()
                except Exception as error:
                    pool.shutdown(cancel_futures=True)
                    raise RuntimeError(f"{case.launch.name()} {case.launch.case()} fails for sm_{case.arch}") from error
                kept.put(case.key, {case.launch.kernel: usage})
            assert usage is not None
            yield case, usage, seconds
